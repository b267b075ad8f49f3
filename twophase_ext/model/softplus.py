"""The activation of the paper's networks as a module."""

import torch
from torch import Tensor, nn

from twophase_ext import ops

# The operator's own range: outside it beta * x or 1 / beta leaves float32.
BETA_MIN, BETA_MAX = 1e-30, 1e30


class Softplus(nn.Module):
    """log(1 + exp(beta x)) / beta, exact for every x (section 5.2 of the paper, its varsigma).

    `torch.nn.Softplus` returns x itself where beta x > 20: it is piecewise, hence not real
    analytic. This one has no threshold.

    beta: a finite number > 0 (1e-30 to 1e30). inplace: overwrite the input. Input and output: a
    floating-point tensor of any shape. Only the output is kept for the backward pass, as by
    nn.ReLU: an operation in place after it has to stay away, or give it keeps_copy=True, which
    keeps a copy (at one more pass and tensor), as little disturbed as nn.Hardswish and its kind.
    Raises TypeError for a beta that is not a number, ValueError for one out of range.
    """

    keeps_copy = False  # of modules that were saved before there was one

    def __init__(
        self, beta: float = 100.0, inplace: bool = False, *, keeps_copy: bool = False
    ) -> None:
        """See the class."""
        super().__init__()
        self.beta = checked_beta(beta)
        self.inplace = bool(inplace)
        self.keeps_copy = bool(keeps_copy)

    def forward(self, x: Tensor) -> Tensor:
        """Softplus of x, elementwise."""
        if self.keeps_copy and torch.is_grad_enabled():
            y = ops.softplus(x, self.beta)
            return x.copy_(y) if self.inplace else y.clone()
        return (ops.softplus_ if self.inplace else ops.softplus)(x, self.beta)

    def extra_repr(self) -> str:
        """The settings, as print(model) shows them."""
        return f"beta={float(self.beta):g}" + (", inplace=True" if self.inplace else "")


def checked_beta(beta: float) -> float:
    """`beta` as a float; TypeError where it is not a number, ValueError where out of range."""
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise TypeError(f"beta: expected a number, got {type(beta).__name__}")
    if not BETA_MIN <= beta <= BETA_MAX:
        raise ValueError(
            f"beta: expected a finite number > 0 ({BETA_MIN:g} to {BETA_MAX:g}), got {beta!r}"
        )
    return float(beta)
