"""optim.SGD against torch.optim.SGD (default, foreach, fused) and against moving the same bytes.

All parameters of PreActResNet18 with a wide layer of 66,000 units, 45.7 million float32 numbers,
with the paper's momentum and weight decay: a step reads p, g, b and writes p, b.
"""

import pytest
import torch

from twophase.models import PreActResNet18
from twophase_ext import optim

WIDE, WIDE_SMALL, WIDTH_SMALL = 66_000, 100, 4
RULE = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5}


def parameters(small: bool) -> list[torch.nn.Parameter]:
    with torch.device("meta"):
        sizes = {"width": WIDTH_SMALL, "wide": WIDE_SMALL} if small else {"wide": WIDE}
        shapes = [p.shape for p in PreActResNet18(**sizes).parameters()]
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    return params


@pytest.mark.parametrize("which", range(5), ids=["ours", "default", "foreach", "fused", "copy"])
def test_sgd(which, row, interleaved, small):
    params = parameters(small)  # shared; every optimizer has momentum buffers of its own
    ours = optim.SGD(params, **RULE)
    sources = [p.grad for p in params]
    targets = [torch.empty_like(p) for p in params]
    halves = [
        (t.view(-1)[: t.numel() // 2], s.view(-1)) for t, s in zip(targets, sources, strict=True)
    ]

    def copy():  # two and a half copies of the parameters: five times their bytes
        for _ in range(2):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
        for half, source in halves:
            half.copy_(source[: half.numel()])

    rows = [
        ("ours", "twophase_ext.optim.SGD", ours.step),
        ("baseline", "torch.optim.SGD", torch.optim.SGD(params, **RULE).step),
        ("baseline", "torch SGD(foreach=True)", torch.optim.SGD(params, foreach=True, **RULE).step),
        ("baseline", "torch SGD(fused=True)", torch.optim.SGD(params, fused=True, **RULE).step),
        ("limit", "copy", copy),
    ]
    role, name, target = rows[which]
    row("sgd_ 45M", role, name, bytes=5 * sum(p.nbytes for p in params))
    others = [function for i, (_, _, function) in enumerate(rows) if i != which]
    interleaved(target, others, rounds=11)
    if role == "ours":
        before = [p.detach().clone() for p in params]
        ours.step()
        for p, old in zip(params, before, strict=True):
            expected = old.add(ours.state[p]["momentum_buffer"], alpha=-RULE["lr"])
            torch.testing.assert_close(p.detach(), expected)
