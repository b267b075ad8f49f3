"""The inputs that are verified: checked, in batches, and compared with each other."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arrays import as_data, require_finite
from .groups import groups_of, repeated
from .probing import require_module


def checked_inputs(x: Any) -> Tensor:
    """The argument x as a tensor [n, ...]; ValueError where it is empty or not finite."""
    x = as_data(x, name="x")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError("x: the data set is empty")
    require_finite(x, "x", "input")
    return x


def first_parameter(model: nn.Module) -> nn.Parameter:
    """A floating-point parameter, which tells the model's device and dtype.

    ValueError where there is none, or where they are of several types: what such a model is fed,
    and how far it rounds, cannot be told from its parameters.
    """
    require_module(model)
    found = [p for p in model.parameters() if p.is_floating_point()]
    if not found:
        raise ValueError("model: expected floating-point parameters, found none")
    kinds = sorted({str(p.dtype) for p in found})
    if len(kinds) > 1:
        raise ValueError(
            f"model: expected parameters of one floating-point type, got {', '.join(kinds)}; "
            "convert it (model.float())"
        )
    return found[0]


def as_example(x: Tensor, parameter: nn.Parameter) -> Tensor:
    """Two samples on the model's device, in its dtype unless they are indices (tokens)."""
    part = x[:2].to(parameter.device)
    floating = part.is_floating_point() or part.dtype == torch.uint8
    return part.to(parameter.dtype) if floating else part


def batches(x: Tensor, parameter: nn.Parameter) -> Iterator[tuple[Tensor, None]]:
    """(inputs as the model is fed, None): on its device; uint8 becomes k / 255 in its dtype."""
    for start in range(0, len(x), 256):
        part = x[start : start + 256].to(parameter.device)
        if part.dtype == torch.uint8:
            part = part.to(parameter.dtype) / 255
        elif part.dtype == torch.float64 and parameter.is_floating_point():
            part = part.to(parameter.dtype)  # all that the model can be fed
        yield part, None


def identical_rows(rows: Tensor) -> list[list[int]]:
    """Groups of indices of exactly equal rows, those of two or more; ValueError as `groups_of`."""
    return repeated(groups_of(rows))
