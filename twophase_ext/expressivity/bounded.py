"""A float64 value and a bound of its error, sample by sample.

For every sample one number is carried, error >= ||computed - exact||_2 over the sample's whole
activation. "Exact" is real arithmetic on the stored numbers: weights and buffers, and eps, slopes
and other scalars as the doubles they are.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..linalg.bounds import SLACK, UNDERFLOW, UNIT_ROUNDOFF, gamma

ULPS = 4  # of libm's functions
ARITHMETIC = (
    "float64 arithmetic rounds to nearest without flush-to-zero; matrix products are plain sums of "
    "products in some order"
)
LIBM = f"torch's float64 exp, erf and tanh err by at most {ULPS} units in the last place"
SOFTPLUS = "float64 softplus h errs by at most 8u|h| + 8u/beta (checked against mpmath)"


class Unbounded(ValueError):
    """There is no bound of the rounding error; the message names the module or call and why."""


class Disagrees(Unbounded):
    """The model computes something else than what was bounded; the message says where."""


@dataclass
class Bounded:
    """Computed activations [b, ...] (float64) and error [b] >= ||value_i - exact value_i||_2."""

    value: Tensor
    error: Tensor

    @cached_property
    def norm(self) -> Tensor:
        """Upper bounds of ||value_i||_2, [b]."""
        return sample_norms(self.value)

    @property
    def size(self) -> int:
        """Numbers of a sample."""
        return math.prod(self.value.shape[1:])


def sample_norms(value: Tensor) -> Tensor:
    """Upper bounds of ||value_i||_2 for value [b, ...] float64 with at least two dimensions."""
    size = math.prod(value.shape[1:])
    norms = torch.linalg.vector_norm(value, dim=tuple(range(1, value.dim())))
    # squares below 2^-1022 may vanish
    return (norms * (1 + gamma(size + 4)) + math.sqrt(size) * 2.0**-510) * SLACK


def exact(value: Tensor) -> Bounded:
    """A value without error."""
    return Bounded(value, value.new_zeros(len(value)))


def bounded(value: Tensor, *terms: Tensor | float) -> Bounded:
    """The value with the sum of the terms as its error, rounded up."""
    total = value.new_zeros(len(value))
    for term in terms:
        total = total + term
    return Bounded(value, total * SLACK + UNDERFLOW)


def rounded(value: Tensor, error: Tensor) -> Bounded:
    """A value whose entries were rounded once, or a few times: 4u covers both."""
    result = Bounded(value, error)
    result.error = error * SLACK + 4 * UNIT_ROUNDOFF * result.norm + UNDERFLOW
    return result


def refuse(reason: str) -> Any:
    """Raise Unbounded."""
    raise Unbounded(reason)


def constant(value: Any, shape: torch.Size, what: str) -> Tensor | float:
    """A scalar or a stored tensor that broadcasts to `shape`, in float64."""
    if isinstance(value, Tensor):
        if torch.broadcast_shapes(value.shape, shape) != shape:
            refuse(f"{what} changes the shape from {tuple(shape)}")
        return value.double()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return refuse(f"{what}: no rule for an operand of type {type(value).__name__}")
