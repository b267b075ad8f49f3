"""The activation of the paper's networks as a module."""

from torch import Tensor, nn

from twophase_ext import ops

# The operator's own range: outside it beta * x or 1 / beta leaves float32.
BETA_MIN, BETA_MAX = 1e-30, 1e30


class Softplus(nn.Module):
    """log(1 + exp(beta x)) / beta, exact for every x (section 5.2 of the paper, its varsigma).

    `torch.nn.Softplus` returns x itself where beta x > 20: it is piecewise, hence not real
    analytic. This one has no threshold.

    beta: a finite number > 0 (1e-30 to 1e30). inplace: overwrite the input; only the output is
    kept for the backward pass. Input and output: a floating-point tensor of any shape.
    Raises TypeError for a beta that is not a number, ValueError for one out of range.
    """

    def __init__(self, beta: float = 100.0, inplace: bool = False) -> None:
        """See the class."""
        super().__init__()
        self.beta = checked_beta(beta)
        self.inplace = bool(inplace)

    def forward(self, x: Tensor) -> Tensor:
        """Softplus of x, elementwise."""
        return (ops.softplus_ if self.inplace else ops.softplus)(x, self.beta)

    def extra_repr(self) -> str:
        """The settings, as print(model) shows them."""
        return f"beta={self.beta:g}" + (", inplace=True" if self.inplace else "")


def checked_beta(beta: float) -> float:
    """`beta` as a float; TypeError where it is not a number, ValueError where out of range."""
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise TypeError(f"beta: expected a number, got {type(beta).__name__}")
    if not BETA_MIN <= beta <= BETA_MAX:
        raise ValueError(
            f"beta: expected a finite number > 0 ({BETA_MIN:g} to {BETA_MAX:g}), got {beta!r}"
        )
    return float(beta)
