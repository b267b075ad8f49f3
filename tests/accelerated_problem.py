"""A last layer's problem over fixed features, and accelerated steps on it in dense algebra."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from test_second_phases import targets
from twophase_ext.model.losses import objective, resolve_loss, weighted
from twophase_ext.model.weighted import packed
from twophase_ext.training.steps import metric
from twophase_ext.training.steps.accelerated import weight_of
from twophase_ext.training.steps.sides import made


class Rows:
    """Features as the metric reads them."""

    def __init__(self, h, y):
        self.h, self.y, self.targets, self.n = h, y, y, len(h)

    def in_order(self, size):
        return zip(self.h.split(size), self.y.split(size), strict=True)


class Problem:
    """Softplus features of random inputs, targets, and a last layer to start from.

    uneven: whether samples have weights, drawn between 1e-3 and 1.
    """

    def __init__(
        self, seed, loss, dtype=torch.float64, n=None, m=None, l2=0.0, bias="moves", uneven=False
    ):
        g = torch.Generator().manual_seed(seed)
        n = n or int(torch.randint(20, 161, (), generator=g))
        m = m or int(n * (0.3 + torch.rand((), generator=g)))
        x = torch.randn(n, 6, generator=g).double()
        h = tp.softplus(x @ torch.randn(6, m, generator=g).double(), 10.0)
        self.h = (h / h.square().mean().sqrt()).to(dtype)
        self.y = targets((x[:, :3] + torch.randn(n, 3, generator=g)).argmax(1), loss)
        self.loss, self.n, self.l2, self.dtype = resolve_loss(loss), n, l2, dtype
        self.aims = self.y
        if uneven:
            self.y = packed(self.y, 10 ** (-3 * torch.rand(n, generator=g).double()))
            self.loss = objective(weighted(self.loss), self.y, 3)
        self.layer = nn.Linear(m, 3, bias=bias != "none").to(dtype)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(m))
        self.ones = bias == "moves"

    def posed(self, damping=0.1):
        start = [self.layer.weight, *([self.layer.bias] if self.ones else [])]
        m = self.rows()
        smoothness = self.loss.smoothness / self.n * float(torch.linalg.matrix_norm(m, 2) ** 2)
        norms = (self.h.double().square().sum(1) + 1).sqrt()
        return metric.Problem(
            Rows(self.h, self.y),
            start,
            self.layer,
            self.loss,
            norms,
            smoothness * (1 + 1e-9),
            damping,
            self.l2,
        )

    def side(self, damping=0.1):
        return made(self.posed(damping))

    def rows(self):
        """M, scaled where samples differ in curvature."""
        ones = torch.ones(self.n, 1).double()
        m = torch.cat([self.h.double(), *([ones] if self.ones else [])], 1)
        scale = self.loss.row_scale(self.y)
        return m if scale is None else m * scale[:, None]

    def start(self):
        """[W, b] at tau, or W."""
        w = self.layer.weight.detach().double()
        return torch.cat([w, self.layer.bias.detach().double()[:, None]], 1) if self.ones else w

    def value(self, whole):
        return float(self.objective(whole))

    def objective(self, whole):
        m = self.h.shape[1]
        fixed = None if self.layer.bias is None else self.layer.bias.detach().double()
        bias = whole[:, m] if self.ones else fixed
        data = self.loss(F.linear(self.h.double(), whole[:, :m], bias), self.y)
        return data + self.l2 / 2 * whole.square().sum()


CASES = [
    (damping, l2, bias)
    for damping in (0.1, 1e-3, 0.0, None)
    for l2, bias in ((0.0, "moves"), (0.05, "moves"), (0.0, "none"), (0.05, "fixed"))
]


def reference(problem, side, steps, h=None):
    """The method written out, in dense float64 algebra: the displacements x_1, x_2, ..."""
    m, n = problem.rows(), problem.n
    if h is not None:
        pass
    elif side.factor is None:
        h = side.damping * torch.eye(m.shape[1]).double()
    else:
        h = m.T @ m / n + side.damping * torch.eye(m.shape[1]).double()
    start, found = problem.start(), []
    x = z = torch.zeros_like(start)
    for i in range(1, steps + 1):
        a, whole, before = (i + 1) / 2, weight_of(i), weight_of(i - 1)
        y = ((before * x + a * z) / whole).requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(problem.objective(start + y), y)
        step = torch.linalg.solve(h, g.T).T / problem.loss.smoothness
        x, z = y.detach() - step, z - a * step
        found.append(x)
    return found
