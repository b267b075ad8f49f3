"""Arrays of other libraries as torch tensors, without a copy where the memory can be shared."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(array: Any, *, name: str) -> Tensor:
    """`array` as a tensor over the same memory.

    torch tensors pass through; NumPy arrays, CuPy arrays and anything else with DLPack share their
    memory. Copied instead: read-only or byte-swapped NumPy arrays, and lists of numbers. Raises
    TypeError that names the argument `name` for anything else.
    """
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ndarray):
        return _from_numpy(array, name)
    if hasattr(array, "__dlpack__"):
        try:
            return torch.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError) as error:
            raise TypeError(
                f"{name}: {type(array).__name__} could not be shared: {error}"
            ) from None
    if isinstance(array, list | tuple | int | float | np.generic):
        return _from_numpy(np.array(array), name)
    raise TypeError(f"{name}: expected a tensor or an array, got {type(array).__name__}")


def _from_numpy(array: np.ndarray, name: str) -> Tensor:
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise TypeError(f"{name}: arrays of dtype {array.dtype} are not supported") from None
