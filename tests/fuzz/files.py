"""Damaged and foreign files: every reader refuses them by name, or reads what was written."""

import functools
import gzip
import io
import pickle
import random
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.io
import torch
from torch import Tensor, nn

import twophase_ext as tp
from twophase import data
from twophase.report import write_report
from twophase_ext.expressivity.bounded import BoundedFeatures
from twophase_ext.expressivity.kept import read_features, write_state
from twophase_ext.linalg.journal import Journal, RecordedTiles
from twophase_ext.linalg.tiles import FileTiles, Grid, TileFile
from twophase_ext.training.persistence import checkpoint

from .harness import CALLS

HEADER = {"version": 2, "key": "k", "n": 5}
CPU = torch.device("cpu")


class Reader(NamedTuple):
    """A file of a folder that `make` fills, and how its content is read from there.

    exact: damage is always noticed, so that what is read is what was written.
    """

    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    exact: bool


def _verdict(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 6), tp.nn.Softplus(), nn.Linear(6, 2))
    tp.verify_expressivity(model, torch.randn(4, 2)).save(folder / "verdict.json")


def _journal(folder: Path) -> None:
    journal = Journal(folder / "tiles.journal", HEADER, resume=False)
    journal.add("exponents", [0, 1, -3])
    for i in range(3):
        journal.add("G", i, 0, 12345 + i, 0.5 * i)
    journal.add("shift L1", 1e-9)
    journal.close()


def _read_journal(folder: Path) -> list[Any]:
    journal = Journal(folder / "tiles.journal", HEADER, resume=True)
    journal.close()
    return journal.records


def _tiles(folder: Path) -> None:
    grid = Grid(5, 2)
    journal = Journal(folder / "tiles.journal", HEADER, resume=False)
    file = FileTiles(TileFile(folder / "tiles.bin", grid, 1), 0, CPU)
    tiles = RecordedTiles("G", file, file, journal)
    for i, j in grid.lower():
        tiles.write(i, j, torch.full(grid.shape(i, j), float(i + j + 1), dtype=torch.float64), 0.5)
    journal.close()


def _read_tiles(folder: Path) -> None:
    grid = Grid(5, 2)
    journal = Journal(folder / "tiles.journal", HEADER, resume=True)
    try:
        file = FileTiles(TileFile(folder / "tiles.bin", grid, 1), 0, CPU)
        for (i, j), note in RecordedTiles("G", file, file, journal).restore().items():
            assert note == 0.5 and bool((file.read(i, j) == i + j + 1).all()), "a torn tile"
    finally:
        journal.close()


def _features(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4, 3, dtype=torch.float64, generator=g)
    found = BoundedFeatures(z, z[:, 0].abs(), ["a"], 0.5)
    write_state(folder / "features0.pt", "k", vars(found))


def _read_kept(folder: Path) -> Any:
    found = vars(read_features(folder / "features0.pt", "k", CPU))
    return {name: found[name] for name in ("z", "error", "assumptions")}


def _checkpoint(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    model = {"w": torch.randn(3, 2, generator=g)}
    checkpoint.save(folder, {"model": model, "epoch": 3, "rng": torch.arange(5), "config": {}})


def _images() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (3, 3, 32, 32), np.uint8), np.array([1, 0, 2])


def _idx(folder: Path) -> None:
    head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 4, 5))
    (folder / "images.idx").write_bytes(head + bytes(range(40)))
    (folder / "images.gz").write_bytes(gzip.compress(head + bytes(range(40)), mtime=0))


def _batch() -> bytes:
    images, labels = _images()
    return pickle.dumps({"data": images.reshape(3, -1), "labels": labels.tolist()}, protocol=2)


def _cifar(folder: Path) -> None:
    home = folder / "cifar10"
    home.mkdir()
    with tarfile.open(home / "cifar-10-python.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        member.size = len(_batch())
        archive.addfile(member, io.BytesIO(_batch()))


def _unpacked(folder: Path) -> None:
    (folder / "cifar10").mkdir()
    (folder / "cifar10" / "test_batch").write_bytes(_batch())


def _npz(folder: Path) -> None:
    (folder / "cifar10").mkdir()
    images, labels = _images()
    np.savez(folder / "cifar10" / "c.npz", x_test=images.transpose(0, 2, 3, 1), y_test=labels)


def _svhn(folder: Path) -> None:
    (folder / "svhn").mkdir()
    images, labels = _images()
    arrays = {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]}
    scipy.io.savemat(folder / "svhn" / "test_32x32.mat", arrays, do_compression=True)


def _load(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        images, labels = data.load(name, "test", folder, download=False)
        assert images.dtype == torch.uint8 and images.dim() == 4 and len(images) == len(labels)
        assert labels.dtype == torch.int64
        return images, labels

    return read


def _read_idx(file: str) -> Callable[[Path], Any]:
    return lambda folder: torch.from_numpy(data.read_idx(folder / file))


def _run(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), tp.nn.Softplus(), nn.Linear(8, 2))
    x = torch.randn(6, 2)
    trainer = tp.Trainer(
        *(model,), epochs=3, tau=1, second_phase="gd", run_dir=folder, progress=False, verify="svd"
    )
    trainer.fit((x, (x[:, 0] > 0).long()))
    (folder / "options.yaml").write_text("data_name: digits\nn: 6\nseed: 1\n")


def _report(folder: Path) -> None:
    page = write_report([folder], folder.parent / "report.html")
    assert "</html>" in page.read_text(encoding="utf-8")


