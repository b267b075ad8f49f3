"""An epoch of the second phase on a GPU against eager PyTorch and a CUDA graph of its operations.

60,000 cached samples of 66,001 features where they fit, else as many as do; 10 classes, batches of
64, momentum and weight decay. extra_info: microseconds a step. bench/gpu_check.sh runs it.
"""

import pytest
import torch
import torch.nn.functional as F

from twophase_ext.core.memory import available_memory
from twophase_ext.ops import last_layer_epoch_

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FEATURES, CLASSES, BATCH, MOST = 66_001, 10, 64, 60_000
RULE = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-5}
ROWS = ["ours", "bfloat16", "eager", "graph", "sum"]


@pytest.fixture(scope="module")
def problem(request):
    m = 65 if request.config.getoption("benchmark_disable") else FEATURES
    n = int(0.6 * available_memory(torch.device("cuda")) / (4 * m))
    n = min(MOST if m == FEATURES else 200, n) // BATCH * BATCH
    generator = torch.Generator("cuda").manual_seed(0)
    h = torch.rand(n, m, device="cuda", generator=generator).mul_((3 / m) ** 0.5)
    y = torch.randint(CLASSES, (n,), device="cuda", generator=generator)
    return h, y, torch.randperm(n)


def eager_step(layer, optimizer, h, y):
    optimizer.zero_grad(set_to_none=False)
    loss = F.cross_entropy(layer(h), y)
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("which", ROWS)
def test_epoch(which, problem, benchmark, row, small):
    h, y, order = problem
    n, m = h.shape
    layer = torch.nn.Linear(m, CLASSES, device="cuda")
    optimizer = torch.optim.SGD(layer.parameters(), foreach=True, **RULE)
    on_device = order.cuda().split(BATCH)

    def eager():
        for index in on_device:
            eager_step(layer, optimizer, h[index], y[index])

    def graphed():
        """torch.optim.SGD refuses to be captured: its formulas."""
        index = on_device[0].clone()
        weight, bias = layer.weight, layer.bias
        buffers = [torch.zeros_like(p) for p in (weight, bias)]

        def step():
            loss = F.cross_entropy(layer(h[index]), y[index])
            gradients = torch.autograd.grad(loss, (weight, bias))
            with torch.no_grad():
                gradients = torch._foreach_add(
                    gradients, (weight, bias), alpha=RULE["weight_decay"]
                )
                torch._foreach_mul_(buffers, RULE["momentum"])
                torch._foreach_add_(buffers, gradients)
                torch._foreach_add_((weight, bias), buffers, alpha=-RULE["lr"])

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def epoch():
            for part in on_device:
                index.copy_(part)
                graph.replay()

        return epoch

    def ours(features):
        weight, bias = layer.weight.detach(), layer.bias.detach()
        buffers = torch.zeros_like(weight), torch.zeros_like(bias)
        return lambda: last_layer_epoch_(
            weight, bias, *buffers, features, y, order, batch_size=BATCH, **RULE
        )

    if which == "bfloat16":
        h = h.bfloat16()
    name, role, call = {
        "ours": ("last_layer_epoch_", "ours", lambda: ours(h)),
        "bfloat16": ("last_layer_epoch_, bfloat16 h", "ours", lambda: ours(h)),
        "eager": ("eager, torch.optim.SGD(foreach=True)", "baseline", lambda: eager),
        "graph": ("torch operations in a CUDA graph", "baseline", graphed),
        "sum": ("reading h once (sum)", "limit", lambda: h.sum),
    }[which]
    call = call()
    group = f"last-layer epoch {n}x{m}->{CLASSES}" + (", bfloat16" if which == "bfloat16" else "")
    row(group, role, name, bytes=h.nbytes)

    def timed():
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=1 if small else 5, warmup_rounds=1)
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        benchmark.extra_info["us_per_step"] = 1e6 * median * BATCH / n
        benchmark.extra_info["device"] = torch.cuda.get_device_name()
