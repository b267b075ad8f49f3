"""A digest of the native sources: tells a compiled library of these from one of others.

Standard library alone: setup.py runs this file too.
"""

import hashlib
from pathlib import Path


def digest(root: Path) -> str:
    """SHA-256 of csrc and CMakeLists.txt in the folder `root`; "" where they are not there."""
    csrc, build = root / "csrc", root / "CMakeLists.txt"
    if not csrc.is_dir() or not build.is_file():
        return ""
    whole = hashlib.sha256()
    for path in [build, *sorted(p for p in csrc.rglob("*") if p.suffix in _COMPILED)]:
        content = path.read_bytes()
        whole.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()


_COMPILED = {".h", ".cpp", ".cu", ".cuh"}
