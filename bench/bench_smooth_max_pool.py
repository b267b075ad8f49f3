"""The smooth maximum over pooling windows against torch's formula for it and against max pooling.

64 images of 64 channels and 56 x 56 pixels, 3 x 3 windows 2 apart and 2 x 2 ones side by side.
Baseline: log(sum exp(beta x)) / beta by unfold and torch.logsumexp. Limits: max_pool2d, which has
no exponentials; softplus of as many numbers as the windows hold together, each of which needs one
exponential here too; and a copy of x. With the gradient max_pool2d is the limit.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import twophase_ext as tp

BETA = 100.0
POOLS = {"3x3 stride 2": (3, 2, 1), "2x2 stride 2": (2, 2, 0)}
ROLES = ["ours", "formula", "max_pool2d", "softplus", "copy"]
KINDS = {"ours": "ours", "formula": "baseline"}
FORMATS = {"": torch.contiguous_format, ", channels last": torch.channels_last}


def formula(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    y = F.pad(BETA * x, (padding,) * 4, value=-torch.inf)
    y = y.unfold(-2, kernel, stride).unfold(-2, kernel, stride)
    return torch.logsumexp(y, (-2, -1)) / BETA


def images(small: bool, last: str) -> torch.Tensor:
    shape = (2, 3, 9, 8) if small else (64, 64, 56, 56)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=FORMATS[last])


def compare(row, interleaved, group: str, role: str, calls: dict[str, Callable], count: int):
    names = {"ours": "twophase_ext.ops.smooth_max_pool", "formula": "unfold, logsumexp"}
    row(group, KINDS.get(role, "limit"), names.get(role, role), bytes=count)
    return interleaved(calls[role], [f for other, f in calls.items() if other != role])


@pytest.mark.parametrize("last", FORMATS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("role", ROLES)
def test_forward(role, pool, last, small, row, interleaved):
    x, (kernel, stride, padding) = images(small, last), POOLS[pool]
    y = tp.ops.smooth_max_pool(x, kernel, stride, padding, beta=BETA)
    windows = torch.randn(y.numel() * kernel**2)
    calls = {
        "ours": lambda: tp.ops.smooth_max_pool(x, kernel, stride, padding, beta=BETA),
        "formula": lambda: formula(x, kernel, stride, padding),
        "max_pool2d": lambda: F.max_pool2d(x, kernel, stride, padding),
        "softplus": lambda: tp.softplus(windows, BETA),
        "copy": lambda: x.clone(),
    }
    count = x.nbytes + y.nbytes
    found = compare(row, interleaved, f"smooth maximum {pool}{last}", role, calls, count)
    if role in KINDS:
        torch.testing.assert_close(found, y)


@pytest.mark.parametrize("last", FORMATS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("role", ROLES[:3])
def test_forward_and_backward(role, pool, last, small, row, interleaved):
    x, (kernel, stride, padding) = images(small, last).requires_grad_(), POOLS[pool]
    functions = {
        "ours": lambda: tp.ops.smooth_max_pool(x, kernel, stride, padding, beta=BETA),
        "formula": lambda: formula(x, kernel, stride, padding),
        "max_pool2d": lambda: F.max_pool2d(x, kernel, stride, padding),
    }
    y = functions["ours"]().detach()
    grad = torch.randn_like(y)
    calls = {
        name: lambda f=f: torch.autograd.grad(f(), x, grad)[0] for name, f in functions.items()
    }
    group = f"smooth maximum and gradient {pool}{last}"
    found = compare(row, interleaved, group, role, calls, 3 * x.nbytes + 2 * y.nbytes)
    if role == "ours":
        torch.testing.assert_close(found, calls["formula"](), rtol=1e-3, atol=1e-4)
