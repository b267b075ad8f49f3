"""Image data sets in their own file formats: MNIST and its kin, CIFAR, SVHN, digits.

Files are looked for in `root`, else in the folder that TWOPHASE_DATA names, else in the user's
cache folder, to which missing ones are downloaded with their SHA-256 verified.
"""

import gzip
import io
import math
import os
import pickle  # noqa: TID251  read by an Unpickler that knows arrays alone
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# SHA-256, in the order of _IDX. Of MNIST and Fashion-MNIST computed from the files, which have the
# MD5 sums that torchvision publishes; of the others as TensorFlow Datasets or Keras publish them.
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
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion-mnist": (
        _FASHION_URL,
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "kmnist": (
        _KMNIST_URL,
        (
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        ),
    ),
}
# The archive, its checksum, the folder that it unpacks to.
_CIFAR = {
    "cifar10": (
        "cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        "cifar-10-batches-py",
    ),
    "cifar100": (
        "cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
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
    "train": (
        "train_32x32.mat",
        "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    ),
    "test": (
        "test_32x32.mat",
        "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    ),
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
    folders: list[Path], names: list[str], url: str, sha256: str, download: bool, data_set: str
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
            pooch.retrieve(  # noqa: TID251  with its hash
                url + names[0],
                known_hash=f"sha256:{sha256}",
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
    for (part, kind), sha256 in zip(_IDX, sums, strict=True):
        if part == split:
            file = _IDX[part, kind]
            path = _find(folders, [file, file.removesuffix(".gz")], url, sha256, download, name)
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
        labels = np.asarray(labels, np.int64).reshape(-1)
    except Exception as error:  # a damaged pickle raises nearly every type
        raise ValueError(f"{name}: not a CIFAR batch ({error})") from None
    if len(images) != len(labels):
        raise ValueError(f"{name}: {len(images)} images do not fit {len(labels)} labels")
    return images, labels


def _load_cifar(
    name: str, split: str, folders: list[Path], download: bool
) -> tuple[Tensor, Tensor]:
    archive, sha256, unpacked = _CIFAR[name]
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
    path = _find(folders, [archive], _CIFAR_URL, sha256, download, name)
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
    except Exception as error:  # tarfile raises more than its own types for damaged headers
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
    if (
        images.ndim != 4
        or images.dtype != np.uint8
        or labels.shape != images.shape[:1]
        or (labels.dtype.kind not in "iu")
    ):
        raise ValueError(
            f"{path}: expected uint8 images [n, h, w, c] and integer labels [n], got "
            f"{images.dtype} {images.shape} and {labels.dtype} {labels.shape}"
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

    file, sha256 = _SVHN[split]
    path = _find(folders, [file], _SVHN_URL, sha256, download, "svhn")
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
