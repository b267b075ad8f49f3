"""perturb_ against the loop over torch.randn_like and against moving the same bytes.

The hidden parameters of PreActResNet18 with a wide layer of 66,000 units (m_H = 1.1 n, n = 60,000):
54 tensors, 45.0 million float32 numbers, three quarters of them in one matrix.
"""

import pytest
import torch

from twophase.models import PreActResNet18
from twophase_ext.ops import perturb_

WIDE, WIDE_SMALL, WIDTH_SMALL = 66_000, 100, 4
SIGMA = 1e-3


def hidden_parameters(small: bool) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        sizes = {"width": WIDTH_SMALL, "wide": WIDE_SMALL} if small else {"wide": WIDE}
        model = PreActResNet18(**sizes)
    last = list(model.named_parameters())[-2:]  # weight and bias of the last layer: no noise there
    assert [p.shape[0] for _, p in last] == [10, 10]
    return {name: torch.zeros(p.shape) for name, p in list(model.named_parameters())[:-2]}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["ours", "loop", "copy"])
def test_perturb(which, row, interleaved, small):
    tensors = hidden_parameters(small)
    sources = [torch.ones_like(p) for p in tensors.values()]
    targets = [torch.empty_like(p) for p in tensors.values()]

    def loop():
        for p in tensors.values():
            p.add_(torch.randn_like(p), alpha=SIGMA)

    def copy():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    rows = [
        ("ours", "twophase_ext.perturb_", lambda: perturb_(tensors, SIGMA, seed=1)),
        ("baseline", "loop p.add_(torch.randn_like(p), alpha=s)", loop),
        ("limit", "copy", copy),
    ]
    role, name, target = rows[which]
    row("perturb_ 45M", role, name, bytes=2 * sum(p.nbytes for p in tensors.values()))
    others = [function for i, (_, _, function) in enumerate(rows) if i != which]
    interleaved(target, others, rounds=11)
    if role == "ours":
        for p in tensors.values():
            p.zero_()
        perturb_(tensors, SIGMA, seed=1)
        noise = torch.cat([p.flatten() for p in tensors.values()])
        assert abs(noise.std() / SIGMA - 1) < 4 / (2 * noise.numel()) ** 0.5
