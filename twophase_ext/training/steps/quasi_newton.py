"""L-BFGS in the metric of a `Side`: the last layer's minimum over fixed features.

The two-loop recursion (Nocedal & Wright, Numerical Optimization, algorithm 7.4) with H^-1, scaled,
as the first guess of the inverse Hessian. Every displacement is kept with its image M D^T and every
gradient with its H^-1 g, so that an iteration costs one solve, one image and one gradient; outputs
along a line are linear, so that a line search costs no pass over the features.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .metric import Side, slopes

MEMORY = 12  # pairs that are kept
TOLD = 6  # of them, before the decrement says how far the minimum is
BEND, TRIES = 0.1, 12  # of a line search: |slope| at its end by that at its start; evaluations


class _Pair(NamedTuple):
    """A step s with its image; y, its change of the gradient; H^-1 y with its image."""

    step: Tensor
    image: Tensor
    change: Tensor
    lifted: Tensor
    lifted_image: Tensor
    product: float  # <s, y>


@dataclass
class Found:
    """Where the iterations ended.

    at: coordinates. value: the objective. decrement: half the squared Newton decrement, an estimate
    of how far the objective lies above its minimum; inf before there is one. squared: ||g||_F^2,
    with l2. iterations: made. ended: whether no further one could lower the objective.
    """

    at: Tensor
    value: float
    decrement: float
    squared: float
    iterations: int
    ended: bool


class QuasiNewton:
    """From coordinates of a side on; `run` makes iterations, and keeps what it has learnt."""

    def __init__(self, side: Side, at: Tensor) -> None:
        """One gradient is computed."""
        self.side, self.at = side, at
        self.pairs: deque[_Pair] = deque(maxlen=MEMORY)
        self.start = side.start_coordinates()
        self._look()

    def _look(self) -> None:
        """Outputs and gradient from the coordinates: what is added up along lines drifts."""
        side = self.side
        self.outputs = side.outputs_at(side.image(self.at))
        self.loss, self.gradient = side.covector(self.outputs, self.at)
        self.lifted = side.riesz(self.gradient)
        self.lifted_image = side.image(self.lifted)

    def squared(self) -> float:
        """||g||_F^2."""
        # coordinates of M^T rho are rho: a covector reads as the displacement that it is
        return self.side.dot(self.gradient, self.gradient, self.side.image(self.gradient))

    def value(self) -> float:
        """The objective."""
        l2 = self.side.l2
        if not l2:
            return self.loss
        whole = self.start + self.at
        return self.loss + l2 / 2 * self.side.dot(whole, whole, self.side.image(whole))

    def run(self, iterations: int, enough: Callable[[float, float, float], bool]) -> Found:
        """At most so many iterations; enough(value, decrement, ||g||^2 or inf) ends them."""
        side, made, ended = self.side, 0, False
        decrement, squared, value = math.inf, math.inf, self.value()
        while made < iterations and math.isfinite(self.loss):
            step, image = self._direction()
            slope = side.pair(self.gradient, step, image)
            if not slope < 0 and self.pairs:
                self.pairs.clear()
                continue
            decrement = max(-slope, 0.0) / 2 if len(self.pairs) >= TOLD else math.inf
            squared = self.squared() if side.l2 else math.inf
            if enough(value, decrement, squared):
                break
            if not slope < 0 or not self._move(step, image, slope):
                ended = not self.pairs
                if ended:
                    break
                self.pairs.clear()
                self._look()
                continue
            made += 1
            value = self.value()
        return Found(self.at, value, decrement, squared, made, ended)

    def _direction(self) -> tuple[Tensor, Tensor]:
        """Minus the approximate inverse Hessian times the gradient, with its image."""
        side = self.side
        g, h, image, factors = self.gradient, self.lifted, self.lifted_image, []
        for pair in reversed(self.pairs):
            factor = side.pair(g, pair.step, pair.image) / pair.product
            g, h = g - factor * pair.change, h - factor * pair.lifted
            image = image - factor * pair.lifted_image
            factors.append(factor)
        scale = 1 / side.curvature
        if self.pairs:
            last = self.pairs[-1]
            scale = last.product / side.pair(last.change, last.lifted, last.lifted_image)
        h, image = scale * h, scale * image
        for pair, factor in zip(self.pairs, reversed(factors), strict=True):
            rest = factor - side.pair(pair.change, h, image) / pair.product
            h, image = h + rest * pair.step, image + rest * pair.image
        return -h, -image

    def _move(self, step: Tensor, image: Tensor, slope: float) -> bool:
        """A line search along the step; whether the objective came down."""
        side = self.side
        moved = image[: side.n]
        along = side.l2 * side.dot(self.start + self.at, step, image) if side.l2 else 0.0
        square = side.l2 * side.dot(step, step, image) if side.l2 else 0.0

        def look(length: float) -> tuple[float, float]:
            total, delta, _ = slopes(side.loss, self.outputs + length * moved, side.y)
            change = length * along + length * length / 2 * square
            turn = float((delta * moved).sum()) / side.n + along + length * square
            return total / side.n + change, turn

        length = line_search(look, self.loss, slope)
        if length == 0:
            return False
        before = self.gradient, self.lifted, self.lifted_image
        self.at = self.at + length * step
        self.outputs = self.outputs + length * moved
        self.loss, self.gradient = side.covector(self.outputs, self.at)
        self.lifted = side.riesz(self.gradient)
        self.lifted_image = side.image(self.lifted)
        now = self.gradient, self.lifted, self.lifted_image
        change, lifted, lifted_image = (b - a for a, b in zip(before, now, strict=True))
        s, si = length * step, length * image
        product = side.pair(change, s, si)
        if product > 0 and side.pair(change, lifted, lifted_image) > 0:
            self.pairs.append(_Pair(s, si, change, lifted, lifted_image, product))
        return True


def line_search(look: Callable[[float], tuple[float, float]], value: float, slope: float) -> float:
    """A length > 0 of a convex function's line at which its slope is small; 0 where none is lower.

    look: length -> (value, slope), slope at 0 < 0. The slope rises along the line: its root is
    bracketed, from 1 on, and looked for by regula falsi with halving (Illinois).
    """
    low, low_slope, high, high_slope, length = 0.0, slope, math.inf, math.inf, 1.0
    best, best_value = 0.0, value
    for _ in range(TRIES):
        now, turn = look(length)
        if now < best_value:  # NaN is not
            best, best_value = length, now
        if abs(turn) <= BEND * abs(slope) and best == length:
            break
        if turn < 0:
            low, low_slope = length, turn
            high_slope /= 2
        else:
            high, high_slope = length, turn
            low_slope /= 2
        if high == math.inf:
            grown = low * low_slope / (slope - low_slope) if low_slope > slope else math.inf
            length = min(max(low + grown, 1.5 * low), 8 * low)
        elif math.isfinite(high_slope) and high_slope > 0:
            length = low - low_slope * (high - low) / (high_slope - low_slope)
            length = min(max(length, low + 0.05 * (high - low)), high - 0.05 * (high - low))
        else:
            length = (low + high) / 2
    return best
