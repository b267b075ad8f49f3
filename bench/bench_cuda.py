"""The CUDA kernels against PyTorch, CuPy and moving the same bytes. bench/gpu_check.sh runs it.

A round is CALLS calls and one synchronisation, so that the wait costs next to nothing; the times
and counts in the JSON are of a round (extra_info["calls"]). Arrays are larger than the L2 cache
where the kernel's users' are.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import twophase_ext as tp
from twophase_ext import optim

ops = torch.ops.twophase
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CALLS = 20
BETA = 100.0
SIZES = {"16M": 1 << 24, "256M": 1 << 28}
Rows = dict[str, tuple[str, str, Callable[[], object]]]  # id: (role, name, call)


@pytest.fixture
def run(benchmark, row, small) -> Callable[..., object]:
    """run(group, role, name, call, bytes=, flops=): one row; the result of the last call."""

    def timed(group: str, role: str, name: str, call: Callable[[], object], **counts: int):
        calls = 1 if small else CALLS
        row(group, role, name, **{key: calls * count for key, count in counts.items()})
        benchmark.extra_info.update(calls=calls, device=torch.cuda.get_device_name())

        def round_() -> object:
            for _ in range(calls):
                result = call()
            torch.cuda.synchronize()
            return result

        return benchmark.pedantic(round_, rounds=1 if small else 15, warmup_rounds=3)

    return timed


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(*shape, dtype=dtype, device="cuda", generator=generator) * scale


def cupy_softplus():
    """CuPy's own elementwise softplus, stable like torch's; skips where CuPy is missing."""
    cupy = pytest.importorskip("cupy")
    body = "y = (x > 0 ? x : (T)0) + log1p(exp(-beta * fabs(x))) / beta"
    kernel = cupy.ElementwiseKernel("T x, T beta", "T y", body, "softplus_bench")

    def call(x: torch.Tensor, out: torch.Tensor) -> None:
        # CuPy's own current stream is not torch's.
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            kernel(cupy.from_dlpack(x), cupy.float32(BETA), cupy.from_dlpack(out))

    return call


@pytest.mark.parametrize("which", ["ours", "torch", "cupy", "copy"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_softplus_forward(dtype, size, which, run, small):
    if dtype != torch.float32 and (size != "256M" or which == "cupy"):
        pytest.skip("one size, without CuPy, is enough for the other types")
    x = normal(1000 if small else SIZES[size], dtype=dtype, scale=0.3)
    out = torch.empty_like(x)
    module = torch.nn.Softplus(BETA)
    if which == "cupy":
        kernel = cupy_softplus()
    rows: Rows = {
        "ours": ("ours", "twophase_ext.softplus", lambda: tp.softplus(x, BETA)),
        "torch": ("baseline", "torch.nn.Softplus(100)", lambda: module(x)),
        "cupy": ("baseline", "CuPy ElementwiseKernel", lambda: kernel(x, out)),
        "copy": ("limit", "x.clone()", lambda: x.clone()),
    }
    group = f"softplus forward {str(dtype).removeprefix('torch.')} {size}"
    run(group, *rows[which], bytes=2 * x.nbytes)


@pytest.mark.parametrize("which", ["ours", "torch", "multiply"])
def test_softplus_backward(which, run, small):
    x = normal(1000 if small else SIZES["256M"], scale=0.3).requires_grad_()
    grad = torch.ones_like(x)
    y = (torch.nn.Softplus(BETA) if which == "torch" else tp.nn.Softplus(BETA))(x)
    value = y.detach()

    def backward() -> torch.Tensor:
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    rows: Rows = {
        "ours": ("ours", "twophase_ext.softplus", backward),
        "torch": ("baseline", "torch.nn.Softplus(100)", backward),
        "multiply": ("limit", "grad * y", lambda: grad * value),
    }
    run("softplus backward float32 256M", *rows[which], bytes=3 * x.nbytes)


def parameters(small: bool) -> list[torch.Tensor]:
    """45 M numbers in 62 tensors: a residual network's shapes and one wide layer."""
    shapes = [(64, 3, 3, 3)]
    for width in (64, 128, 256, 512):
        shapes += 3 * [(width, width, 3, 3)] + [(width, width // 2, 3, 3)] + 11 * [(width,)]
    shapes += [(66_000, 512)]
    return [normal(*(min(n, 8) if small else n for n in shape)) for shape in shapes]


@pytest.mark.parametrize("which", ["ours", "torch", "copy"])
def test_perturb(which, run, small):
    tensors = parameters(small)
    keys, stds = list(range(len(tensors))), [1e-3] * len(tensors)
    count = sum(t.numel() for t in tensors)
    flat, out = torch.empty(count, device="cuda"), torch.empty(count, device="cuda")

    def loop() -> None:
        for p in tensors:
            p.add_(torch.randn_like(p), alpha=1e-3)

    rows: Rows = {
        "ours": ("ours", "perturb_", lambda: ops.perturb_(tensors, keys, stds)),
        "torch": ("baseline", "loop of p.add_(torch.randn_like(p), alpha=s)", loop),
        "copy": ("limit", "copy_ of the same bytes", lambda: out.copy_(flat)),
    }
    run("perturb_ 45M", *rows[which], bytes=8 * count)


@pytest.mark.parametrize("which", ["ours", "default", "foreach", "fused", "copy"])
def test_sgd(which, run, small):
    params = [p.requires_grad_() for p in parameters(small)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    rule = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-5}
    flags = {"foreach": {"foreach": True}, "fused": {"fused": True}}
    torch_sgd = torch.optim.SGD(params, **rule, **flags.get(which, {}))
    ours = optim.SGD(params, **rule)
    count = sum(p.numel() for p in params)
    # five streams: p, g and the buffer read, p and the buffer written
    flat = torch.empty(5 * count // 2, device="cuda")
    out = torch.empty_like(flat)
    rows: Rows = {
        "ours": ("ours", "twophase_ext.optim.SGD", ours.step),
        "default": ("baseline", "torch.optim.SGD", torch_sgd.step),
        "foreach": ("baseline", "torch.optim.SGD(foreach=True)", torch_sgd.step),
        "fused": ("baseline", "torch.optim.SGD(fused=True)", torch_sgd.step),
        "copy": ("limit", "copy_ of the same bytes", lambda: out.copy_(flat)),
    }
    run("sgd_ 45M", *rows[which], bytes=20 * count)


def replay_of(call: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph of `call`."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


LAST_LAYER = ["ours", "ours in a graph", "eager", "foreach", "fused", "torch in a graph", "sum"]


@pytest.mark.parametrize("which", LAST_LAYER)
def test_last_layer_step(which, run, small):
    b, k, m = (4, 3, 70) if small else (64, 10, 66_001)
    h, target = normal(b, m), torch.arange(b, device="cuda") % k
    layer = torch.nn.Linear(m, k, device="cuda")
    rule = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-5}
    flags = {"foreach": {"foreach": True}, "fused": {"fused": True}}.get(which, {})
    optimizer = torch.optim.SGD(layer.parameters(), **rule, **flags)
    weight, bias = layer.weight, layer.bias
    buffers = [torch.zeros_like(p) for p in (weight, bias)]
    settings = (0, 1e-4, 0.9, 0.0, 1e-5, False, False)

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return ops.last_layer_step_(weight, bias, *buffers, h, target, *settings)

    def eager() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(h), target)
        loss.backward()
        optimizer.step()
        return loss

    def functional() -> torch.Tensor:  # torch.optim.SGD refuses to be captured
        loss = F.cross_entropy(layer(h), target)
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            gradients = torch._foreach_add(gradients, (weight, bias), alpha=1e-5)
            torch._foreach_mul_(buffers, 0.9)
            torch._foreach_add_(buffers, gradients)
            torch._foreach_add_((weight, bias), buffers, alpha=-1e-4)
        return loss

    rows: Rows = {
        "ours": ("ours", "last_layer_step_", ours),
        "eager": ("baseline", "eager, torch.optim.SGD", eager),
        "foreach": ("baseline", "eager, torch.optim.SGD(foreach=True)", eager),
        "fused": ("baseline", "eager, torch.optim.SGD(fused=True)", eager),
        "sum": ("limit", "h.sum()", h.sum),
    }
    if which == "ours in a graph":
        rows[which] = ("ours", "last_layer_step_ in a CUDA graph", replay_of(ours))
    elif which == "torch in a graph":
        rows[which] = ("baseline", "eager in a CUDA graph", replay_of(functional))
    in_graph = " in a CUDA graph" if "graph" in which else ""
    # once h, and weight and buffer read and written
    traffic = 4 * (b * m + 4 * k * m)
    run(f"last_layer_step_{in_graph} 64x66001->10", *rows[which], bytes=traffic)


def with_ones(features: torch.Tensor) -> torch.Tensor:
    wide = features.double()
    return torch.cat([wide, torch.ones_like(wide[..., :1])], -1)


@pytest.mark.parametrize("which", ["ours", "torch", "slogdet", "cupy", "matmul"])
@pytest.mark.parametrize(("batch", "n"), [(4096, 64), (256, 256)])
def test_gram_logdet(batch, n, which, run, small):
    shape = (3, 8, 12) if small else (batch, n, n + 8)
    x = normal(*shape)
    wide = with_ones(x)

    def gram() -> torch.Tensor:
        m = with_ones(x)
        return m @ m.mT

    def cholesky() -> tuple[torch.Tensor, torch.Tensor]:
        factor, info = torch.linalg.cholesky_ex(gram())
        return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1), info

    def with_cupy() -> object:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            m = cupy.from_dlpack(x).astype(cupy.float64)
            m = cupy.concatenate([m, cupy.ones_like(m[..., :1])], -1)
            return cupy.linalg.slogdet(m @ m.transpose(0, 2, 1))

    if which == "cupy":
        cupy = pytest.importorskip("cupy")
    rows: Rows = {
        "ours": ("ours", "gram_logdet, with the certified rank", lambda: ops.gram_logdet(x, True)),
        "torch": ("baseline", "matmul and torch.linalg.cholesky_ex, no rank", cholesky),
        "slogdet": ("baseline", "torch.linalg.slogdet", lambda: torch.linalg.slogdet(gram())),
        "cupy": ("baseline", "cupy.linalg.slogdet", with_cupy),
        "matmul": ("limit", "matmul of the Gram matrix", lambda: wide @ wide.mT),
    }
    b, n, m = shape
    run(f"gram_logdet {b}x{n}x{m}", *rows[which], flops=b * (n * n * (m + 1) + 2 * n**3 // 3))
