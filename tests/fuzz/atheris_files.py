"""Coverage-guided fuzzing of one file reader: `atheris_files.py verdict -runs=10000`.

The first argument names the reader (fuzz.files.READERS); the others are libFuzzer's, such as a
folder of inputs to start from and keep new ones in. Needs the extra `fuzz` (atheris).
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
with atheris.instrument_imports(include=["twophase", "twophase_ext", "json", "pickle", "tarfile"]):
    from fuzz import files


def main() -> None:
    """Fuzz the reader from its own file, until libFuzzer's limit or a broken promise."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in files.READERS:
        sys.exit(f"reader: expected one of {', '.join(map(repr, files.READERS))}, got {name!r}")
    corpus = tempfile.mkdtemp(prefix="twophase-corpus-")
    content = (files.original(name)[0] / files.READERS[name].file).read_bytes()
    for i, start in enumerate((content, *files.FOREIGN)):
        (Path(corpus) / str(i)).write_bytes(start)
    arguments = [sys.argv[0], *sys.argv[2:], "-timeout=10", f"-max_len={2 * len(content) + 64}"]
    atheris.Setup([*arguments, corpus], lambda data: files.read_damaged(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
