"""A step of the first phase by activation: the exact softplus, torch.nn.Softplus(100), ReLU.

PreActResNet18 of 16 channels on random images of MNIST's and CIFAR's shape, batches of 64: forward,
cross-entropy, backward, a step of the paper's SGD (tp.optim.SGD in every row). As they are, in
channels_last, under bfloat16 autocast (weights in float32), compiled, and on CUDA from a graph of
forward and backward. The rows of a variant run in turns; from "channels_last" on, ours as it is
("plain") is among the baselines, so that a ratio above 1 means that the variant gains.

extra_info: images a second, from the median; MiB that a forward pass keeps for its backward pass;
on CUDA the peak of MiB that a step allocates.

In channels_last oneDNN's weight gradient can write past its buffer (uxlfoundation/oneDNN#6035);
tp.Trainer leaves the layout as it is for this reason.
"""

import functools
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import twophase_ext as tp
from helpers import saved_bytes
from twophase.models import PreActResNet18

SHAPES = {"64x1x28x28": (64, 1, 28, 28), "64x3x32x32": (64, 3, 32, 32)}
ACTIVATIONS: dict[str, Callable[[], torch.nn.Module]] = {
    "ours": lambda: tp.nn.Softplus(100.0),
    "in place": lambda: tp.nn.Softplus(100.0, inplace=True),
    "torch": lambda: torch.nn.Softplus(100.0),
    "relu": torch.nn.ReLU,
}
VARIANTS = ["plain", "channels_last", "bfloat16", "compiled", "graph"]
PLAIN = "ours, plain"
ROWS = {  # role and label
    "ours": ("ours", "twophase_ext Softplus(100)"),
    "in place": ("ours", "twophase_ext Softplus(100, inplace=True)"),
    "torch": ("baseline", "torch.nn.Softplus(100)"),
    "relu": ("limit", "ReLU"),
    PLAIN: ("baseline", "twophase_ext Softplus(100), plain"),
}
TOLERANCE = {"bfloat16": 5e-2}  # of the first losses, against float32 in the plain layout
SECONDS = 12.0  # of one row's rounds, its neighbours' included
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def names(variant: str) -> list[str]:
    """The rows of a variant. Compiled, the in-place form is a copy, and is left out."""
    left_out = {"plain": PLAIN, "compiled": "in place"}.get(variant)
    return [name for name in ROWS if name != left_out]