def _loaded(folder: Path) -> None:
    assert str(tp.load_run(folder)).strip()


RUN_FILES = ("config", "environment", "result", "verdict")
READERS: dict[str, Reader] = {
    "verdict": Reader(
        "verdict.json", _verdict, lambda f: tp.Verdict.load(f / "verdict.json").as_dict(), True
    ),
    "journal": Reader("tiles.journal", _journal, _read_journal, True),
    "tiles": Reader("tiles.bin", _tiles, _read_tiles, True),
    "tiles' journal": Reader("tiles.journal", _tiles, _read_tiles, True),
    "features": Reader("features0.pt", _features, _read_kept, True),
    "checkpoint": Reader("checkpoint.pt", _checkpoint, lambda f: checkpoint.load(f)[0], True),
    "idx": Reader("images.idx", _idx, _read_idx("images.idx"), False),
    "idx.gz": Reader("images.gz", _idx, _read_idx("images.gz"), True),
    "cifar": Reader("cifar10/cifar-10-python.tar.gz", _cifar, _load("cifar10"), True),
    "cifar batch": Reader("cifar10/test_batch", _unpacked, _load("cifar10"), False),
    "cifar npz": Reader("cifar10/c.npz", _npz, _load("cifar10"), True),
    "svhn": Reader("svhn/test_32x32.mat", _svhn, _load("svhn"), False),
    **{f"run {name}": Reader(f"{name}.json", _run, _report, False) for name in RUN_FILES},
    **{
        f"run loaded, {name}": Reader(name, _run, _loaded, False)
        for name in ("config.json", "result.json", "verdict.json", "metrics.csv")
    },
    "run metrics": Reader("metrics.csv", _run, _report, False),
    "run guarantee": Reader("guarantee.csv", _run, _report, False),
    "run options": Reader("options.yaml", _run, _report, False),
}
FOREIGN = (
    *(b"", b"\0" * 64, b"[" * 3000, b"{" * 3000, b"9" * 5000, b'{"a": ' * 2000, b"null", b"NaN"),
    *(b"\x80\x04.", b"PK\x05\x06" + b"\0" * 18, b"\xff\xfe\0d", b"a,b\n1,2,3\n\0", b"- &a [*a]"),
    *(
        b"!!python/object/apply:os.getpid []",
        b'{"schema": "twophase-verdict/1"}',
        b'{"schema": "twophase-verdict/2"}',
        b'[["header"]]\n',
    ),
)


@functools.cache
def _workshop() -> Path:
    """A folder of this process, removed with it."""
    folder = tempfile.TemporaryDirectory(prefix="twophase-fuzz-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def original(name: str) -> tuple[Path, Any]:
    """The folder that the reader's files were written to, and what is read there."""
    folder = _workshop() / f"{name} original" / "run"
    folder.mkdir(parents=True)
    READERS[name].make(folder)
    kept = _workshop() / f"{name} kept" / "run"
    shutil.copytree(folder, kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kept, READERS[name].read(folder)


def damaged(r: random.Random, content: bytes) -> bytes:
    """Truncated, with bits flipped, spliced, grown, or another file altogether."""
    kind = r.randrange(8)
    out = bytearray(content)
    if kind == 0 or not out:
        return r.choice(FOREIGN)
    if kind == 1:
        return bytes(out[: r.randrange(len(out))])
    at = r.randrange(len(out))
    if kind in (2, 3):
        for _ in range(r.choice((1, 1, 1, 8))):
            out[r.randrange(len(out))] ^= 1 << r.randrange(8)
    elif kind == 4:  # a piece elsewhere
        length = r.randrange(1, 65)
        source = r.randrange(len(out))
        out[at : at + length] = out[source : source + length]
    elif kind == 5:
        out[at:at] = r.choice((*FOREIGN, bytes(out[at : at + 200])))
    elif kind == 6:
        del out[at : at + r.randrange(1, 65)]
    else:  # another digit, sign or letter: text stays text
        places = [i for i, byte in enumerate(out[:20_000]) if 32 <= byte < 127]
        if places:
            out[r.choice(places)] = r.choice(b'0123456789-+.eE"[]{}:,nN ')
    return bytes(out)


def same(a: Any, b: Any) -> bool:
    """Equal, tensors by their bytes, NaN equal to itself."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def read_damaged(name: str, content: bytes) -> None:
    """Read `content` as the reader's file; AssertionError where the promise is broken."""
    reader = READERS[name]
    kept, truth = original(name)
    folder = _workshop() / f"{name} now" / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    (folder / reader.file).write_bytes(content)
    CALLS[f"read {name}"] += 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = reader.read(folder)
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            named = Path(reader.file).name in text or str(folder) in text
            assert named, f"{name}: the file is not named: {text}"
            return
    for warning in caught:
        text = str(warning.message)
        assert text.startswith("resume:") or "holds" in text, f"{name}: warned: {text}"
    if name == "journal":  # what a torn line and its successors said is computed again
        truth = truth[: len(got)]
    assert not reader.exact or same(got, truth), f"{name}: read something else"


def damage(r: random.Random) -> None:
    """One damaged file."""
    slow = r.random() < 0.03  # a whole report
    name = r.choice([name for name in READERS if name.startswith("run ") == slow])
    content = (original(name)[0] / READERS[name].file).read_bytes()
    read_damaged(name, damaged(r, content))


CASES: dict[str, tuple[Callable[[random.Random], None], float]] = {"damage": (damage, 3)}
