"""The infimum of a sum of declared convex losses over one output vector, enclosed.

A box around the point found, in coordinates in which the Hessian there is about the identity: where
the tangent planes at the middles of its faces put the function above the value inside, on all of
each face, convexity leaves no minimiser outside, and the gradient inside bounds how far below the
value the minimum can lie. Nothing is said where the box fails: an infimum that is not attained
(logistic losses of one label), or a direction without curvature.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..linalg.bounds import UNIT_ROUNDOFF
from ..model.losses import ConvexLoss
from .loss_rounding import rounding_of

STEPS = 40  # of the minimisation
DAMPED = (1e-9, 1e-2, 1.0)  # least curvature that a Newton step believes, in the declared one
RADII = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of the box
FLAT = 1e-10  # curvature, relative to the largest, below which no box is tried
Evaluation = tuple[float, Tensor, float]  # value, gradient, bound of the value's error


def enclosed_infimum(loss: ConvexLoss, y: Tensor, c: Tensor, outputs: int) -> tuple[float, float]:
    """(lower, upper) of inf_q sum_i c_i l(q, y_i); lower is -inf where nothing is shown.

    y [m, ...] as the loss takes it; c [m] float64 >= 0. Assumed of the evaluation: what
    loss_rounding.py assumes, and as much of the gradient.
    """
    kinds, index = torch.unique(y, dim=0, return_inverse=True)
    weights = torch.zeros(len(kinds), dtype=torch.float64, device="cpu").index_add_(0, index, c)

    def evaluate(q: Tensor) -> Evaluation:
        found = [rounding_of(loss, q[None], kind[None]) for kind in kinds]
        pairs = list(zip(weights.tolist(), found, strict=True))
        value = math.fsum(w * v for w, (v, _, _) in pairs)
        gradient = torch.stack([w * g[0] for w, (_, g, _) in pairs]).sum(0)
        size = math.fsum(w * abs(v) for w, (v, _, _) in pairs)
        error = math.fsum(w * e for w, (_, _, e) in pairs) + 4 * UNIT_ROUNDOFF * size
        return value, gradient, error

    def hessian(q: Tensor) -> Tensor:
        parts = [
            w * torch.autograd.functional.hessian(lambda p, k=k: loss(p[None], k[None]), q)
            for w, k in zip(weights.tolist(), kinds, strict=True)
        ]
        return torch.stack(parts).sum(0)

    curvature = loss.smoothness * float(weights.sum())
    start = torch.zeros(outputs, dtype=torch.float64, device="cpu")
    q, value, error = _minimised(evaluate, hessian, start, curvature)
    lower = _below(evaluate, hessian(q), q, curvature)
    return lower, math.nextafter(value + error, math.inf)


def _minimised(
    evaluate: Callable[[Tensor], Evaluation],
    hessian: Callable[[Tensor], Tensor],
    q: Tensor,
    curvature: float,
) -> tuple[Tensor, float, float]:
    """The point that Newton steps of several dampings reach, its value and its error's bound.

    The last damping is a step that lowers every smooth function.
    """
    value, gradient, error = evaluate(q)
    for _ in range(STEPS):
        s, v = torch.linalg.eigh(hessian(q))
        tried = []
        for share in DAMPED:
            step = v @ ((v.T @ gradient) / s.clamp_min(share * curvature))
            step *= min(1.0, 100 / max(float(step.norm()), 1e-300))
            tried.append((evaluate(q - step), q - step))
        best, there = min(tried, key=lambda found: found[0][0])
        if not best[0] < value - error / 8:  # what is gained is rounding
            break
        q, (value, gradient, error) = there, best
    return q, value, error


def _below(
    evaluate: Callable[[Tensor], Evaluation], hessian: Tensor, q: Tensor, curvature: float
) -> float:
    """A lower bound of the function, from the smallest box that holds; -inf where none does."""
    s, v = torch.linalg.eigh(hessian)
    if not (float(s[-1]) > 0 and float(s[0]) > FLAT * float(s[-1])):
        return -math.inf
    frame = v / s.sqrt()  # its columns: directions along which the function rises by about z^2 / 2
    value, gradient, error = evaluate(q)
    best = -math.inf
    for radius in RADII:
        radius *= math.sqrt(max(abs(value), curvature * 1e-6))
        reach = radius * float(frame.norm())
        if all(
            _face(evaluate, q, frame, k, sign * radius, curvature) > value + error
            for k in range(len(q))
            for sign in (1, -1)
        ):
            tilt = radius * float((frame.T @ gradient).abs().sum())
            slack = reach * _of_gradient(gradient, q, curvature)
            best = max(best, value - error - (tilt + slack) * (1 + 1e-9))
    return best


def _face(
    evaluate: Callable[[Tensor], Evaluation],
    q: Tensor,
    frame: Tensor,
    k: int,
    distance: float,
    curvature: float,
) -> float:
    """A lower bound on the face whose middle is q + distance * (column k of the frame)."""
    middle = q + distance * frame[:, k]
    value, gradient, error = evaluate(middle)
    along = (frame.T @ gradient).abs()
    tilt = abs(distance) * float(along.sum() - along[k])
    reach = abs(distance) * float(frame.norm())
    placed = 4 * UNIT_ROUNDOFF * float(gradient.norm() * (q.norm() + middle.norm()))
    slack = reach * _of_gradient(gradient, middle, curvature) + placed
    return value - error - (tilt + slack) * (1 + 1e-9)


def _of_gradient(gradient: Tensor, q: Tensor, curvature: float) -> float:
    """What rounding may do to a gradient, and to products with it: 64 units of its parts."""
    return 64 * UNIT_ROUNDOFF * (float(gradient.norm()) + curvature * (1 + float(q.norm())))
