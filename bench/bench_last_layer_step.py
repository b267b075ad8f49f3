"""last_layer_step_ against eager PyTorch: forward, loss, backward and torch.optim.SGD's step.

The second phase's step in the paper's setting: 64 cached features of 66,001 units, 10 classes,
float32, momentum and weight decay. Every pass over h is 17 MB; a step needs two.
"""

import pytest
import torch
import torch.nn.functional as F

from twophase_ext.ops import last_layer_step_

SIZE, SIZE_SMALL = (64, 66_001, 10), (8, 501, 10)
RULE = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5}
ROWS = ["ours", "default", "foreach", "fused", "sum"]


@pytest.mark.parametrize("which", range(len(ROWS)), ids=ROWS)
def test_last_layer_step(which, row, interleaved, small):
    b, m, k = SIZE_SMALL if small else SIZE
    g = torch.Generator().manual_seed(0)
    h, y = torch.rand(b, m, generator=g), torch.randint(k, (b,), generator=g)
    start = torch.randn(k, m, generator=g) / m**0.5
    weight, bias = start.clone(), torch.zeros(k)
    buffers = torch.zeros_like(weight), torch.zeros_like(bias)

    def ours():
        return last_layer_step_(weight, bias, *buffers, h, y, **RULE)

    def eager(**kind):
        layer = torch.nn.Linear(m, k)
        with torch.no_grad():
            layer.weight.copy_(start)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), **RULE, **kind)

        def step():
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(h, layer.weight, layer.bias), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    rows = [
        ("ours", "twophase_ext.ops.last_layer_step_", ours),
        ("baseline", "torch, SGD", eager()),
        ("baseline", "torch, SGD(foreach=True)", eager(foreach=True)),
        ("baseline", "torch, SGD(fused=True)", eager(fused=True)),
        ("limit", "reading h once (sum)", h.sum),
    ]
    for _ in range(2):  # the same losses, from the same start
        torch.testing.assert_close(ours(), rows[1][2]())
    role, name, target = rows[which]
    # A step reads h twice, the weight twice, the momentum, and writes the last two.
    moved = h.nbytes if role == "limit" else 2 * h.nbytes + 5 * weight.nbytes
    row(f"last_layer_step_ {b}x{m}->{k}", role, name, bytes=moved, flops=4 * b * m * k)
    interleaved(target, [f for i, (_, _, f) in enumerate(rows) if i != which], rounds=31)
