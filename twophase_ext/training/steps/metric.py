"""The metric H = M^T M / n + lambda I of the last layer's steps, from the smaller side of M.

Where samples differ in curvature (weights of samples or classes), rows of M are sqrt(r_i) [h_i, 1]
and outputs sqrt(r_i) q_i, r_i of `row_scale`: as functions of these all losses have one L_ell, and
H >= M^T M / n is H >= sum_i r_i [h_i, 1]^T [h_i, 1] / n. Below they are M and the outputs.

A displacement D [k, p] of the last layer from w^tau is kept in coordinates: D itself where M =
[h_X, 1] has at most as many columns as rows, else the a [n, k] of D = a^T M, because H^-1 M^T =
M^T (M M^T / n + lambda I)^-1. Either way one Cholesky factorization of the smaller side, in
float64. All that rounding does is bounded in norm, so that H stands for exact numbers:
`Slope.error`, `error` and `size` say by how much a computed step is off in ||.||_H.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...core.memory import available_memory
from ...linalg.bounds import SLACK, UNIT_ROUNDOFF, gamma
from ...model.losses import CROSS_ENTROPY, SQUARED_ERROR, ConvexLoss
from ..data.samples import BATCH
from ..features.cache import Features

SHARE = 0.6  # of the memory that is free
PANEL = 256 << 20  # bytes of rows of M in float64
OTHER = 2.0**-40  # of a user's loss: what its float64 gradient may err by, assumed
U = UNIT_ROUNDOFF


class Slope(NamedTuple):
    """The gradient g of the objective at a point, in the metric.

    loss: the mean loss. rhs: what `solve` takes for H^-1 g, in coordinates. size: a bound of
    ||H^-1 g||_H. error: of ||H^-1 (g - computed g)||_H.
    """

    loss: float
    rhs: Tensor
    size: float
    error: float


def room(n: int, p: int, device: torch.device) -> tuple[int, int]:
    """Bytes that the smaller side's matrix, its factor and two panels take, and that are free."""
    return 24 * min(n, p) ** 2 + 2 * PANEL, int(SHARE * available_memory(device))


def slopes(
    loss: "ConvexLoss | ScaledLoss", outputs: Tensor, y: Tensor
) -> tuple[float, Tensor, float]:
    """(sum of the losses, their gradients by the outputs [b, k], bound of their rounding).

    outputs: float64. The bound is one of the Frobenius norm: of softmax, whose exponents err by a
    few u of the logits; of 2 (q - y), two roundings; for another loss OTHER is assumed.
    """
    b, k = outputs.shape
    if loss is CROSS_ENTROPY:
        # by columns: torch's softmax over a few neighbours is three times slower
        logs = torch.log_softmax(outputs.T.contiguous(), 0)
        value = -float(logs.gather(0, y[None]).sum())
        delta = logs.exp_()
        delta[y, torch.arange(b, device=y.device)] -= 1
        unit = (8 * float(outputs.abs().max()) + 4 * k + 32) * U
        return value, delta.T, unit * math.sqrt(b)
    y = y.double() if y.is_floating_point() else y
    if loss is SQUARED_ERROR:
        delta = outputs - y
        value = float(delta.square().sum())
        delta *= 2
        return value, delta, 4 * U * float(delta.norm())
    with torch.enable_grad():
        q = outputs.detach().clone().requires_grad_()
        total = loss(q, y) * b
        (delta,) = torch.autograd.grad(total, q)
    error = OTHER * (loss.smoothness * math.sqrt(b) + float(delta.norm()))
    return float(total.detach()), delta, error


