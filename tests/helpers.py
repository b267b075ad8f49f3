"""Small problems that several test files train on, and the instruction sets to try them with."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import twophase_ext as tp
from twophase_ext import _load

T = TypeVar("T")
ISAS = tp.build_info()["isa_variants"]  # that the kernels have on this processor


@contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    before = tp.build_info()["isa"]
    _load._C.set_isa(isa)
    try:
        yield
    finally:
        _load._C.set_isa(before)


def on_each_isa(call: Callable[[], T]) -> list[T]:
    """What the call returns with each instruction set, where the truth beside it is dear."""
    found = []
    for isa in ISAS:
        with instruction_set(isa):
            found.append(call())
    return found


def cpu_seconds(call: Callable[[], T]) -> tuple[T, float]:
    """What the call returns, and its work: how busy the machine is does not count."""
    started = time.process_time()
    return call(), time.process_time() - started


def toy_data(n: int = 60, d: int = 5, classes: int = 3, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    y = (x[:, :classes] + 0.3 * torch.randn(n, classes, generator=g)).argmax(1)
    return x, y


def toy_mlp(d: int = 5, width: int = 80, classes: int = 3, seed: int = 0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(d, 16),
            tp.nn.Softplus(),
            nn.Linear(16, width),
            tp.nn.Softplus(),
            nn.Linear(width, classes),
        ).to(dtype)


class ToyConvNet(nn.Module):
    """BatchNorm, a skip connection, dropout, a nested last layer."""

    def __init__(self, width: int = 40, classes: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.act = tp.nn.Softplus(10.0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        self.head = nn.ModuleDict(
            {
                "wide": nn.Linear(4, width),
                "act": tp.nn.Softplus(10.0),
                "out": nn.Linear(width, classes),
            }
        )

    def forward(self, x):
        z = self.act(self.bn(self.stem(x)))
        z = z + self.drop(self.conv(z))
        z = z.mean((2, 3))
        return self.head["out"](self.head["act"](self.head["wide"](z)))


def toy_images(n: int = 33, classes: int = 3, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 6, 6, generator=g), torch.randint(classes, (n,), generator=g)


def toy_convnet(seed: int = 0, **settings) -> ToyConvNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyConvNet(**settings)


def quiet(model, folder=False, **settings) -> tp.Trainer:
    """A Trainer that prints nothing, skips the verification, and by default writes nothing."""
    settings = {"epochs": 4, "tau": 0.5, "verify": False, "batch_size": 8, **settings}
    return tp.Trainer(model, run_dir=folder, progress=False, **settings)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same bytes: NaN is NaN, and -0 is not 0."""

    def raw(t: torch.Tensor) -> bytes:
        return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and raw(a[name]) == raw(b[name])
        for name in a
    )


class Given(nn.Module):
    """A module whose forward is given: Given(lambda m, x: m.fc(x), fc=nn.Linear(4, 3))."""

    def __init__(self, run, **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


def saved_bytes(model: nn.Module, forward) -> int:
    """Bytes that forward() keeps for its backward pass, storages counted once.

    The model's parameters and buffers are not counted.
    """
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    sizes: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # alive as long as the graph, so that no address comes twice

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = forward()
    total = sum(sizes.values())
    del kept
    return total


class KinksSeen(TorchDispatchMode):
    """The kinked operators whatever they act on."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        if name in ("relu", "clamp", "clamp_min", "abs", "floor", "max", "where", "threshold"):
            self.found.add(name)
        return func(*args, **(kwargs or {}))
