"""Readers of the data sets' own formats, on files written here and on the real ones."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from twophase import data


def idx(array: np.ndarray) -> bytes:
    shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + shape + array.tobytes()


def write_mnist(folder, images, labels, pack=gzip.compress, suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))


@pytest.fixture
def small():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (5, 4, 3), np.uint8), rng.integers(0, 10, 5).astype(np.uint8)


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (bytes, "")])
def test_idx_round_trip(tmp_path, small, pack, suffix):
    images, labels = small
    write_mnist(tmp_path / "mnist", images, labels, pack, suffix)
    x, y = data.load("mnist", "test", tmp_path)
    assert x.shape == (5, 1, 4, 3) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert np.array_equal(x[:, 0].numpy(), images) and y.tolist() == labels.tolist()
    assert data.as_float(x).max() <= 1 and data.as_float(x).dtype == torch.float32


@pytest.mark.parametrize("keep", [0, 3, 10, 40])
def test_damaged_idx_files_are_named(tmp_path, small, keep):
    images, labels = small
    write_mnist(tmp_path / "mnist", images, labels)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: "):
        data.load("mnist", "train", tmp_path)
    path.write_bytes(gzip.compress(idx(images)[: -keep or -1]))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: "):
        data.load("mnist", "train", tmp_path)


def test_images_and_labels_must_fit(tmp_path, small):
    write_mnist(tmp_path / "mnist", small[0], small[1][:4])
    with pytest.raises(ValueError, match=r"do not fit"):
        data.load("mnist", "train", tmp_path)


def cifar_batch(pixels, labels, key="labels") -> bytes:
    return pickle.dumps({"data": pixels, key: list(labels)}, protocol=2)


def write_cifar(path, payload: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as files:
        for name, raw in payload.items():
            member = tarfile.TarInfo(f"batches/{name}")
            member.size = len(raw)
            files.addfile(member, io.BytesIO(raw))


@pytest.fixture
def cifar10():
    """Pixels [6, 3072], and the files of an archive whose image i has label i."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), np.uint8)
    files = {f"data_batch_{i}": cifar_batch(pixels[i - 1 : i], [i - 1]) for i in (2, 1, 3, 5, 4)}
    return pixels, files | {"test_batch": cifar_batch(pixels[5:], [5]), "readme.html": b""}


def test_cifar_archive(tmp_path, cifar10):
    pixels, files = cifar10
    write_cifar(tmp_path / "cifar10" / "cifar-10-python.tar.gz", files)
    x, y = data.load("cifar10", "train", tmp_path)
    assert x.shape == (5, 3, 32, 32) and y.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(x.numpy().reshape(5, -1), pixels[:5])
    assert data.load("cifar10", "test", tmp_path)[1].tolist() == [5]
    train = cifar_batch(pixels[:2], [1, 0], "fine_labels")
    write_cifar(tmp_path / "cifar100" / "cifar-100-python.tar.gz", {"train": train})
    assert data.load("cifar100", "train", tmp_path)[1].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"cifar-100-python\.tar\.gz: holds no test"):
        data.load("cifar100", "test", tmp_path)
    del files["data_batch_3"], files["data_batch_5"]
    write_cifar(tmp_path / "cifar10" / "cifar-10-python.tar.gz", files)
    with pytest.raises(ValueError, match=r"holds no data_batch_3, data_batch_5"):
        data.load("cifar10", "train", tmp_path)


