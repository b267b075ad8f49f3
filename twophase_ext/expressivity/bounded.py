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

from ..linalg.bounds import SLACK, gamma

ULPS = 4  # of libm's functions
ARITHMETIC = (
    "float64 arithmetic rounds to nearest without flush-to-zero; matrix products are plain sums of "
    "products in some order"
)
LIBM = f"torch's float64 exp, erf and tanh err by at most {ULPS} units in the last place"
CONSTANTS = (
    "numbers that are computed of neither weights nor samples (position tables, distances) are "
    "constants of the network, as this machine computes them"
)
LIFTED = (
    "casts to float32 within the model are rounding, not part of the function: they are left out"
)
SOFTPLUS = "float64 softplus h errs by at most 8u|h| + 8u/beta (checked against mpmath)"
SMOOTH_MAX = (
    "the float64 smooth maximum y of k numbers errs by at most u|y| + (k + 16 + 12 log k) u/beta "
    "(checked against mpmath)"
)


class Unbounded(ValueError):
    """There is no bound of the rounding error; the message names the module or call and why."""


class Refused(Unbounded):
    """The model does, as it runs, what ends the proof, whether or not the result matters."""


class Lost(Unbounded):
    """An operator read numbers of which nothing is known; the message says why."""


class Disagrees(Unbounded):
    """The model computes something else than what was bounded; the message says where."""


@dataclass(frozen=True)
class BoundedFeatures:
    """Computed features z [n, d] and error [n] >= ||z_i - exact z_i||_2, float64.

    assumptions: what the bound rests on, in words. seconds: wall-clock time.
    """

    z: Tensor
    error: Tensor
    assumptions: list[str]
    seconds: float


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


def refuse(reason: str) -> Any:
    """Raise Unbounded."""
    raise Unbounded(reason)
