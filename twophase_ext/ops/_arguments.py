"""Checks of arguments that the operators share, made before the compiled code sees anything."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor


def require_tensor(value: Any, name: str, *, written: bool = False) -> None:
    """Raise TypeError unless `value` is a dense torch.Tensor.

    written: ValueError also for a tensor whose memory holds the negated numbers (a lazy view, such
    as the imaginary part of a conjugate), which an operator cannot update in place.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    # under torch.compile a bit of a tensor cannot be asked for
    if written and not torch.compiler.is_compiling() and value.is_neg():
        raise ValueError(f"{name}: expected a tensor that can be written, got a negated view")


def require_device(value: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Raise ValueError unless both lie on one device."""
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected the device of {like_name}, {like.device}, got {value.device}"
        )


def number(value: Any, name: str) -> float:
    """`value`, a real number or a tensor of one element, as a float.

    Raises TypeError where it is none, ValueError where it is too large.
    """
    if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: expected a number in float64's range, got {value}") from error


def numbers(**values: Any) -> list[float]:
    """Each value as `number` makes it, in the order given."""
    return [number(value, name) for name, value in values.items()]


def require_last_layer(
    weight: Any, bias: Any, weight_buffer: Any, bias_buffer: Any, **others: Any
) -> None:
    """The checks above for what an operator of the last layer takes; None only where optional."""
    require_tensor(weight, "weight", written=True)
    optional = {"bias": bias, "weight_buffer": weight_buffer, "bias_buffer": bias_buffer}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in (given | others).items():
        require_tensor(tensor, name, written=name in given)
        if name != "order":  # indices stay on the CPU
            require_device(tensor, name, weight, "weight")
