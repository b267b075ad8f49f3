"""Accelerated gradient in a metric H >= M^T M / n, its rounding bounded along the way.

With weights a_i = (i + 1) / 2 and A_i = a_1 + ... + a_i = i (i + 3) / 4 >= a_i^2:
    y_i = (A_{i-1} x_{i-1} + a_i z_{i-1}) / A_i,   s_i = H^-1 grad L(y_i) / L_ell,
    x_i = y_i - s_i,   z_i = z_{i-1} - a_i s_i,    x_0 = z_0 = w^tau
(Nesterov 1983, in the form of estimate sequences; A_t >= (t + 1)^2 / 4, t >= 1). docs/theory.md
proves, for what is computed in the place of these and every v,
    L(x_t) - L(v) <= (L_ell / A_t) (||v - w^tau||_H^2 / 2 + drift + pull ||v - w^tau||_H),
drift and pull being sums over the steps of bounds of their errors in ||.||_H.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

from ...linalg.bounds import UNIT_ROUNDOFF
from .metric import Side

UP = 1 + 2.0**-30  # covers the rounding of a step's few sums


def weight_of(steps: int) -> float:
    """A_t."""
    return steps * (steps + 3) / 4


@dataclass
class Iterate:
    """Where the method stands: x and z in the coordinates of a `Side`, after so many steps.

    drift, pull: the sums above; reach: a bound of ||z - w^tau||_H.
    """

    x: Tensor
    z: Tensor
    steps: int = 0
    drift: float = 0.0
    pull: float = 0.0
    reach: float = field(default=0.0)

    def advance(self, side: Side) -> float:
        """One step; the mean loss at the point y where its gradient is taken."""
        i = self.steps + 1
        a, whole, smooth = (i + 1) / 2, weight_of(i), side.curvature
        y = self.x + (a / whole) * (self.z - self.x)
        slope = side.slope(y)
        if not math.isfinite(slope.loss):
            return slope.loss
        found = side.solve(slope.rhs)
        unit = 4 * UNIT_ROUNDOFF * side.size
        of_x, of_z, of_y, length = (float(t.norm()) for t in (self.x, self.z, y, found))
        direction = (slope.error + side.error(found, slope.rhs)) / smooth
        mixing = unit * (of_x + of_z)
        of_place = unit * (of_y + length / smooth)
        of_step = direction + of_place
        of_dual = a * direction + unit * (of_z + a * length / smooth)
        step = found / smooth
        self.x, self.z = y - step, self.z - found * (a / smooth)
        excess = side.excess(step, of_place)
        size = slope.size / smooth
        self.reach = (self.reach + a * size + of_dual) * UP
        terms = whole * size * mixing + whole / 2 * (of_step**2 + excess) + of_dual * self.reach
        self.drift = (self.drift + terms) * UP
        self.pull = (self.pull + of_dual) * UP
        self.steps = i
        return slope.loss
