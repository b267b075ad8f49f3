"""The activation of the paper's networks."""

import math

from torch import Tensor, nn

from .. import ops


class Softplus(nn.Module):
    """log(1 + exp(beta x)) / beta, exact for every x (torch's is piecewise, hence not analytic).

    beta: the paper's varsigma, > 0. inplace: overwrite the input; only the output is kept for the
    backward pass. Raises ValueError for a beta that is not a finite number > 0.
    """

    def __init__(self, beta: float = 100.0, inplace: bool = False) -> None:
        """See the class."""
        super().__init__()
        if not (isinstance(beta, int | float) and math.isfinite(beta) and beta > 0):
            raise ValueError(f"beta: expected a finite number > 0, got {beta!r}")
        self.beta, self.inplace = float(beta), inplace

    def forward(self, x: Tensor) -> Tensor:
        """Softplus of x, elementwise."""
        return (ops.softplus_ if self.inplace else ops.softplus)(x, self.beta)

    def extra_repr(self) -> str:
        """The settings, for print(model)."""
        return f"beta={self.beta:g}" + (", inplace=True" if self.inplace else "")
