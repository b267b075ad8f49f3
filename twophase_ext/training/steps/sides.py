"""The two sides of M: coordinates by sample and by feature, and which one is made."""

import math
from functools import cached_property

import torch
from torch import Tensor

from ...linalg.bounds import SLACK, UNIT_ROUNDOFF, gamma
from ..data.samples import BATCH
from .metric import PANEL, Problem, Side, Slope, factored, slopes, solved


class SampleSide(Side):
    """n < p: coordinates [n + 1, k], a and a last row c: D = diag(c) w^tau + a^T M.

    c stays 0 without l2, whose gradient alone leaves the rows of M.
    """

    def __init__(self, problem: Problem) -> None:
        """M M^T is formed and factored; ValueError where that fails."""
        super().__init__(problem)
        n, device = self.n, self.moving.device
        self.gram = torch.empty(n, n, dtype=torch.float64, device=device)
        self.outputs = self.moving.new_empty(n, self.k)
        size = max(BATCH, min(n, PANEL // (8 * self.p)))
        for here, m, _ in self.rows(size):
            self.outputs[here] = m @ self.moving.T
            for there, other, _ in self.rows(size):
                if there.start >= here.start:
                    break
                self.gram[here, there] = m @ other.T
                self.gram[there, here] = self.gram[here, there].T
            own = (m @ m.T).tril_()
            self.gram[here, here] = own + own.tril(-1).T
        self.refactor(problem.damping or 0.0)

    def refactor(self, damping: float) -> None:
        """As of Side."""
        self.damping = self.damped(damping)
        lower = self.gram / self.n
        lower.diagonal().add_(self.damping)
        self.factor = factored(lower)
        self.pull = self.l2 / (self.n * self.damping)

    @property
    def size(self) -> float:
        """||a^T M||_H^2 = <a, G K a> <= n ||K||^2 ||a||^2; ||w^tau||_H^2 <= ||H|| ||w^tau||^2."""
        own = math.sqrt(self.largest) * self.length
        return math.sqrt(2) * max(math.sqrt(self.n) * self.largest, own) * SLACK

    def zeros(self) -> Tensor:
        """As of Side."""
        return self.moving.new_zeros(self.n + 1, self.k)

    def slope(self, at: Tensor) -> Slope:
        """As of Side."""
        n = self.n
        a, stretch = at[:-1], 1 + at[-1]
        own = self.outputs * stretch
        outputs = self.shifted(own + self.gram @ a, self.y)
        far, longest = float(a.norm()), float(stretch.abs().max())
        of_own = gamma(self.p + 2) * math.sqrt(self.trace) * self.length * longest
        off = (
            of_own
            + gamma(2 * n + self.p) * self.trace * far
            + 4 * UNIT_ROUNDOFF * float(outputs.norm())
        )
        value, delta, rounding = slopes(self.loss, outputs, self.y)
        delta /= n
        error = (self.curvature * off + rounding) / n + UNIT_ROUNDOFF * float(delta.norm())
        rhs, size = self.zeros(), math.sqrt(n) * (float(delta.norm()) + error)
        rhs[:-1] = delta
        if self.l2:
            rhs[:-1] += self.l2 * a - self.pull * own
            rhs[-1] = self.l2 / self.damping * stretch
            terms = float(delta.norm()) + self.l2 * far + self.pull * float(own.norm())
            error += 8 * UNIT_ROUNDOFF * terms + self.pull * of_own
            longest *= self.length
            size += self.l2 / math.sqrt(self.damping) * (longest + math.sqrt(self.trace) * far)
            error += (
                8 * UNIT_ROUNDOFF * self.l2 / self.damping * longest * math.sqrt(self.largest / n)
            )
        return Slope(value / n, rhs, size * SLACK, math.sqrt(n) * error * SLACK)

    def solve(self, rhs: Tensor) -> Tensor:
        """As of Side."""
        found = rhs.clone()
        found[:-1] = solved(self.factor, rhs[:-1])
        return found

    def error(self, found: Tensor, rhs: Tensor) -> float:
        """For r = K a - rhs: ||M^T K^-1 r||_H^2 = <r, G K^-1 r> <= n ||r||^2."""
        a, wanted = found[:-1], rhs[:-1]
        residual = (self.gram @ a).div_(self.n).add_(a, alpha=self.damping).sub_(wanted)
        of_product = gamma(2 * self.n + self.p + 8) * self.largest * float(a.norm())
        rounding = of_product + 4 * UNIT_ROUNDOFF * float(wanted.norm())
        return math.sqrt(self.n) * (float(residual.norm()) + rounding) * SLACK

    def displacement(self, at: Tensor) -> tuple[Tensor, float]:
        """As of Side."""
        total = at[-1][:, None] * self.moving
        for here, m, _ in self.rows():
            total = total + at[here].T @ m
        terms = math.sqrt(self.trace) * float(at[:-1].norm())
        terms += float(at[-1].abs().max()) * self.length
        return total, gamma(self.n + 8) * terms * SLACK

    def towards(self, wish: Tensor) -> Tensor:
        """As of Side."""
        found = self.zeros()
        found[:-1] = solved(self.factor, wish / self.n)
        return found

    def start_coordinates(self) -> Tensor:
        """As of Side."""
        found = self.zeros()
        found[-1] = 1
        return found

    def image(self, at: Tensor) -> Tensor:
        """As of Side; the last row has <w^tau_j, D_j>."""
        found = self.zeros()
        found[:-1] = self.gram @ at[:-1] + at[-1] * self.outputs
        found[-1] = (self.outputs * at[:-1]).sum(0) + at[-1] * self.moving.square().sum(1)
        return found

    def outputs_at(self, image: Tensor) -> Tensor:
        """As of Side."""
        return self.shifted(self.outputs + image[:-1], self.y)

    def dot(self, first: Tensor, second: Tensor, image: Tensor) -> float:
        """As of Side."""
        return float((first * image).sum())

    def covector(self, outputs: Tensor, at: Tensor) -> tuple[float, Tensor]:
        """(rho, sigma) [n + 1, k] of g = rho^T M + diag(sigma) w^tau."""
        value, delta, _ = slopes(self.loss, outputs, self.y)
        found = self.l2 * (at + self.start_coordinates())
        found[:-1] += delta / self.n
        return value / self.n, found

    def pair(self, covector: Tensor, at: Tensor, image: Tensor) -> float:
        """As of Side."""
        return float((covector * image).sum())

    def riesz(self, covector: Tensor) -> Tensor:
        """a = K^-1 (rho - sigma f^tau / (n lambda)), c = sigma / lambda."""
        found = covector / self.damping
        rhs = covector[:-1] - self.outputs * (found[-1] / self.n)
        found[:-1] = solved(self.factor, rhs)
        return found


class FeatureSide(Side):
    """p <= n, or damping=None: coordinates D^T [p, k], and passes over the features."""

    gram: Tensor | None = None
    factor: Tensor | None = None

    def __init__(self, problem: Problem) -> None:
        """M^T M is formed and factored but for damping=None; ValueError where that fails."""
        super().__init__(problem)
        if problem.damping is None:
            return
        gram = self.moving.new_zeros(self.p, self.p)
        for _, m, _ in self.rows(max(BATCH, min(self.n, PANEL // (8 * self.p)))):
            gram.addmm_(m.T, m)
        self.gram = gram.div_(self.n)
        self.refactor(problem.damping)

    def refactor(self, damping: float) -> None:
        """As of Side."""
        if self.gram is None:
            raise RuntimeError("another damping was asked for where nothing is factored")
        self.damping = self.damped(damping)
        lower = self.gram.clone()
        lower.diagonal().add_(self.damping)
        self.factor = factored(lower)

    @property
    def size(self) -> float:
        """||D||_H <= sqrt(||H||) ||D||."""
        return math.sqrt(self.largest) * SLACK

    def zeros(self) -> Tensor:
        """As of Side."""
        return self.moving.new_zeros(self.p, self.k)

    def slope(self, at: Tensor) -> Slope:
        """As of Side."""
        weight, total = self.moving + at.T, torch.zeros_like(self.moving)
        value, squares, rounding = 0.0, 0.0, 0.0
        for _, m, y in self.rows():
            part, delta, error = slopes(self.loss, self.logits(m, weight, y), y)
            total.addmm_(delta.T, m)  # twice as fast as m^T delta
            value, squares, rounding = (
                value + part,
                squares + float(delta.square().sum()),
                rounding + error,
            )
        n, root = self.n, math.sqrt(self.trace)
        total /= n
        if self.l2:
            total += self.l2 * weight
        far, length = float(at.norm()), float(weight.norm())
        deltas = math.sqrt(squares) / n
        off = gamma(self.p + 8) * root * (self.length + far + length)
        of_delta = (self.curvature * off + rounding) / n
        summed = gamma(n + 8) * root * deltas + 8 * UNIT_ROUNDOFF * self.l2 * (self.length + far)
        error = math.sqrt(n) * of_delta + summed / math.sqrt(self.damping)
        size = math.sqrt(n) * (deltas + of_delta) + self.l2 * length / math.sqrt(self.damping)
        return Slope(value / n, total.T, size * SLACK, error * SLACK)

    def solve(self, rhs: Tensor) -> Tensor:
        """As of Side."""
        return rhs / self.damping if self.factor is None else solved(self.factor, rhs)

    def error(self, found: Tensor, rhs: Tensor) -> float:
        """||r||_(H^-1) <= ||r|| / sqrt(lambda), r = H found - rhs."""
        residual = self.damping * found - rhs
        if self.gram is not None:
            residual += self.gram @ found
        of_product = gamma(self.n + self.p + 8) * self.largest * float(found.norm())
        rounding = of_product + 4 * UNIT_ROUNDOFF * float(rhs.norm())
        return (float(residual.norm()) + rounding) / math.sqrt(self.damping) * SLACK

    def displacement(self, at: Tensor) -> tuple[Tensor, float]:
        """As of Side."""
        return at.T.clone(), 0.0

    def towards(self, wish: Tensor) -> Tensor:
        """As of Side."""
        total = torch.zeros_like(self.moving)
        for here, m, _ in self.rows():
            total.addmm_(wish[here].T, m)
        return self.solve(total.T / self.n)

    def start_coordinates(self) -> Tensor:
        """As of Side."""
        return self.moving.T

    def image(self, at: Tensor) -> Tensor:
        """As of Side."""
        return torch.cat([m @ at for _, m, _ in self.rows()])

    @cached_property
    def outputs(self) -> Tensor:
        """Those of w^tau, a fixed bias included."""
        return torch.cat([self.logits(m, self.moving, y) for _, m, y in self.rows()])

    def outputs_at(self, image: Tensor) -> Tensor:
        """As of Side."""
        return self.outputs + image

    def dot(self, first: Tensor, second: Tensor, image: Tensor) -> float:
        """As of Side."""
        return float((first * second).sum())

    def covector(self, outputs: Tensor, at: Tensor) -> tuple[float, Tensor]:
        """As of Side; g^T [p, k]."""
        value, delta, _ = slopes(self.loss, outputs, self.y)
        total = torch.zeros_like(self.moving)
        for here, m, _ in self.rows():
            total.addmm_(delta[here].T, m)
        return value / self.n, total.div_(self.n).T.add(self.moving.T + at, alpha=self.l2)

    def pair(self, covector: Tensor, at: Tensor, image: Tensor) -> float:
        """As of Side."""
        return float((covector * at).sum())

    def riesz(self, covector: Tensor) -> Tensor:
        """As of Side."""
        return self.solve(covector)


def made(problem: Problem) -> Side:
    """The smaller side of M, factored, or for damping=None the features alone."""
    width = problem.start[0].shape[1] + (len(problem.start) > 1)
    samples = problem.damping is not None and problem.features.n < width
    return SampleSide(problem) if samples else FeatureSide(problem)
