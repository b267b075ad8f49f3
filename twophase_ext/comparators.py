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

from .losses import CROSS_ENTROPY, SQUARED_ERROR, ConvexLoss

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]

ROWS = 3000  # of M at most, for an eigendecomposition of M M^T: seconds
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

    A logit errs by at most (m + 2) u ||[h_i, 1]|| ||[w_j, b_j]||. For a loss of the user's own the
    error of its logits is bounded to first order, by the gradients there.
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
        with torch.enable_grad():
            outputs.requires_grad_()
            value = loss(outputs, y)
            (delta,) = torch.autograd.grad(value, outputs)
        logit = unit * (h.square().sum(1) + 1).sqrt()
        if loss is CROSS_ENTROPY:
            error = 2 * float(logit.sum())
        else:
            slope = (delta * len(h)).abs().sum(1)
            square = outputs.shape[1] * loss.smoothness / 2 * logit.square()
            error = float((slope * logit + square).sum())
        values.append(float(value.detach()) * len(h))
        errors.append(error)
        n += len(h)
    mean = math.fsum(values) / n
    whole = float(weight.square().sum()) + (float(bias.square().sum()) if ones else 0.0)
    return (mean + math.fsum(errors) / n + l2 / 2 * whole) * (1 + 1e-12) + 1e-300


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
) -> list[Comparator]:
    """Comparators for the bounds L(v) + f ||v - w^tau||^2, f in `distances`.

    weight [k, m], bias [k] or None: w^tau; ones: whether the bias moves. candidates: (name,
    weight, bias) of other v, tried with their displacements stretched too. Up to ROWS samples the
    ridge family is searched by one eigendecomposition of M M^T, and the v that is best for some f
    is evaluated; beyond, and for a loss of the user's own, the candidates are all.
    """
    w, b = weight.double(), None if bias is None else bias.double()

    def evaluated(name: str, by_weight: Tensor, by_bias: Tensor | None) -> Comparator:
        v, c = w + by_weight, b if b is None or by_bias is None else b + by_bias
        moved = float((v - w).square().sum())
        if c is not None and b is not None:
            moved += float((c - b).square().sum())
        value = last_layer_objective(blocks, v, c, loss, l2, ones)
        return Comparator(name, value, moved * (1 + 1e-12))

    found = [evaluated("w^tau", torch.zeros_like(w), None)]
    for name, other, *rest in candidates:
        by_weight = other.double() - w
        by_bias = rest[0].double() - b if rest and rest[0] is not None and ones else None
        for stretch in STRETCHES:
            title = name if stretch == 1 else f"{name}, {stretch:g} times as far"
            moved = None if by_bias is None else stretch * by_bias
            found.append(evaluated(title, stretch * by_weight, moved))
    if loss in (CROSS_ENTROPY, SQUARED_ERROR):
        for name, displacement in _ridge(blocks, w, b, loss, l2, ones, distances):
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
) -> Iterator[tuple[str, Tensor]]:
    """(name, displacement [k, p]) of the ridge solutions that are best for some distance.

    D = M^T (G + lambda)^-1 R with G = M M^T = Q diag(s) Q^T: the outputs move by
    Q s / (s + lambda) Q^T R, and ||D||^2 = sum s / (s + lambda)^2 |Q^T R|^2.
    """
    rows, n, width = [], 0, w.shape[1] + ones
    for h, y in blocks():
        n += len(h)
        if n > ROWS or 3 * 8 * n * width > BYTES:
            return
        rows.append((h.double(), y))
    h, y = (torch.cat([row[i] for row in rows]) for i in (0, 1))
    m = torch.cat([h, h.new_ones(n, 1)], 1) if ones else h
    start = F.linear(h, w, b)
    s, q = torch.linalg.eigh(m @ m.T)
    s = s.clamp_min(0)
    if not float(s[-1]) > 0:
        return
    if loss is CROSS_ENTROPY:
        classes = start.shape[1]
        wish = F.one_hot(y, classes).double() - 1 / classes
        aims = [(f"logits {c:.3g} (one-hot - 1/{classes})", c * wish) for c in SCALES]
        origin = start - start.mean(1, keepdim=True)
    else:
        y = y.double()
        aims, origin = [("targets", y)], start
    tried: list[tuple[float, float, str, Tensor]] = []
    for name, aim in aims:
        moved = q.T @ (aim - origin)
        for ridge in (*RIDGES, l2 * n / loss.smoothness / float(s[-1])):
            if ridge == 0:
                continue
            damp = s + ridge * float(s[-1])
            outputs = start + q @ (moved * (s / damp)[:, None])
            distance2 = float(((s / damp.square())[:, None] * moved.square()).sum())
            value = float(loss(outputs, y))
            # the L2 term is left to the exact evaluation, but for its size
            value += l2 / 2 * (math.sqrt(distance2) - float(w.norm())) ** 2
            alpha = moved / damp[:, None]
            tried.append((value, distance2, f"ridge {ridge:.0e}, {name}", alpha))
    values = torch.tensor([value for value, *_ in tried], dtype=torch.float64, device="cpu")
    squares = torch.tensor([square for _, square, *_ in tried], dtype=torch.float64, device="cpu")
    for i in sorted({int((values + f * squares).argmin()) for f in distances}):
        yield tried[i][2], (m.T @ (q @ tried[i][3])).T
