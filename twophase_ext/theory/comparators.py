"""Comparators of the bounds in guarantee.py: last layers v with their objective and distance.

Any v gives a valid bound. Chosen are ridge solutions of the outputs that the loss would like: for
squared error the targets, whose ridge parameter -> 0 is Theorem 1's R, the displacement of least
norm; for cross-entropy scale * (one-hot - 1/k). Objective and distance of the very v that was
computed are evaluated in float64 and rounded up.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg.bounds import above, plus
from ..model.losses import CROSS_ENTROPY, SQUARED_ERROR, ConvexLoss
from .loss_rounding import rounding_of

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]

ROWS = 3000  # of the smaller of M M^T and M^T M at most, for an eigendecomposition: seconds
BYTES = 2 << 30  # of three copies of M in float64
SCALES = [0.25 * 2 ** (k / 2) for k in range(16)]  # of logits: 0.25 to 45
RIDGES = [10.0**-k for k in range(1, 13)]  # of the largest eigenvalue
STRETCHES = (1.0, 1.5, 2.0, 4.0)  # of a candidate's displacement
UNIT = 2.0**-53


@dataclass(frozen=True)
class Comparator:
    """A last layer v: its objective L(v) and ||v - w^tau||_F^2, both upper bounds."""

    name: str
    loss: float
    distance2: float


def last_layer_objective(
    blocks: Blocks,
    weight: Tensor,
    bias: Tensor | None,
    loss: ConvexLoss,
    l2: float = 0.0,
    ones: bool = True,
) -> float:
    """Mean loss + (l2 / 2) ||w||_F^2 of a last layer in float64, rounded up.

    A logit errs by at most (m + 2) u ||[h_i, 1]|| ||[w_j, b_j]||. The evaluation of cross-entropy
    errs by a few u of the logits and of the k terms of its sum; that of squared error, a sum of
    squares, by (k + 4) u of itself. For a loss of the user's own both errors are bounded to first
    order (loss_rounding.py).
    """
    weight = weight.double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    size = float((weight.square().sum(1) + bias.square()).sqrt().max())
    unit = (weight.shape[1] + 2) * UNIT * size * 1.01
    values, errors, n = [], [], 0
    for h, y in blocks():
        h = h.double()
        y = y.double() if y.is_floating_point() else y
        outputs = F.linear(h, weight, bias)
        b, k = outputs.shape
        logit = unit * (h.square().sum(1) + 1).sqrt()
        if loss is CROSS_ENTROPY:
            value = float(loss(outputs, y))
            # the differences of logits, their exponentials, the sum of k of them, its logarithm
            evaluation = 4 * UNIT * float(outputs.abs().amax(1).sum()) + 2 * (k + 8) * UNIT * b
            error = 2 * float(logit.sum()) + evaluation + (b + 8) * UNIT * abs(value) * b
        else:
            value, delta, evaluation = rounding_of(loss, outputs, y)
            slope = (delta * b).abs().sum(1)
            square = k * loss.smoothness / 2 * logit.square()
            error = float((slope * logit + square).sum()) + evaluation * b
        values.append(value * b)
        errors.append(error * (1 + 1e-9))
        n += b
    # each sum, of any sign, is rounded up; a product by n and a quotient by it add 2u of a value
    mean = above(above(math.fsum(values)) / n)
    size = math.fsum(map(abs, values)) / n
    numbers = weight.numel() + len(weight)
    whole = float(weight.square().sum()) + (float(bias.square().sum()) if ones else 0.0)
    whole *= l2 / 2 * (1 + (numbers + 8) * UNIT)
    return plus(mean, math.fsum(errors) / n, 4 * UNIT * size, whole, 1e-300)


def comparators(
    blocks: Blocks,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    loss: ConvexLoss,
    l2: float = 0.0,
    candidates: Sequence[tuple[Any, ...]] = (),
    ones: bool = True,
    distances: Sequence[float] = (1.0,),
    passes: float = math.inf,
) -> list[Comparator]:
    """Comparators for the bounds L(v) + f ||v - w^tau||^2, f in `distances`.

    weight [k, m], bias [k] or None: w^tau; ones: whether the bias moves. candidates: (name,
    weight, bias) of other v, tried with their displacements stretched too. Where M has up to ROWS
    rows or columns the ridge family is searched by one eigendecomposition of M M^T or M^T M, and
    the v that is best for some f is evaluated; beyond, and for a loss of the user's own, the
    candidates are all.
    passes: over the samples in float64 that all of this may cost; w^tau, the first, always one.
    """
    w, b = weight.double(), None if bias is None else bias.double()

    def evaluated(name: str, by_weight: Tensor, by_bias: Tensor | None) -> Comparator:
        v, c = w + by_weight, b if b is None or by_bias is None else b + by_bias
        parts = [v - w] if c is None or b is None else [v - w, c - b]
        moved = sum(float(part.square().sum()) for part in parts)
        numbers = sum(part.numel() for part in parts)
        if any(bool(part.any()) for part in parts):  # squares that vanish
            moved = moved * (1 + (numbers + 8) * UNIT) + numbers * 2.0**-1074
        value = last_layer_objective(blocks, v, c, loss, l2, ones)
        return Comparator(name, value, moved)

    found = [evaluated("w^tau", torch.zeros_like(w), None)]
    for stretch in STRETCHES:
        for name, other, *rest in candidates:
            if len(found) >= passes:
                break
            by_weight = other.double() - w
            by_bias = rest[0].double() - b if rest and rest[0] is not None and ones else None
            title = name if stretch == 1 else f"{name}, {stretch:g} times as far"
            moved = None if by_bias is None else stretch * by_bias
            found.append(evaluated(title, stretch * by_weight, moved))
    left = passes - len(found)
    if left > 0 and loss in (CROSS_ENTROPY, SQUARED_ERROR):
        for name, displacement in _ridge(blocks, w, b, loss, l2, ones, distances, left):
            by_bias = displacement[:, -1] if ones else None
            found.append(evaluated(name, displacement[:, : w.shape[1]], by_bias))
    return found


def _ridge(
    blocks: Blocks,
    w: Tensor,
    b: Tensor | None,
    loss: ConvexLoss,
    l2: float,
    ones: bool,
    distances: Sequence[float],
    passes: float,
) -> Iterator[tuple[str, Tensor]]:
    """(name, displacement [k, p]) of the ridge solutions that are best for some distance.

    D = M^T (G + lambda)^-1 R with G = M M^T = Q diag(s) Q^T: the outputs move by
    Q s / (s + lambda) Q^T R, and ||D||^2 = sum s / (s + lambda)^2 |Q^T R|^2. Where M has fewer
    columns than rows, D = V (s + lambda)^-1 V^T M^T R with M^T M = V diag(s) V^T: the outputs move
    by M D, and ||D||^2 = sum |V^T M^T R|^2 / (s + lambda)^2.
    """
    rows, n, width = [], 0, w.shape[1] + ones
    for h, y in blocks():
        n += len(h)
        if min(n, width) > ROWS or 3 * 8 * n * width > BYTES:
            return
        rows.append((h.double(), y))
    if _cost(n, width, len(w), loss) > passes:
        return
    h, y = (torch.cat([row[i] for row in rows]) for i in (0, 1))
    m = torch.cat([h, h.new_ones(n, 1)], 1) if ones else h
    start = F.linear(h, w, b)
    primal = width < n
    s, q = torch.linalg.eigh(m.T @ m if primal else m @ m.T)
    s = s.clamp_min(0)
    if not float(s[-1]) > 0:
        return
    outward = m @ q if primal else q * s  # what coefficients add to the outputs
    lengths = torch.ones_like(s) if primal else s
    if loss is CROSS_ENTROPY:
        classes = start.shape[1]
        wish = F.one_hot(y, classes).double() - 1 / classes
        aims = [(f"logits {c:.3g} (one-hot - 1/{classes})", c) for c in SCALES]
        origin = start - start.mean(1, keepdim=True)
    else:
        y = y.double()
        aims, wish, origin = [("targets", 1.0)], y, start
    inward = outward.T if primal else q.T
    towards, back = inward @ wish, inward @ origin
    tried: list[tuple[float, float, str, Tensor]] = []
    for ridge in (*RIDGES, l2 * n / loss.smoothness / float(s[-1])):
        if ridge == 0:
            continue
        damp = (s + ridge * float(s[-1]))[:, None]
        ahead, behind = outward @ (towards / damp), outward @ (back / damp)
        for name, scale in aims:
            coefficients = (scale * towards - back) / damp
            distance2 = float((lengths[:, None] * coefficients.square()).sum())
            value = float(loss(start + scale * ahead - behind, y))
            # the L2 term is left to the exact evaluation, but for its size
            value += l2 / 2 * (math.sqrt(distance2) - float(w.norm())) ** 2
            tried.append((value, distance2, f"ridge {ridge:.0e}, {name}", coefficients))
    values = torch.tensor([value for value, *_ in tried], dtype=torch.float64, device="cpu")
    squares = torch.tensor([square for _, square, *_ in tried], dtype=torch.float64, device="cpu")
    best = sorted({int((values + f * squares).argmin()) for f in distances})
    left = passes - _cost(n, width, len(w), loss)
    for i in best if len(best) <= left else best[: max(int(left), 1)]:
        moved = q @ tried[i][3]
        yield tried[i][2], (moved if primal else m.T @ moved).T


def _cost(n: int, width: int, outputs: int, loss: ConvexLoss) -> float:
    """Of the ridge family's search, in passes over the samples."""
    r, entries = min(n, width), n * outputs
    aims = len(SCALES) if loss is CROSS_ENTROPY else 1
    search = 2.0 * n * width * r + 25.0 * r**3 + len(RIDGES) * entries * (4 * r + 150 * aims)
    return search / (entries * (4 * width + 100))