@functools.cache
def compiler_fault(device: str) -> str:
    """Why torch.compile does not work here; empty where it does."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


class Step:
    """One training step of a network, as a call that returns the loss."""

    def __init__(
        self,
        activation: str,
        variant: str,
        shape: tuple[int, ...],
        device: str,
        backend: str,
        width: int = 16,
        wide: int | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.variant, self.device = variant, device
        x, self.y = torch.rand(shape), torch.randint(10, shape[:1]).to(device)
        act = ACTIVATIONS[activation]
        model = PreActResNet18(shape[1], 10, width=width, wide=wide, activation=act)
        self.model = model.to(device)
        self.x = x.to(device)
        if variant == "channels_last":
            self.model = self.model.to(memory_format=torch.channels_last)
            # x.to() would leave images of one channel as they are
            layout = torch.empty(shape, device=device, memory_format=torch.channels_last)
            self.x = layout.copy_(self.x)
        rule = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5}
        self.optimizer = tp.optim.SGD(self.model.parameters(), **rule)
        self.call = torch.compile(model, backend=backend) if variant == "compiled" else self.model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.first = float(self())
        if variant == "graph":
            self._capture()

    def forward(self) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.variant == "bfloat16"):
            return F.cross_entropy(self.call(self.x), self.y)

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.forward()
            self.loss.backward()
        self.graph = graph

    def __call__(self) -> torch.Tensor:
        if self.graph is not None:  # its gradients are written anew at every replay
            self.graph.replay()
            loss = self.loss.detach()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.forward()
            loss.backward()
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()


@pytest.fixture(scope="module")
def steps(request) -> Callable[..., Step]:
    """Steps by what they are, made once: compiling one takes a minute."""
    small = bool(request.config.getoption("benchmark_disable"))

    def make(activation: str, variant: str, size: str, device: str) -> Step:
        shape = (8, SHAPES[size][1], 8, 8) if small else SHAPES[size]
        backend = "eager" if small else "inductor"  # the same graph, without a compiler
        return Step(activation, variant, shape, device, backend)

    return functools.cache(make)


@pytest.mark.parametrize(("variant", "name"), [(v, name) for v in VARIANTS for name in names(v)])
@pytest.mark.parametrize("size", list(SHAPES))
@pytest.mark.parametrize("device", DEVICES)
def test_step(device, size, variant, name, steps, benchmark, row, interleaved, small):
    if variant == "graph" and device == "cpu":
        pytest.skip("graphs are captured on CUDA")
    slow = device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if variant == "bfloat16" and slow and not small:
        pytest.skip("oneDNN has only reference kernels of bfloat16 for this processor")
    if variant == "compiled" and not small and (fault := compiler_fault(device)):
        pytest.skip(f"torch.compile does not work here: {fault}")

    def step_of(name: str, variant: str) -> Step:
        known = ("ours", "plain") if name == PLAIN else (name, variant)
        return steps(*known, size, device)

    rows = {other: step_of(other, variant) for other in names(variant)}
    target, exact = rows[name], step_of(name, "plain").first
    assert target.first == pytest.approx(exact, rel=TOLERANCE.get(variant, 1e-4))

    role, label = ROWS[name]
    row(f"first phase {size}{'' if device == 'cpu' else ' on CUDA'}, {variant}", role, label)
    others = [] if small else [step for other, step in rows.items() if other != name]
    started = time.perf_counter()
    for step in (target, *others):
        step()
    rounds = max(5, min(25, int(SECONDS / (time.perf_counter() - started))))
    loss = interleaved(target, others, rounds=rounds, warmup_rounds=1)
    assert bool(torch.isfinite(loss))
    if not benchmark.disabled:
        benchmark.extra_info["images/s"] = round(len(target.x) / benchmark.stats.stats.median, 1)
    if target.variant in ("plain", "channels_last", "bfloat16"):
        kept = saved_bytes(target.model, target.forward)
        benchmark.extra_info["kept MiB"] = round(kept / 2**20, 2)
    if device == "cuda" and variant != "graph":  # a graph's memory is its own from the capture on
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        target()
        peak = torch.cuda.max_memory_allocated() - before
        benchmark.extra_info["peak MiB"] = round(peak / 2**20, 2)


@pytest.mark.parametrize("name", ["ours", "torch", "relu"])
@pytest.mark.parametrize("device", DEVICES)
def test_paper_network(device, name, benchmark, row, interleaved, small):
    """A step of section 7's network: 64 channels, 1.1 n softplus units for MNIST's n."""
    rows = {other: _paper_step(other, device, small) for other in ("ours", "torch", "relu")}
    target = rows[name]
    group = f"first phase 64x1x28x28, the paper's network{'' if device == 'cpu' else ' on CUDA'}"
    row(group, *ROWS[name])
    others = [] if small else [step for other, step in rows.items() if other != name]
    loss = interleaved(target, others, rounds=1 if small else 5, warmup_rounds=1)
    assert bool(torch.isfinite(loss))
    if not benchmark.disabled:
        benchmark.extra_info["images/s"] = round(len(target.x) / benchmark.stats.stats.median, 1)


@functools.cache
def _paper_step(activation: str, device: str, small: bool) -> Step:
    shape, width, wide = ((8, 1, 8, 8), 4, 20) if small else (SHAPES["64x1x28x28"], 64, 66_000)
    return Step(activation, "plain", shape, device, "", width=width, wide=wide)