@pytest.mark.parametrize("below", ["cifar-10-batches-py", "."])
def test_unpacked_cifar(tmp_path, cifar10, below):
    pixels, files = cifar10
    folder = tmp_path / "cifar10" / below
    folder.mkdir(parents=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    x, y = data.load("cifar10", "train", tmp_path)
    assert np.array_equal(x.numpy().reshape(5, -1), pixels[:5]) and y.tolist() == [0, 1, 2, 3, 4]
    (folder / "data_batch_2").write_bytes(files["data_batch_2"][:-100])
    with pytest.raises(ValueError, match=r"/data_batch_2: not a CIFAR batch"):
        data.load("cifar10", "train", tmp_path)


def test_every_damaged_archive_byte_is_noticed(tmp_path, cifar10):
    path = tmp_path / "cifar10" / "cifar-10-python.tar.gz"
    write_cifar(path, cifar10[1])
    raw = path.read_bytes()
    # past the gzip header's own fields (time, name), which carry no data and no checksum
    for place in range(60, len(raw), len(raw) // 100):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x10]) + raw[place + 1 :])
        with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz: "):
            data.load("cifar10", "train", tmp_path)
    for length in (0, 20, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz: "):
            data.load("cifar10", "train", tmp_path)


def test_cifar_batches_of_python_2():
    """The published batches: byte strings for text, arrays of NumPy's module of that time."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    array = b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR",
            b"(K\x01(K\x02M\x00\x0ct",  # version 1, shape (2, 3072)
            b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89T" + pixels.nbytes.to_bytes(4, "little") + pixels.tobytes() + b"tb",
        ]
    )
    raw = b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x07K\x03eu."
    images, labels = data.read_cifar_batch(raw, "data_batch_1")
    assert np.array_equal(images.reshape(2, -1), pixels) and labels.tolist() == [7, 3]


def write_npz(path, n, **changes):
    path.parent.mkdir(exist_ok=True)
    images = np.arange(n * 3072, dtype=np.uint8).reshape(n, 32, 32, 3)
    arrays = {"x_train": images, "y_train": np.arange(n)} | changes
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    return images


def test_npz_part_is_read_with_a_warning_and_after_the_whole(tmp_path, cifar10):
    images = write_npz(tmp_path / "cifar10" / "part.npz", 3)
    with pytest.warns(UserWarning, match=r"part\.npz: holds 3 of the 50,000 train images"):
        x, y = data.load("cifar10", "train", tmp_path)
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), images) and y.tolist() == [0, 1, 2]
    write_cifar(tmp_path / "cifar10" / "cifar-10-python.tar.gz", cifar10[1])
    assert len(data.load("cifar10", "train", tmp_path)[0]) == 5


def test_damaged_npz_files_are_named(tmp_path):
    path = tmp_path / "cifar10" / "part.npz"
    write_npz(path, 3)
    raw = path.read_bytes()
    for damaged in (b"", raw[:10], raw[: len(raw) // 2], raw.replace(b"y_train", b"z_train")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"part\.npz: expected arrays x_train and y_train"):
            data.load("cifar10", "train", tmp_path)
    objects = np.array([print, 1, 2], dtype=object)
    for changes in ({"y_train": objects}, {"y_train": np.arange(2)}, {"x_train": np.zeros(3)}):
        write_npz(path, 3, **changes)
        with pytest.raises(ValueError, match=r"part\.npz: expected"):
            data.load("cifar10", "train", tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_pickled_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"refused posix\.system"):
        data.read_cifar_batch(pickle.dumps({"data": Evil(), "labels": []}), "data_batch_1")
    assert not (tmp_path / "owned").exists()


def test_svhn(tmp_path):
    from scipy.io import savemat

    (tmp_path / "svhn").mkdir()
    pixels = np.arange(32 * 32 * 3 * 2, dtype=np.uint8).reshape(32, 32, 3, 2)
    savemat(tmp_path / "svhn" / "train_32x32.mat", {"X": pixels, "y": np.array([[10], [3]])})
    x, y = data.load("svhn", "train", tmp_path)
    assert x.shape == (2, 3, 32, 32) and y.tolist() == [0, 3]
    assert int(x[1, 2, 5, 7]) == pixels[5, 7, 2, 1]
    (tmp_path / "svhn" / "test_32x32.mat").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not an SVHN file"):
        data.load("svhn", "test", tmp_path)
    for images, labels in ((pixels, np.ones((3, 1))), (pixels.astype(float), np.ones((2, 1)))):
        savemat(tmp_path / "svhn" / "test_32x32.mat", {"X": images, "y": labels})
        with pytest.raises(ValueError, match=r"test_32x32\.mat: .* do not fit"):
            data.load("svhn", "test", tmp_path)


def test_digits():
    x, y = data.load("digits")
    assert x.shape == (1437, 1, 8, 8) and int(x.max()) == 255 and y.unique().numel() == 10
    assert len(data.load("digits", "test")[0]) == 360


def test_missing_files_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"TWOPHASE_DATA .* mnist/train-images"):
        data.load("mnist", "train", tmp_path, download=False)

    def no_network(*_, **__):
        raise ConnectionError("unreachable")

    monkeypatch.setattr("pooch.retrieve", no_network)
    for name, file in (("svhn", "train_32x32.mat"), ("cifar10", "cifar-10-python.tar.gz")):
        with pytest.raises(FileNotFoundError, match=rf"TWOPHASE_DATA .*{file}.*no network\?"):
            data.load(name, "train", tmp_path)
    with pytest.raises(ValueError, match="name: expected one of"):
        data.load("imagenet")
    with pytest.raises(ValueError, match="split: expected"):
        data.load("digits", "validation")


def test_downloads_are_verified_and_kept(tmp_path, monkeypatch, small):
    """pooch itself, fetching from a local file: the wrong checksum first, then the right one."""
    write_mnist(tmp_path / "server", *small)
    url = (tmp_path / "server").as_uri() + "/"
    sums = [
        hashlib.sha256((tmp_path / "server" / file).read_bytes()).hexdigest()
        for file in data._IDX.values()
    ]
    root = tmp_path / "root"
    monkeypatch.setattr("pooch.core.choose_downloader", lambda *_, **__: copy_local)
    monkeypatch.setitem(data._IDX_SETS, "kmnist", (url, ("0" * 64,) * 4))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: damaged download"):
        data.load("kmnist", "train", root)
    assert not list(root.rglob("*.gz"))
    monkeypatch.setitem(data._IDX_SETS, "kmnist", (url, tuple(sums)))
    x, _ = data.load("kmnist", "train", root)
    assert np.array_equal(x[:, 0].numpy(), small[0])
    monkeypatch.setattr("pooch.retrieve", None)  # the second time nothing is fetched
    assert torch.equal(data.load("kmnist", "train", root)[0], x)


def copy_local(url, output_file, _):
    Path(output_file).write_bytes(Path(urlsplit(url).path).read_bytes())


def test_root_then_environment_then_cache(tmp_path, monkeypatch, small):
    images, labels = small
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TWOPHASE_DATA", str(tmp_path / "named"))
    for i, folder in enumerate(("cache/twophase", "named", "root"), start=1):
        write_mnist(tmp_path / folder / "mnist", images, np.full_like(labels, i))
        root = tmp_path / "root" if folder == "root" else None
        assert set(data.load("mnist", "train", root)[1].tolist()) == {i}


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_files(data_dir, name):
    x, y = data.load(name, "train", data_dir)
    assert x.shape == (60_000, 1, 28, 28) and y.bincount().min() > 5000
    assert data.load(name, "test", data_dir)[0].shape == (10_000, 1, 28, 28)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:.*holds .* images")
def test_real_cifar10(data_dir):
    if not (data_dir / "cifar10").is_dir():
        pytest.skip("TWOPHASE_DATA holds no cifar10")
    x, y = data.load("cifar10", "train", data_dir)
    assert x.shape == (len(y), 3, 32, 32) and y.unique().tolist() == list(range(10))
