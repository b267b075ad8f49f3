"""Arrays of other libraries become tensors over the same memory."""

import warnings

import numpy as np
import pytest
import torch

from twophase_ext.arrays import as_tensor


def test_tensors_pass_through():
    x = torch.ones(3)
    assert as_tensor(x, name="x") is x


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8, np.bool_])
def test_numpy_is_not_copied(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    assert as_tensor(array, name="x").data_ptr() == array.ctypes.data
    assert as_tensor(array.T, name="x").data_ptr() == array.ctypes.data


class Foreign:
    """Another library's array: DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_dlpack_is_not_copied():
    array = np.arange(6.0)
    assert as_tensor(Foreign(array), name="x").data_ptr() == array.ctypes.data


def test_read_only_reversed_and_swapped_arrays_are_copied_silently():
    array = np.arange(4.0)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_tensor(array, name="x").tolist() == [0, 1, 2, 3]
        assert as_tensor(np.arange(4.0)[::-1], name="x").tolist() == [3, 2, 1, 0]
        assert as_tensor(np.arange(4, dtype=">f8"), name="x").tolist() == [0, 1, 2, 3]


def test_numbers_and_lists():
    assert as_tensor([[1, 2], [3, 4]], name="x").dtype == torch.int64
    assert as_tensor([0.5], name="x").dtype == torch.float64
    assert as_tensor(np.float32(2), name="x").shape == ()


@pytest.mark.parametrize("bad", [["a"], "text", object(), np.array([object()]), None, {1: 2}])
def test_unusable_things_are_named(bad):
    with pytest.raises(TypeError, match=r"^labels: "):
        as_tensor(bad, name="labels")


def test_cupy_is_not_copied():
    cupy = pytest.importorskip("cupy")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    array = cupy.arange(6.0)
    assert as_tensor(array, name="x").data_ptr() == array.data.ptr
