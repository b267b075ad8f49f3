"""Arrays of NumPy, CuPy and others as torch tensors, without a copy where memory can be shared."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# torch stores these too, but hardly computes with them: refused, not shared.
_STORED_ONLY = (torch.uint16, torch.uint32, torch.uint64)
_NUMPY_DTYPES = frozenset(
    np.dtype(name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)


def as_tensor(a: Any, *, name: str) -> Tensor:
    """`a` as a torch tensor.

    Returned as it is: a torch tensor. Shared, without a copy, on its own device: NumPy arrays and
    whatever offers `__dlpack__` or `__cuda_array_interface__` (CuPy, JAX, Numba). Copied: NumPy
    arrays that are read-only (torch has no read-only tensors, and an in-place operation would
    write into them; a memory map opened with mode "c" is shared), of foreign byte order, or with
    strides that torch lacks (negative ones); objects with `__array__` alone; nested lists of
    numbers (int64, float64, ...), and other sequences by their [:] (a column of Hugging Face's
    datasets).

    name: the argument's name, for the errors. Raises TypeError for what is no array or has a dtype
    that torch does not compute with (uint16, uint32, uint64, longdouble, object, strings),
    ValueError for a ragged list.
    """
    if isinstance(a, Tensor):
        if a.dtype in _STORED_ONLY:
            raise TypeError(f"{name}: {_no_arithmetic('tensors', str(a.dtype))}")
        return a
    if isinstance(a, np.ndarray | np.generic):
        return _from_numpy(a, name)
    if hasattr(a, "__dlpack__"):
        return _shared(torch.from_dlpack, a, name)
    if hasattr(a, "__cuda_array_interface__"):
        return _shared(torch.as_tensor, a, name)
    if hasattr(a, "__array__"):
        return _from_numpy(np.asarray(a), name)
    if isinstance(a, list | tuple | int | float | complex):
        return _from_numbers(a, name)
    if isinstance(a, Sequence) and not isinstance(a, str | bytes):
        whole = a[:]
        return (
            _from_numbers(list(a), name) if type(whole) is type(a) else as_tensor(whole, name=name)
        )
    raise TypeError(f"{name}: expected a tensor, an array or numbers, got {type(a).__name__}")


def as_data(a: Any, *, name: str) -> Tensor:
    """`as_tensor` of data, which no gradient reaches.

    A tensor with a graph is detached. One that was made under torch.inference_mode has no version
    counter and cannot enter a graph: it is copied where it is used outside. Raises TypeError too
    for a tensor that is sparse, nested or quantized, of the meta device or in eight bits.
    """
    found = as_tensor(a, name=name)
    if why := _no_numbers(found):
        raise TypeError(f"{name}: expected a dense tensor with data, got {why}")
    found = found.detach()
    if found._is_zerotensor():  # of autograd's: it has no memory
        found = torch.zeros(found.shape, dtype=found.dtype, device=found.device)
    if found.is_inference() and not torch.is_inference_mode_enabled():
        return found.clone()
    return found


def _no_numbers(t: Tensor) -> str:
    """What keeps a tensor from being read as an array of numbers, and the way out; or ""."""
    if t.is_nested:
        return "a nested tensor; pad it (torch.nested.to_padded_tensor)"
    if t.layout is not torch.strided:
        return f"a tensor in the layout {t.layout}; use x.to_dense()"
    if t.is_quantized:
        return f"a quantized tensor ({t.dtype}); use x.dequantize()"
    if t.is_meta:
        return "a meta tensor"
    if t.is_floating_point() and t.element_size() == 1:
        return f"a tensor of {t.dtype}, in which torch does not compute; use x.float()"
    return ""


def require_finite(x: Tensor, name: str, what: str, indices: list[int] | None = None) -> None:
    """Raise ValueError that names the first sample with a NaN or an infinity.

    x: [n, ...]; what: "input" or "target", for the message. indices: the samples' numbers where x
    holds only some of them.
    """
    if not (x.is_floating_point() or x.is_complex()):
        return
    # NaN and infinity reach every sum: a finite one, at a fraction of the cost, has none of them.
    if bool(x.sum().isfinite()):
        return
    finite = torch.isfinite(x.flatten(1) if x.dim() > 1 else x[:, None]).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        sample = indices[bad[0]] if indices else bad[0]
        raise ValueError(
            f"{name}: NaN or infinity in the {what} of sample {sample} ({len(bad)} such samples)"
        )


def sample_weights(
    weights: Any,
    n: int,
    name: str,
    dtype: torch.dtype = torch.float64,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Weights of n samples, or of their tokens or pixels: float64 [n, ...] on the CPU.

    Raises TypeError for complex ones, ValueError where they are of another shape, negative, not
    finite, or above 0 and not so in `dtype`; indices: the samples' numbers where n is some of them.
    """
    c = as_data(weights, name=name).cpu()
    if c.is_complex():
        raise TypeError(f"{name}: expected real weights, got {c.dtype}")
    if c.dim() == 0 or len(c) != n:
        raise ValueError(f"{name}: expected {n} weights, one a sample, got {list(c.shape)}")
    require_finite(c, name, "weight", None if indices is None else list(indices))
    c = c.double()
    there = c.to(dtype)
    wrong = (c < 0) | ~there.isfinite() | ((c > 0) & (there == 0))
    if bool(wrong.any()):
        i, *_ = wrong.nonzero()[0].tolist()
        value = float(c[wrong][0])
        raise ValueError(
            f"{name}: expected weights >= 0 within {dtype}'s range, got {value:g} at sample "
            f"{i if indices is None else indices[i]}"
        )
    return c


_NO_NUMBERS = {  # by NumPy's kind
    "O": "; a table whose columns are of several types comes as objects: make all of them one type "
    "of number first, pandas.get_dummies(frame, dtype=float) or frame.astype(float)",
    "U": "; text has to be numbered first, as labels are by "
    "numpy.unique(labels, return_inverse=True)[1]",
}


def _from_numpy(a: np.ndarray | np.generic, name: str) -> Tensor:
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{name}: masked arrays are not supported; fill the masked entries first")
    array = np.asarray(a)
    native = array.dtype.newbyteorder("=")
    if native not in _NUMPY_DTYPES:
        if native.kind == "u":
            raise TypeError(f"{name}: {_no_arithmetic('arrays', str(array.dtype))}")
        why = _NO_NUMBERS.get(native.kind, "")
        raise TypeError(f"{name}: arrays of dtype {array.dtype} are not supported{why}")
    shareable = array.flags.writeable and array.dtype.isnative
    strides_fit = all(s >= 0 and s % array.itemsize == 0 for s in array.strides)
    if not (shareable and strides_fit):
        array = np.array(array, dtype=native, order="C")
    return torch.from_numpy(array)


def _no_arithmetic(what: str, dtype: str) -> str:
    return (
        f"{what} of dtype {dtype} are not supported; convert measurements to float32 (scaled as "
        "the model expects them), labels and token numbers to int64"
    )


def _shared(convert: Callable[[Any], Tensor], a: Any, name: str) -> Tensor:
    try:
        return convert(a)
    # the producer decides which of these it raises for what it cannot share
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        kind = f"{type(a).__module__}.{type(a).__name__}"
        raise TypeError(f"{name}: torch cannot share the memory of this {kind}: {error}") from error


def _from_numbers(a: Any, name: str) -> Tensor:
    try:
        array = np.array(a)
    except ValueError as error:
        raise ValueError(f"{name}: expected a rectangular list of numbers: {error}") from error
    except TypeError as error:
        raise TypeError(f"{name}: expected numbers: {error}") from error
    return _from_numpy(array, name)
