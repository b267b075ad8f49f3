"""Softplus against torch.nn.Softplus(100) and against moving the same bytes.

Allocating rows allocate their result in every call, on all sides: torch.nn.Softplus and the copy
(x.clone()) do it too. Results of 64 MB come from mmap and page-fault, which is part of every one of
those rows. The "in place" group writes memory that is already there.
The arguments are normal with deviation 0.3, so that beta x covers both tails and the bend.
"""

import pytest
import torch
import torch.nn.functional as F

import twophase_ext as tp

BETA = 100.0
MILLIONS = {"4M": 4 << 20, "16M": 16 << 20}
SMALL = 1 << 12


def argument(size: str, dtype: torch.dtype, small: bool) -> torch.Tensor:
    count = SMALL if small else MILLIONS[size]
    return torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 0.3


def run_rows(row, interleaved, group, which, rows, count, rounds=15):
    """rows: {role: (name, function)}; times rows[which], the others in between."""
    name, target = rows[which]
    row(group, which, name, bytes=count)
    others = [function for role, (_, function) in rows.items() if role != which]
    return interleaved(target, others, rounds=rounds)


ROLES = ["ours", "baseline", "limit"]


@pytest.mark.parametrize("which", ROLES)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, "4M"), (torch.float32, "16M"), (torch.float64, "4M")]
)
def test_forward(dtype, size, which, row, interleaved, small):
    x = argument(size, dtype, small)
    module = torch.nn.Softplus(BETA)
    rows = {
        "ours": ("twophase_ext.softplus", lambda: tp.softplus(x, BETA)),
        "baseline": ("torch.nn.Softplus(100)", lambda: module(x)),
        "limit": ("x.clone()", lambda: x.clone()),
    }
    group = f"softplus forward {str(dtype).removeprefix('torch.')} {size}"
    y = run_rows(row, interleaved, group, which, rows, 2 * x.nbytes)
    if which != "limit":
        torch.testing.assert_close(y, F.softplus(x, BETA), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("which", ROLES)
def test_backward(which, row, interleaved, small):
    x = argument("16M", torch.float32, small).requires_grad_()
    grad = torch.ones_like(x)
    ours, theirs = tp.softplus(x, BETA), torch.nn.Softplus(BETA)(x)
    value = ours.detach()

    def backward(y):
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    rows = {
        "ours": ("twophase_ext.softplus", lambda: backward(ours)),
        "baseline": ("torch.nn.Softplus(100)", lambda: backward(theirs)),
        "limit": ("grad * y", lambda: grad * value),
    }
    group = "softplus backward float32 16M"
    result = run_rows(row, interleaved, group, which, rows, 3 * x.nbytes)
    if which != "limit":
        torch.testing.assert_close(result, torch.sigmoid(BETA * x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ROLES)
def test_in_place(which, row, interleaved, small):
    # Each call lifts the values a little (softplus is larger than x); the time does not depend
    # on them.
    x = argument("16M", torch.float32, small)
    before, target, out = x.clone(), x.clone(), torch.empty_like(x)
    rows = {
        "ours": ("twophase_ext.softplus_", lambda: tp.softplus_(target, BETA)),
        "baseline": (
            "torch softplus(out=)",
            lambda: torch._C._nn.softplus(before, BETA, 20.0, out=out),
        ),
        "limit": ("out.copy_(x)", lambda: out.copy_(x)),
    }
    run_rows(row, interleaved, "softplus in place float32 16M", which, rows, 2 * x.nbytes)
    if which == "ours":
        assert bool((target >= before).all())
