"""What the bounded features say that the model computes, and how far off its own may be."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..linalg.bounds import SLACK, UNIT_ROUNDOFF, gamma
from ..linalg.norms import frobenius_upper, norm_upper
from ..model.activations import SLOPE
from .problem import Problem

# The model's own float64 evaluation rounds as the bounded one does, in another order: twice its
# bound would do. Without bounds: networks that mix nothing agree to 1e-10 between batch sizes.
ERRORS, RELATIVE = 8, 1e-9
OWN_EPS = 256  # roundings of the model's own precision, relative to the sizes that enter


@dataclass
class Expected:
    """z and h of a batch, with how far from them the model's own may be, a number a sample.

    size: what rounding in another precision is relative to.
    """

    z: Tensor | None
    z_allowed: Tensor | None
    h: Tensor | None
    h_allowed: Tensor | None
    size: Tensor


class Reference:
    """What the bounded features say that the model computes, by row of M."""

    def __init__(self, problem: Problem, wide: nn.Linear | None) -> None:
        """Of the weights as they are in the copy. wide: the layer whose input is bounded.

        None: the bounded features are h itself.
        """
        found = problem.bounded
        if found is None:
            raise ValueError("problem: expected bounded features, got none yet")
        self.problem, self.wide = problem, wide
        self.z, self.error = found.z, found.error
        if wide is not None:
            self.weight = wide.weight.detach()
            own = wide.bias
            self.bias = self.weight.new_zeros(len(self.weight)) if own is None else own.detach()
            self.sizes = frobenius_upper(self.weight)
            self.shift = frobenius_upper(self.bias)

    @cached_property
    def norm(self) -> float:
        """A bound of ||W||_2."""
        return norm_upper(self.weight)

    def __call__(self, index: Tensor) -> Expected:
        """Of the rows `index`."""
        z, error = self.z[index], self.error[index]
        norms = z.norm(dim=1)
        allowed = ERRORS * error + 64 * UNIT_ROUNDOFF * norms
        if self.problem.narrowed:  # the model rounds to float32 what was bounded without
            allowed = allowed + OWN_EPS * self.problem.eps * (norms + norms.mean())
        if self.wide is None:
            return Expected(None, None, z, allowed, norms)
        d, m = z.shape[1], len(self.weight)
        h = self.problem.activation(torch.addmm(self.bias, z, self.weight.T))
        rounding = gamma(d + 2) * (self.sizes * norms + self.shift)
        # near its kink softplus errs by the size of its bend
        softplus = self.problem.network.wide
        bend = 1 / softplus.beta if softplus is not None else 1.0
        evaluation = 8 * UNIT_ROUNDOFF * (h.norm(dim=1) + math.sqrt(m) * bend)
        h_allowed = ERRORS * SLACK * SLOPE * (self.norm * error + rounding + evaluation)
        if self.problem.narrowed:
            h_allowed = h_allowed + SLOPE * self.norm * allowed
        size = h.norm(dim=1) + self.sizes * norms + self.shift
        return Expected(z, allowed, h, h_allowed, size)


class Stored:
    """Features that were computed without bounds: the model gives them again."""

    def __init__(self, h: Tensor, eps: float) -> None:
        """h [N, m_H], of the distinct inputs; eps: of the coarsest precision within the model."""
        self.h = h
        self.relative = max(RELATIVE, OWN_EPS * eps if eps > 1e-15 else 0.0)
        self.mean = float(h.norm(dim=1).mean())

    def __call__(self, index: Tensor) -> Expected:
        """Of the rows `index`."""
        h = self.h[index]
        size = h.norm(dim=1) + self.mean
        return Expected(None, None, h, self.relative * size, size)
