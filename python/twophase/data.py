"""Image data sets in their own file formats: MNIST and its kin, CIFAR, SVHN, digits.

Files are looked for in `root`, else in the folder that TWOPHASE_DATA names, else in the user's
cache folder, to which missing ones are downloaded with their checksums verified.
"""

import gzip
import io
import math
import os
import pickle
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Checksums (MD5) and addresses are those that torchvision's data sets publish.
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_KMNIST_URL = "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"
_IDX = {
    ("train", "images"): "train-images-idx3-ubyte.gz",
    ("train", "labels"): "train-labels-idx1-ubyte.gz",
    ("test", "images"): "t10k-images-idx3-ubyte.gz",
    ("test", "labels"): "t10k-labels-idx1-ubyte.gz",
}
_IDX_SETS = {
    "mnist": (
        _MNIST_URL,
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": (
        _FASHION_URL,
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "kmnist": (
        _KMNIST_URL,
        (
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
    ),
}
# The archive, its checksum, the folder that it unpacks to.
_CIFAR = {
    "cifar10": (
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
    ),
    "cifar100": (
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
    ),
}
_CIFAR_BATCHES = {
    ("cifar10", "train"): [f"data_batch_{i}" for i in range(1, 6)],
    ("cifar10", "test"): ["test_batch"],
    ("cifar100", "train"): ["train"],
    ("cifar100", "test"): ["test"],
}
_CIFAR_SIZES = {"train": 50_000, "test": 10_000}
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
_SVHN = {
    "train": ("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
    "test": ("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
}
_SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"

NAMES = ("digits", *_IDX_SETS, *_CIFAR, "svhn")


def load(
    name: str, split: str = "train", root: str | Path | None = None, *, download: bool = True
) -> tuple[Tensor, Tensor]:
    """(images uint8 [n, c, h, w], labels int64 [n]) of a data set's "train" or "test" part.

    name: one of NAMES; "digits" is scikit-learn's (8 x 8, scaled from 0..16 to 0..255), the first
    1,437 samples for training and the last 360 for testing. CIFAR may be the archive, its unpacked
    batches, or an .npz with arrays x_train [n, h, w, c], y_train [n], x_test, y_test; an .npz that
    holds a part of the set is read with a warning. Raises ValueError for an unknown name or a
    damaged file (named), FileNotFoundError for a missing one that cannot be or, with
    download=False, shall not be downloaded.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {NAMES}, got {name!r}")
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if name == "digits":
        return _digits(split)
    folders = _folders(root)
    if name in _IDX_SETS:
        return _load_idx(name, split, folders, download)
    if name in _CIFAR:
        return _load_cifar(name, split, folders, download)
    return _load_svhn(split, folders, download)


def as_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]."""
    return images.float() / 255


def _folders(root: str | Path | None) -> list[Path]:
    """Where to look; the last one is where downloads go."""
    if root is not None:
        return [Path(root)]
    named = os.environ.get("TWOPHASE_DATA")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twophase"
    return [Path(named), cache] if named else [cache]


def _find(
    folders: list[Path], names: list[str], url: str, md5: str, download: bool, data_set: str
) -> Path:
    """The first of the files `names` that a folder holds; names[0] is downloaded where none is."""
    for folder in folders:
        for name in names:
            if (folder / data_set / name).is_file():
                return folder / data_set / name
    hint = (
        f"{names[0]} of {data_set} was not found in {', '.join(str(f) for f in folders)}. Set "
        f"TWOPHASE_DATA to a folder that holds {data_set}/{names[0]}"
    )
    if not download:
        raise FileNotFoundError(hint)
    import pooch

    try:
        return Path(
            pooch.retrieve(
                url + names[0],
                known_hash=f"md5:{md5}",
                fname=names[0],
                path=folders[-1] / data_set,
                progressbar=False,
            )
        )
    except ValueError as error:  # how pooch reports a wrong checksum
        raise ValueError(f"{url + names[0]}: damaged download ({error})") from None
    except Exception as error:  # requests and pooch raise many types
        raise FileNotFoundError(
            f"{hint}; downloading it failed (no network?): {type(error).__name__}: {error}"
        ) from error


def _digits(split: str) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    part = slice(None, 1437) if split == "train" else slice(1437, None)
    return images[part], torch.from_numpy(labels).long()[part]


def _read_bytes(path: Path) -> bytes:
    """A file's content, decompressed where it ends in .gz; ValueError where its CRC is wrong."""
    raw = path.read_bytes()
    try:
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or not gzip ({error})") from None


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, gzipped or not; ValueError where damaged."""
    raw = _read_bytes(path)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or not 1 <= raw[3] <= 4:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    header = 4 + 4 * raw[3]
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, header, 4))
    if len(raw) != header + math.prod(shape):
        raise ValueError(f"{path}: expected {shape} bytes of data, got {len(raw) - header}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def _load_idx(name: str, split: str, folders: list[Path], download: bool) -> tuple[Tensor, Tensor]:
    url, sums = _IDX_SETS[name]
    arrays = {}
    for (part, kind), md5 in zip(_IDX, sums, strict=True):
        if part == split:
            file = _IDX[part, kind]
            path = _find(folders, [file, file.removesuffix(".gz")], url, md5, download, name)
            arrays[kind] = (path, read_idx(path))
    path, images = arrays["images"]
    _, labels = arrays["labels"]
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"{path}: {images.shape} images do not fit {labels.shape} labels")
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()


class _ArraysOnly(pickle.Unpickler):
    """Unpickles what CIFAR's batches hold, NumPy arrays and plain containers, and nothing else."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every global that is not on the list."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused {module}.{name}")
        return super().find_class(module, name)


def read_cifar_batch(raw: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 3, 32, 32], labels [n]) of one pickled batch; ValueError where unreadable."""
    try:
        batch = _ArraysOnly(io.BytesIO(raw), encoding="latin1").load()
        labels = batch["labels"] if "labels" in batch else batch["fine_labels"]
        images = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32)
    except Exception as error:  # a damaged pickle raises nearly every type
        raise ValueError(f"{name}: not a CIFAR batch ({error})") from None
    if len(images) != len(labels):
        raise ValueError(f"{name}: {len(images)} images do not fit {len(labels)} labels")
    return images, np.asarray(labels, np.int64)


def _load_cifar(
    name: str, split: str, folders: list[Path], download: bool
) -> tuple[Tensor, Tensor]:
    archive, md5, unpacked = _CIFAR[name]
    wanted = _CIFAR_BATCHES[name, split]
    for folder in folders:
        here = folder / name
        if (here / archive).is_file():
            break
        for batches in (here / unpacked, here):
            if (batches / wanted[0]).is_file():
                paths = [batches / b for b in wanted]
                return _join([read_cifar_batch(p.read_bytes(), str(p)) for p in paths])
        for path in sorted(here.glob("*.npz")):
            return _load_npz(path, split)
    path = _find(folders, [archive], _CIFAR_URL, md5, download, name)
    members = _read_tar(path, wanted)
    return _join([read_cifar_batch(members[b], f"{path}: {b}") for b in wanted])


def _read_tar(path: Path, wanted: list[str]) -> dict[str, bytes]:
    """The wanted files of an archive; ValueError where it is damaged or lacks one of them."""
    raw = _read_bytes(path)  # whole: tarfile stops before gzip's own checksum
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as files:
            for member in files:
                name = member.name.rsplit("/", 1)[-1]
                if name in wanted and (content := files.extractfile(member)) is not None:
                    found[name] = content.read()
    except (tarfile.TarError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: damaged archive ({error})") from None
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{path}: holds no {', '.join(missing)}")
    return found


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))


def _load_npz(path: Path, split: str) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    except Exception as error:  # NumPy, zipfile and zlib each raise their own types
        raise ValueError(f"{path}: expected arrays x_{split} and y_{split} ({error})") from None
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: expected uint8 images [n, h, w, c] and labels [n], got {images.dtype} "
            f"{images.shape} and {labels.shape}"
        )
    if len(images) < _CIFAR_SIZES[split]:
        warnings.warn(
            f"{path}: holds {len(images):,} of the {_CIFAR_SIZES[split]:,} {split} images",
            stacklevel=4,  # the caller of load
        )
    tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return tensor, torch.from_numpy(labels.astype(np.int64))


def _load_svhn(split: str, folders: list[Path], download: bool) -> tuple[Tensor, Tensor]:
    from scipy.io import loadmat

    file, md5 = _SVHN[split]
    path = _find(folders, [file], _SVHN_URL, md5, download, "svhn")
    try:
        content = loadmat(path)
        images = content["X"].transpose(3, 2, 0, 1)
        labels = content["y"].reshape(-1).astype(np.int64) % 10  # "10" is the digit 0
    except Exception as error:  # scipy raises many types for a damaged file
        raise ValueError(f"{path}: not an SVHN file ({error})") from None
    if images.dtype != np.uint8 or len(images) != len(labels):
        raise ValueError(
            f"{path}: {images.dtype} images {images.shape} do not fit {labels.shape} labels"
        )
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels)
