"""The bound of accelerated steps in a metric, over comparators.

For every last layer v, with H = M^T M / n + lambda I, A_t = t (t + 3) / 4 and R_v =
||v - w^tau||_H (training/steps/accelerated.py has the method, docs/theory.md the proof),
    L(x_t) <= L(v) + (L_ell / A_t) (R_v^2 / 2 + drift + pull R_v) + rise:
without rounding drift = pull = rise = 0, and the bound is at most 2 L_ell R_v^2 / (t + 1)^2.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.bounds import SLACK, UNIT_ROUNDOFF, gamma, plus
from ..model.losses import CROSS_ENTROPY, SQUARED_ERROR, ConvexLoss
from .comparators import Blocks, last_layer_objective
from .guarantee import Guarantee, refuted
from .loss_rounding import ASSUMED

Named = tuple[str, Tensor, Tensor | None]
U = UNIT_ROUNDOFF
OTHER = "the rounding of {} gradients in float64: at most 2^-40 (L_ell + their size)"


@dataclass(frozen=True)
class Point:
    """A measured point of the curve.

    steps: t. loss: the objective of the weights there. weight: A_t. drift, pull: rounding of the
    steps so far. rise: by how much the objective of the weights, rounded to their dtype, can lie
    above that of x_t.
    """

    steps: int
    loss: float
    weight: float
    drift: float
    pull: float
    rise: float

    def bound(self, curvature: float, value: float, distance2: float) -> float:
        """The right side for L(v) and R_v^2, rounded up."""
        if not self.steps:
            return math.inf
        terms = (distance2 / 2, self.drift, self.pull * math.sqrt(distance2))
        found = plus(value, curvature / self.weight * sum(terms) * (1 + 16 * U), self.rise)
        return math.inf if math.isnan(found) else found


@torch.no_grad()
def distance2(blocks: Blocks, moved: Tensor, damping: float, ones: bool, loss: ConvexLoss) -> float:
    """||D||_H^2 = ||M D^T||_F^2 / n + damping ||D||_F^2, rounded up; moved: D [k, p] float64.

    Rows of M by `row_scale` of the loss. An output errs by at most gamma_p ||M_i|| ||D_j||.
    """
    if not bool(moved.any()):
        return 0.0
    squares, norms, n = 0.0, 0.0, 0
    weight, bias = (moved[:, :-1], moved[:, -1]) if ones else (moved, None)
    for h, y in blocks():
        h, scale = h.double(), loss.row_scale(y)
        share = 1.0 if scale is None else scale.square()
        rows = torch.nn.functional.linear(h, weight, bias).square().sum(1)
        squares += float((rows * share).sum())
        norms += float(((h.square().sum(1) + ones) * share).sum())
        n += len(h)
    whole = float(moved.square().sum()) * SLACK + moved.numel() * 2.0**-1074
    off = gamma(moved.shape[1] + 2) * math.sqrt(norms * whole) * SLACK
    root = (math.sqrt(squares * SLACK) + off) * SLACK
    return (root * root / n + damping * whole) * SLACK


@torch.no_grad()
def accelerated_guarantee(
    blocks: Blocks,
    weight: Tensor,
    bias: Tensor | None,
    *,
    loss: ConvexLoss,
    mode: str,
    points: Sequence[Point],
    damping: float,
    l2: float,
    ones: bool,
    estimates: Iterable[tuple[float, float, str, Callable[[], Tensor]]],
    most: int,
    assumptions: Sequence[str],
    norm2: Callable[[Tensor], float] | None = None,
) -> Guarantee:
    """The bound at the points, the least over comparators.

    blocks: starts a pass over (h [b, m], targets). weight [k, m], bias [k]: w^tau; ones: whether
    the bias moves. damping: lambda, l2 / L_ell included. estimates: (L(v), R_v^2, name, a function
    that returns v - w^tau [k, p]) of comparators, not rounded: at most `most` of those that are
    best somewhere are evaluated, in float64 and rounded up, and so is w^tau. norm2: ||D||_H^2 of a
    D [k, p], rounded up, of another H than M^T M / n + lambda I.
    """
    result = Guarantee(mode=mode, assumptions=list(assumptions))
    if not loss.known:
        result.assumptions.append(
            f"{loss.name} is convex in the output with L_ell = {loss.smoothness:g}, as declared"
        )
    if loss not in (CROSS_ENTROPY, SQUARED_ERROR):
        result.assumptions += [
            f"the evaluation of {loss.name} in float64: {ASSUMED}",
            OTHER.format(loss.name),
        ]
    result.constants = {"L_ell": loss.smoothness, "lambda": damping, "l2": l2}
    w, b = weight.double(), None if bias is None else bias.double()
    family = [(last_layer_objective(blocks, w, b, loss, l2, ones), 0.0, "w^tau")]
    offered = list(estimates)
    chosen: list[int] = []
    for point in reversed(points):  # the last ones matter most
        values = [point.bound(loss.smoothness, value, square) for value, square, *_ in offered]
        best = min(range(len(values)), key=values.__getitem__, default=None)
        if best is not None and best not in chosen and len(chosen) < most:
            chosen.append(best)
    for i in chosen:
        _, _, name, displacement = offered[i]
        moved = displacement()
        v, c = (w + moved[:, :-1], b + moved[:, -1]) if ones and b is not None else (w + moved, b)
        back = [v - w] if c is None or b is None or not ones else [v - w, (c - b)[:, None]]
        moved = torch.cat(back, 1)  # of the very v that is evaluated, a rounding apart
        value = last_layer_objective(blocks, v, c, loss, l2, ones)
        square = norm2(moved) if norm2 else distance2(blocks, moved, damping, ones, loss)
        family.append((value, square * (1 + 8 * U), name))
    start = family[0][0]
    for point in points:
        row = {"steps": point.steps, "bound": start, "comparator": "w^tau", "loss": start}
        if point.steps:
            bound, at = min(
                (point.bound(loss.smoothness, value, square), i)
                for i, (value, square, _) in enumerate(family)
            )
            row |= {"bound": bound, "comparator": family[at][2], "loss": point.loss}
        result.curve.append(row)
    result.refuted = refuted(result.curve, start, torch.float64)
    return result