@dataclass(frozen=True)
class ScaledLoss:
    """A loss as a function of outputs times sqrt(r_i); smoothness: its L_ell."""

    loss: ConvexLoss

    @property
    def smoothness(self) -> float:
        """That of the loss, by its definition of r_i."""
        return self.loss.smoothness

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch."""
        scale = self.loss.row_scale(y)
        return self.loss(outputs if scale is None else outputs / scale[:, None], y)


@dataclass(frozen=True)
class Problem:
    """What the last layer is trained on, and the metric asked for.

    start: w^tau, [weight] or [weight, bias] where the bias moves; layer: a bias that does not is
    taken from it. norms: ||[h_i, 1]||. damping: lambda in mean eigenvalues of the smaller side,
    trace(M^T M) / (n min(n, p)); None is H = L_H / L_ell I. smoothness: L_H without l2, then used.
    """

    features: Features
    start: list[Tensor]
    layer: nn.Linear
    loss: ConvexLoss
    norms: Tensor
    smoothness: float
    damping: float | None
    l2: float = 0.0


class Side:
    """What both sides of M share.

    damping: lambda, raised where rounding could leave the factorization without positive pivots;
    l2 / L_ell is added to it: L_ell H then bounds the whole objective's curvature.
    """

    def __init__(self, problem: Problem) -> None:
        """Nothing is factored yet."""
        self.features, self.l2 = problem.features, problem.l2
        self.n, layer = problem.features.n, problem.layer
        start = [part.detach().to(layer.weight.device).double() for part in problem.start]
        self.ones = len(start) > 1
        fixed = None if layer.bias is None or self.ones else layer.bias.detach().double()
        self.fixed = fixed
        self.k, width = start[0].shape
        self.p = width + self.ones
        self.curvature = problem.loss.smoothness
        self.loss: ConvexLoss | ScaledLoss = problem.loss
        norms = problem.norms
        if (scale := problem.loss.row_scale(self.y)) is not None:
            self.loss, norms = ScaledLoss(problem.loss), norms * scale.to(norms.device)
        self.trace = float(norms.square().sum()) * SLACK  # the one counts, fixed or not
        self.moving = torch.cat([part.view(self.k, -1) for part in start], 1)  # w^tau [k, p]
        own = self.moving if fixed is None else torch.cat([self.moving, fixed[:, None]], 1)
        self.length = float(own.norm()) * SLACK
        self.damping = problem.smoothness / self.curvature * SLACK + self.l2 / self.curvature
        if problem.damping is not None:
            self.damping = self.damped(problem.damping)

    def damped(self, damping: float) -> float:
        """lambda of a damping in mean eigenvalues."""
        mean = self.trace / (self.n * min(self.n, self.p))
        floor = 8 * gamma(self.n + self.p + 8) * self.trace / self.n * SLACK
        return max(damping * mean, floor) + self.l2 / self.curvature

    @property
    def largest(self) -> float:
        """A bound of ||H||."""
        return (self.trace / self.n + self.damping) * SLACK

    def refactor(self, damping: float) -> None:
        """Another lambda, in mean eigenvalues; ValueError where the factorization fails."""
        raise NotImplementedError

    def rows(self, size: int | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which, rows of M in float64, targets) of all samples; m until the next is asked for.

        size: None is all at once where they take no more than a panel, else BATCH.
        """
        if 8 * self.n * self.p > PANEL:
            yield from self._made(size or BATCH)
            return
        for start in range(0, self.n, size or self.n):
            here = slice(start, min(start + (size or self.n), self.n))
            yield here, self.whole[here], self.y[here]

    def _made(self, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """`rows` in one buffer: fresh memory for each costs more than what is done to it."""
        done, buffer = 0, torch.empty(0, device="cpu")
        for h, y in self.features.in_order(size):
            if len(buffer) < len(h):
                buffer = h.new_empty(len(h), self.p, dtype=torch.float64)
            m = buffer[: len(h)]
            m[:, : h.shape[1]] = h
            m[:, h.shape[1] :] = 1
            if (scale := self.scale(y)) is not None:
                m *= scale[:, None]
            yield slice(done, done + len(h)), m, y
            done += len(h)

    def scale(self, y: Tensor) -> Tensor | None:
        """sqrt(r_i) of the rows of M whose targets are y; None where there are none."""
        return self.loss.loss.row_scale(y) if isinstance(self.loss, ScaledLoss) else None

    @cached_property
    def whole(self) -> Tensor:
        """M in float64."""
        return torch.cat([m.clone() for _, m, _ in self._made(BATCH)])

    def logits(self, m: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        """Outputs of rows of M for the moving part of a last layer, a fixed bias added."""
        return self.shifted(m @ weight.T, y)

    def shifted(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Outputs with a fixed bias, sqrt(r_i) of it, where there is one; y: their targets."""
        if self.fixed is None:
            return outputs
        scale = self.scale(y)
        return outputs + (self.fixed if scale is None else scale[:, None] * self.fixed)

    @cached_property
    def y(self) -> Tensor:
        """The targets of all samples."""
        return self.features.targets

    def zeros(self) -> Tensor:
        """The coordinates of w^tau."""
        raise NotImplementedError

    def slope(self, at: Tensor) -> Slope:
        """The gradient at a point in coordinates."""
        raise NotImplementedError

    def solve(self, rhs: Tensor) -> Tensor:
        """H^-1 g in coordinates."""
        raise NotImplementedError

    def error(self, found: Tensor, rhs: Tensor) -> float:
        """Bound of ||found - H^-1 g||_H, g the gradient of `rhs`: from the residual."""
        raise NotImplementedError

    @property
    def size(self) -> float:
        """||D||_H <= size * ||coordinates||_F."""
        raise NotImplementedError

    def displacement(self, at: Tensor) -> tuple[Tensor, float]:
        """(D [k, p] float64, a bound of its rounding's Frobenius norm)."""
        raise NotImplementedError

    def towards(self, wish: Tensor) -> Tensor:
        """The coordinates of argmin_D ||M D^T - wish||^2 / n + lambda ||D||^2; wish [n, k]."""
        raise NotImplementedError

    def start_coordinates(self) -> Tensor:
        """The coordinates of the displacement w^tau."""
        raise NotImplementedError

    def squared(self, at: Tensor, image: Tensor) -> float:
        """||D||_H^2 of a displacement with its image, not rounded."""
        whole = self.damping * self.dot(at, at, image)
        return float(image[: self.n].square().sum()) / self.n + whole

    def excess(self, step: Tensor, off: float) -> float:
        """Bound of ||M D^T||^2 / n - ||D||_H^2, where positive, for a D within `off` of `step`.

        off: a distance in ||.||_H and in ||M .^T|| / sqrt(n). 0 where H >= M^T M / n by definition.
        """
        return 0.0

    def image(self, at: Tensor) -> Tensor:
        """What `dot` takes of a displacement; the first n rows [n, k] are M D^T."""
        raise NotImplementedError

    def outputs_at(self, image: Tensor) -> Tensor:
        """Outputs [n, k] of w^tau + D from D's image."""
        raise NotImplementedError

    def dot(self, first: Tensor, second: Tensor, image: Tensor) -> float:
        """<D, D'>_F of two displacements in coordinates, the second with its image."""
        raise NotImplementedError

    def covector(self, outputs: Tensor, at: Tensor) -> tuple[float, Tensor]:
        """(mean loss, gradient of the objective) at outputs [n, k] and the coordinates there."""
        raise NotImplementedError

    def pair(self, covector: Tensor, at: Tensor, image: Tensor) -> float:
        """<g, D>_F of a covector and a displacement."""
        raise NotImplementedError

    def riesz(self, covector: Tensor) -> Tensor:
        """H^-1 g in coordinates."""
        raise NotImplementedError


def solved(factor: Tensor, rhs: Tensor) -> Tensor:
    """(L L^T)^-1 rhs; torch.cholesky_solve copies the factor at every call."""
    half = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def factored(lower: Tensor) -> Tensor:
    """The Cholesky factor; ValueError where a pivot is not positive."""
    factor, info = torch.linalg.cholesky_ex(lower)
    if int(info):
        raise ValueError(
            f"damping: M^T M / n + lambda I has no positive pivot in row {int(info) - 1}: expected "
            "finite features, and a larger damping"
        )
    return factor
