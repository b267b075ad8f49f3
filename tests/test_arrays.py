"""as_tensor: memory is shared where it can be, copied where it must be, refused clearly else."""

import warnings

import numpy as np
import pytest
import torch

from twophase_ext.core.arrays import as_tensor, require_finite

SUPPORTED = [
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]


class DLPackOnly:
    """An array of a library that torch does not know, as CuPy is: DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class CudaInterfaceOnly:
    """`__cuda_array_interface__` and nothing else, as Numba's device arrays."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__


def shares_memory(tensor: torch.Tensor, array: np.ndarray) -> bool:
    return tensor.data_ptr() == array.ctypes.data


def test_tensor_passes_through(device):
    x = torch.zeros(3, device=device, requires_grad=True)
    assert as_tensor(x, name="x") is x


@pytest.mark.parametrize("dtype", SUPPORTED)
def test_numpy_is_shared(dtype):
    a = np.ones((4, 3), dtype)
    x = as_tensor(a, name="x")
    assert shares_memory(x, a)
    assert str(x.dtype) == f"torch.{dtype}"
    x[1, 2] = 0
    assert a[1, 2] == 0


def test_strided_view_is_shared():
    a = np.arange(24.0).reshape(4, 6)
    x = as_tensor(a[1:, ::2], name="x")
    assert shares_memory(x, a[1:, ::2])
    assert x.stride() == (6, 2)
    assert np.array_equal(x.numpy(), a[1:, ::2])


def test_dlpack_is_shared():
    a = np.arange(6, dtype=np.float32)
    x = as_tensor(DLPackOnly(a), name="x")
    assert shares_memory(x, a)
    assert torch.equal(x, torch.arange(6, dtype=torch.float32))


def test_cuda_array_interface_is_shared(device):
    if device == "cpu":
        pytest.skip("a CUDA interface needs a CUDA device")
    source = torch.arange(6.0, device=device)
    x = as_tensor(CudaInterfaceOnly(source), name="x")
    assert x.data_ptr() == source.data_ptr()
    assert torch.equal(x, source)


def test_cupy_is_shared(device):
    cupy = pytest.importorskip("cupy")
    if device == "cpu":
        pytest.skip("CuPy needs a CUDA device")
    a = cupy.arange(6, dtype=cupy.float32)
    x = as_tensor(a, name="x")
    assert x.data_ptr() == a.data.ptr
    assert torch.equal(x.cpu(), torch.arange(6, dtype=torch.float32))


def test_read_only_is_copied_without_a_warning(tmp_path):
    a = np.arange(6.0)
    a.flags.writeable = False
    np.save(tmp_path / "a.npy", a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = as_tensor(a, name="x")
        mapped = as_tensor(np.load(tmp_path / "a.npy", mmap_mode="r"), name="x")
    assert not shares_memory(x, a)
    x.zero_()
    mapped.zero_()
    assert np.array_equal(a, np.arange(6.0))
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.arange(6.0))


def test_copy_on_write_map_is_shared(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6.0))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="c")
    assert shares_memory(as_tensor(mapped, name="x"), mapped)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4" if np.little_endian else "<f4"),
        np.arange(6.0)[::-1],
        np.zeros(5, dtype=[("a", "u1"), ("b", "f4")])["b"],
        np.float32(2.5),
        np.empty((0, 3)),
    ],
    ids=["byte order", "negative stride", "odd stride", "scalar", "empty"],
)
def test_unusual_arrays_keep_their_values(array):
    x = as_tensor(array, name="x")
    assert x.shape == array.shape
    assert np.array_equal(x.numpy(), array)
    assert x.numpy().dtype == array.dtype.newbyteorder("=")


def test_lists_are_copied():
    assert torch.equal(as_tensor([[1, 2], [3, 4]], name="y"), torch.tensor([[1, 2], [3, 4]]))
    assert as_tensor([0.5, 1], name="y").dtype == torch.float64
    assert as_tensor(3, name="y").shape == ()


def test_array_protocol_is_taken():
    class Frame:
        def __array__(self, dtype=None, copy=None):
            return np.eye(2)

    assert torch.equal(as_tensor(Frame(), name="x"), torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(2, np.uint16),
        np.zeros(2, np.uint32),
        np.zeros(2, np.uint64),
        np.zeros(2, np.longdouble),
        np.array([None, 1]),
        np.array(["a"]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, dtype=[("a", "f4")]),
        np.ma.masked_array([1.0, 2.0], [True, False]),
        DLPackOnly(np.array(["a"])),
        ["a", "b"],
        [None],
        "text",
        None,
        object(),
        {1: 2},
    ],
    ids=lambda v: f"{type(v).__name__} {getattr(v, 'dtype', '')}".strip(),
)
def test_unsupported_is_a_type_error_that_names_the_argument(value):
    with pytest.raises(TypeError, match=r"^images: "):
        as_tensor(value, name="images")


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (np.array([[1.0, True], [2.0, False]], dtype=object), r"pandas\.get_dummies"),
        (np.array(["cat", "dog"]), r"numpy\.unique\(labels, return_inverse=True\)\[1\]"),
    ],
)
def test_tables_of_several_types_and_text_are_told_what_to_do(value, advice):
    with pytest.raises(TypeError, match=rf"^y: arrays of dtype .*; .*{advice}"):
        as_tensor(value, name="y")


def test_ragged_list_is_a_value_error():
    with pytest.raises(ValueError, match=r"^labels: expected a rectangular list"):
        as_tensor([[1, 2], [3]], name="labels")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64])
def test_only_what_is_not_finite_is_refused(dtype):
    largest = torch.finfo(dtype).max
    x = torch.full((4, 3), largest, dtype=dtype)  # their sum is not finite
    require_finite(x, "x", "input")
    require_finite(x.neg(), "x", "input")
    for wrong in (float("nan"), float("inf"), -float("inf")):
        y = torch.zeros(4, 3, dtype=dtype)
        y[2, 1] = wrong
        with pytest.raises(ValueError, match="x: NaN or infinity in the input of sample 2"):
            require_finite(y, "x", "input")
    y[0, 0] = float("inf")  # infinities that cancel
    with pytest.raises(ValueError, match=r"of sample 0 \(2 such samples\)"):
        require_finite(y, "x", "input")
