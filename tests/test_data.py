"""Readers of the data sets' own formats, on files written here and on the real ones."""

import gzip
import io
import os
import pickle
import tarfile

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


def write_cifar(path, payload: dict[str, bytes]):
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as files:
        for name, raw in payload.items():
            member = tarfile.TarInfo(f"batches/{name}")
            member.size = len(raw)
            files.addfile(member, io.BytesIO(raw))


def test_cifar_archive(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 3072), np.uint8)
    batch = lambda rows, key: pickle.dumps({"data": pixels[rows], key: rows}, protocol=2)  # noqa: E731
    write_cifar(
        tmp_path / "cifar10" / "cifar-10-python.tar.gz",
        {
            "data_batch_2": batch([2], "labels"),
            "data_batch_1": batch([0, 1], "labels"),
            "test_batch": batch([3], "labels"),
            "readme.html": b"",
        },
    )
    x, y = data.load("cifar10", "train", tmp_path)
    assert x.shape == (3, 3, 32, 32) and y.tolist() == [0, 1, 2]
    assert np.array_equal(x.numpy().reshape(3, -1), pixels[:3])
    assert data.load("cifar10", "test", tmp_path)[1].tolist() == [3]
    write_cifar(
        tmp_path / "cifar100" / "cifar-100-python.tar.gz", {"train": batch([1, 0], "fine_labels")}
    )
    assert data.load("cifar100", "train", tmp_path)[1].tolist() == [1, 0]
    with pytest.raises(ValueError, match="holds no test batch"):
        data.load("cifar100", "test", tmp_path)


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


def test_digits():
    x, y = data.load("digits")
    assert x.shape == (1437, 1, 8, 8) and int(x.max()) == 255 and y.unique().numel() == 10
    assert len(data.load("digits", "test")[0]) == 360


def test_missing_files_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"TWOPHASE_DATA .* mnist/train-images"):
        data.load("mnist", "train", tmp_path, download=False)

    def no_network(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("pooch.retrieve", no_network)
    with pytest.raises(FileNotFoundError, match=r"TWOPHASE_DATA.*no network\?"):
        data.load("svhn", "train", tmp_path)
    with pytest.raises(ValueError, match="name: expected one of"):
        data.load("imagenet")
    with pytest.raises(ValueError, match="split: expected"):
        data.load("digits", "validation")


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_files(data_dir, name):
    x, y = data.load(name, "train", data_dir)
    assert x.shape == (60_000, 1, 28, 28) and y.bincount().min() > 5000
    assert data.load(name, "test", data_dir)[0].shape == (10_000, 1, 28, 28)


@pytest.mark.data
def test_real_cifar10_part(data_dir):
    x, y = data.load("cifar10", "train", data_dir)
    assert x.shape == (8068, 3, 32, 32) and y.unique().numel() == 10
