"""An epoch of the second phase over cached features, and its full gradient, against PyTorch.

The paper's setting: 66,001 features, 10 classes, batches of 64, momentum and weight decay; a head
as other networks have it, 512 features and 60,000 samples; and heads of 100 to 32,000 outputs. The
baselines gather their rows, as a user's loop does; ours too. The limits are reading h once and the
step's two products alone, of matrices that are at hand.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from twophase_ext.ops import last_layer_epoch_, last_layer_gradient

RULE = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-5}
BATCH = 64
SIZES = {
    "4096x66001->10": (4096, 66_001, 10),
    "60000x512->10": (60_000, 512, 10),
    "20000x512->100": (20_000, 512, 100),
    "20000x512->1000": (20_000, 512, 1_000),
    "4096x4096->1000": (4_096, 4_096, 1_000),
    "4000x768->32000": (4_000, 768, 32_000),
}
SMALL = (130, 65)  # samples and features
KINDS: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


class Head:
    """Cached features, labels and an epoch's order."""

    def __init__(self, n: int, m: int, classes: int) -> None:
        g = torch.Generator().manual_seed(0)
        # rows of norm 1 or so: at larger ones these rates diverge
        self.h = torch.rand(n, m, generator=g).mul_((3 / m) ** 0.5)
        self.y = torch.randint(classes, (n,), generator=g)
        self.order = torch.randperm(n, generator=g)
        self.start = torch.randn(classes, m, generator=g)

    def ours(self, h: torch.Tensor) -> Callable[[], torch.Tensor]:
        weight, bias = self.start.clone(), torch.zeros(len(self.start))
        buffers = torch.zeros_like(weight), torch.zeros_like(bias)
        return lambda: last_layer_epoch_(
            weight, bias, *buffers, h, self.y, self.order, batch_size=BATCH, **RULE
        )

    def eager(self, **kind: bool) -> Callable[[], torch.Tensor]:
        layer = torch.nn.Linear(*self.start.t().shape)
        with torch.no_grad():
            layer.weight.copy_(self.start)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), **RULE, **kind)

        def epoch() -> torch.Tensor:
            losses = []
            for index in self.order.split(BATCH):
                optimizer.zero_grad()
                loss = F.cross_entropy(layer(self.h[index]), self.y[index])
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return torch.stack(losses)

        return epoch

    def products(self) -> torch.Tensor:
        """What a step multiplies, and nothing else."""
        x, delta = self.h[:BATCH], self.h.new_ones(BATCH, len(self.start))
        for _ in range(0, len(self.h), BATCH):
            gradient = delta.t() @ x
            x @ self.start.t()
        return gradient


@pytest.fixture(scope="module")
def heads() -> dict[str, Head]:
    """Made when they are first asked for: a gigabyte each."""
    return {}


@pytest.fixture
def head(request, heads, small) -> Head:
    size = request.param
    if size not in heads:
        heads.clear()
        n, m, classes = SIZES[size]
        heads[size] = Head(*SMALL, min(classes, 40)) if small else Head(n, m, classes)
    return heads[size]


def single(call: Callable[[], object]) -> Callable[[], object]:
    """The call with one thread."""

    def run() -> object:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return run


ROWS = ["ours", "default", "foreach", "fused", "sum", "products"]
BESIDE = ["bfloat16", "one thread"]  # of the first size, against the float32 line
CASES = [(size, which) for size in SIZES for which in ROWS]
CASES += [(next(iter(SIZES)), which) for which in BESIDE]


@pytest.mark.parametrize(("head", "which"), CASES, indirect=["head"])
def test_epoch(head, which, row, interleaved, small, request):
    group = f"last-layer epoch {request.node.callspec.params['head']}"
    ours = head.ours(head.h)
    rows = {
        "ours": ("ours", "last_layer_epoch_", ours),
        **{
            name: ("baseline", f"torch, SGD({name})", head.eager(**kind))
            for name, kind in KINDS.items()
        },
        "sum": ("limit", "reading h once (sum)", head.h.sum),
        "products": ("limit", "the two products alone", head.products),
        "bfloat16": ("ours", "last_layer_epoch_, bfloat16 h", head.ours(head.h.bfloat16())),
        "one thread": ("baseline", "last_layer_epoch_, 1 thread", single(ours)),
    }
    torch.testing.assert_close(ours().float(), rows["default"][2](), rtol=1e-3, atol=1e-4)
    if which == "bfloat16":
        group += ", bfloat16 h"  # against the float32 line
        rows["ours"] = ("baseline", "last_layer_epoch_, float32 h", ours)
    elif which == "one thread":
        group += ", 2 threads against 1"
    role, name, target = rows[which]
    row(group, role, name, bytes=head.h.nbytes, flops=4 * head.h.numel() * len(head.start))
    beside = ROWS if which in ROWS else ["ours"]
    others = [rows[name][2] for name in beside if name != which]
    interleaved(target, others, rounds=1 if small else 5, warmup_rounds=1)


@pytest.mark.parametrize("pair", ["bfloat16 h", "2 threads against 1"])
@pytest.mark.parametrize("head", list(SIZES)[:1], indirect=True)
def test_float32_beside(head, pair, row, interleaved, small):
    """The other row of the two comparisons above, in their groups."""
    ours = head.ours(head.h)
    role = "baseline" if pair == "bfloat16 h" else "ours"
    name = "last_layer_epoch_, float32 h" if role == "baseline" else "last_layer_epoch_, 2 threads"
    row(f"last-layer epoch 4096x66001->10, {pair}", role, name)
    others = [head.ours(head.h.bfloat16()) if role == "baseline" else single(ours)]
    interleaved(ours, others, rounds=1 if small else 5, warmup_rounds=1)


@pytest.mark.parametrize("which", ["ours", "addmm", "sum"])
@pytest.mark.parametrize("head", list(SIZES)[:1], indirect=True)
def test_full_gradient(head, which, row, interleaved, small):
    weight, bias = head.start.clone(), torch.zeros(len(head.start))
    moving = weight.clone().requires_grad_(), bias.clone().requires_grad_()

    def by_torch() -> tuple[torch.Tensor, ...]:
        loss = F.cross_entropy(torch.addmm(moving[1], head.h, moving[0].t()), head.y)
        return loss.detach(), *torch.autograd.grad(loss, moving)

    def ours() -> tuple[torch.Tensor, ...]:
        return last_layer_gradient(weight, bias, head.h, head.y)

    for a, b in zip(ours(), by_torch(), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-3, atol=1e-5)
    rows = {
        "ours": ("ours", "last_layer_gradient", ours),
        "addmm": ("baseline", "torch, addmm forward and backward", by_torch),
        "sum": ("limit", "reading h once (sum)", head.h.sum),
    }
    role, name, target = rows[which]
    row(
        "full gradient 4096x66001->10",
        role,
        name,
        bytes=head.h.nbytes,
        flops=4 * head.h.numel() * 10,
    )
    others = [call for key, (_, _, call) in rows.items() if key != which]
    interleaved(target, others, rounds=1 if small else 5, warmup_rounds=1)
