"""Softplus against torch.nn.Softplus(100) and against moving the same bytes.

1M fits into the caches and shows the arithmetic; 4M and 16M are bound by memory, the copy's limit.
The arguments are standard normal, as BatchNorm leaves them: beta x reaches both tails and the
bend. Every row allocates its result, torch.nn.Softplus and the copy (x.clone()) too. The memory of
earlier results is reused (bench/conftest.py), except in the group named "fresh memory": there each
result of 64 MB comes from the system and page-faults, on all sides. The "in place" group allocates
nothing.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import twophase_ext as tp

BETA = 100.0
COUNTS = {"1M": 1 << 20, "4M": 4 << 20, "16M": 16 << 20}
SMALL = 1 << 12
ROLES = ["ours", "baseline", "limit"]


@pytest.fixture
def argument(small) -> Callable[..., torch.Tensor]:
    def make(dtype: torch.dtype, size: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(SMALL if small else COUNTS[size], dtype=dtype, generator=generator)

    return make


@pytest.fixture
def compare(row, interleaved) -> Callable[..., object]:
    """compare(group, role, rows, bytes): time rows[role], the other rows in between."""

    def run(group: str, role: str, rows: dict[str, tuple[str, Callable]], count: int) -> object:
        name, target = rows[role]
        row(group, role, name, bytes=count)
        return interleaved(target, [f for other, (_, f) in rows.items() if other != role])

    return run


def forward(x: torch.Tensor, size: str, role: str, compare, note: str = "") -> None:
    module = torch.nn.Softplus(BETA)
    rows = {
        "ours": ("twophase_ext.softplus", lambda: tp.softplus(x, BETA)),
        "baseline": ("torch.nn.Softplus(100)", lambda: module(x)),
        "limit": ("x.clone()", lambda: x.clone()),
    }
    group = f"softplus forward {str(x.dtype).removeprefix('torch.')} {size}{note}"
    y = compare(group, role, rows, 2 * x.nbytes)
    if role != "limit":
        torch.testing.assert_close(y, F.softplus(x, BETA), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, "1M"),
        (torch.float32, "4M"),
        (torch.float32, "16M"),
        (torch.float64, "4M"),
    ],
)
def test_forward(dtype, size, role, argument, compare):
    forward(argument(dtype, size), size, role, compare)


@pytest.mark.parametrize("role", ROLES)
def test_forward_fresh_memory(role, argument, compare, fresh_memory):
    forward(argument(torch.float32, "16M"), "16M", role, compare, ", fresh memory")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("size", list(COUNTS))
def test_backward(size, role, argument, compare):
    x = argument(torch.float32, size).requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = tp.softplus(x, BETA), torch.nn.Softplus(BETA)(x)
    value = ours.detach()

    def backward(y: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    rows = {
        "ours": ("twophase_ext.softplus", lambda: backward(ours)),
        "baseline": ("torch.nn.Softplus(100)", lambda: backward(theirs)),
        "limit": ("grad * y", lambda: grad * value),
    }
    result = compare(f"softplus backward float32 {size}", role, rows, 3 * x.nbytes)
    if role != "limit":
        expected = grad * torch.sigmoid(BETA * x.detach())
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("role", ROLES)
def test_in_place(role, argument, compare):
    # Each call lifts the values a little (softplus is larger than x); the time does not depend on
    # them.
    x = argument(torch.float32, "16M")
    target, out = x.clone(), torch.empty_like(x)
    softplus_out = torch._C._nn.softplus
    rows = {
        "ours": ("twophase_ext.softplus_", lambda: tp.softplus_(target, BETA)),
        "baseline": ("torch softplus(out=)", lambda: softplus_out(x, BETA, 20.0, out=out)),
        "limit": ("out.copy_(x)", lambda: out.copy_(x)),
    }
    compare("softplus in place float32 16M", role, rows, 2 * x.nbytes)
    if role == "ours":
        assert bool((target >= x).all())
