"""The floor of a loss, weights at it, and the smooth maximum of windows."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch

import twophase_ext as tp
from twophase_ext import ops

from .harness import Refused, attempt
from .models import network
from .values import FLOATS, STRANGE, numbers, relaid, wrong

LOSSES = ("cross_entropy", "squared_error", "mse", "bce", "huber", "soft_margin", *STRANGE)


def floor(r: random.Random) -> None:
    """loss_floor: an enclosure that no outputs go below."""
    n = r.randrange(1, 7)
    x: Any = torch.tensor([[float(r.randrange(3))] for _ in range(n)])
    y: Any = torch.tensor([r.randrange(2) for _ in range(n)])
    loss: Any = r.choice(LOSSES)
    if r.random() < 0.5:
        y = y[:, None].float() * 2 - 1 if loss == "soft_margin" else y[:, None].float()
    if r.random() < 0.2:
        x, y = r.choice(((wrong(r, x), y), (x, wrong(r, y)), (x[:-1], y)))
    weights = r.choice((None, None, torch.rand(n), *STRANGE))
    got = attempt(tp.loss_floor, x, y, loss, weights=weights, outputs=r.choice((None, 1, 2)))
    if isinstance(got, Refused):
        return
    assert isinstance(got, tp.LossFloor) and got.lower <= got.upper
    assert 1 <= got.distinct <= got.n == len(x)


def construction(r: random.Random) -> None:
    """global_minimum: the loss is the model's at these weights, and no lower than the floor."""
    model = network(r, 2, 12, 2, torch.float64)
    x: Any = numbers(r, (6, 2), torch.float64, 0.05)
    y: Any = torch.tensor([r.randrange(2) for _ in range(6)])
    gap: Any = r.choice((1e-3, 1e-2, *STRANGE))
    if r.random() < 0.2:
        x, y = r.choice(((wrong(r, x), y), (x, wrong(r, y)), (x[:-1], y)))
    got = attempt(tp.global_minimum, model, x, y, gap=gap)
    if isinstance(got, Refused):
        return
    assert isinstance(got, tp.GlobalMinimum)
    model.load_state_dict(got.state, strict=False)
    # arrays and labels of other types are taken where they mean the same
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y).long()
    truth = float(torch.nn.functional.cross_entropy(model(x).detach(), y))
    assert math.isclose(truth, got.loss, rel_tol=1e-6, abs_tol=1e-12)
    assert got.loss >= got.floor.lower - 1e-12


def pooling(r: random.Random) -> None:
    """smooth_max_pool: between a window's maximum and log k / beta above it."""
    dtype, beta = r.choice(FLOATS), r.choice((1.0, 100.0, *STRANGE))
    x: Any = relaid(r, numbers(r, (r.randrange(3), 2, 5, r.randrange(1, 7)), dtype))
    kernel = r.choice((1, 2, 3, (2, 1), *STRANGE))
    settings = {"stride": r.choice((None, 1, 2, 0)), "padding": r.choice((0, 0, 1, 9))}
    if r.random() < 0.2:
        x = wrong(r, x)
    if isinstance(x, torch.Tensor) and (x.is_meta or not x.numel()):
        return
    got = attempt(ops.smooth_max_pool, x, kernel, beta=beta, **settings)
    if isinstance(got, Refused):
        return
    top = torch.nn.functional.max_pool2d(x, kernel, **settings)
    assert got.shape == top.shape and got.dtype == x.dtype
    usual = top.isfinite() & (top.abs() < 1e30)
    size = kernel * kernel if isinstance(kernel, int) else math.prod(kernel)
    above = (got.double() - top.double())[usual]
    slack = 1e-5 * (1 + top.double().abs()[usual])
    assert bool((above >= -slack).all()) and bool((above <= math.log(size) / beta + slack).all())


CASES: dict[str, tuple[Callable[[random.Random], None], float]] = {
    "floor": (floor, 3),
    "construction": (construction, 0.1),
    "pooling": (pooling, 3),
}
