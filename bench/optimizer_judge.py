"""One optimizer under the Trainer beside a plain loop: what works, bit for bit."""

import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import nn

import twophase_ext as tp

CHECKS = ("runs", "first phase", "branch", "resumed")
SETTINGS = {"epochs": 6, "tau": 3, "batch_size": 32}  # 3 steps an epoch: Lookahead acts in both


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """96 points of 4 classes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 16, generator=g)
    return x, (x[:, :4] + 0.3 * torch.randn(96, 4, generator=g)).argmax(1)


def network(seed: int = 1) -> nn.Sequential:
    """A softplus network wide enough for the theorem."""
    torch.manual_seed(seed)
    act = tp.nn.Softplus
    return nn.Sequential(
        nn.Linear(16, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 128), act(),
        nn.Linear(128, 4),
    )  # fmt: skip


def matrices(kind: Callable[..., Any], ps: list[nn.Parameter]) -> Any:
    """Muon's groups: hidden matrices, and the rest by its AdamW."""
    two = [p for p in ps if p.ndim == 2 and 4 not in p.shape]
    rest = [p for p in ps if all(p is not q for q in two)]
    return kind([{"params": two, "use_muon": True}, {"params": rest, "use_muon": False}])


class Several(torch.optim.Optimizer):
    """That of docs/torch.md."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        """Each with parameters of its own."""
        super().__init__([group for o in optimizers for group in o.param_groups], {})
        self.optimizers = optimizers

    def step(self, closure: Any = None) -> None:
        """Every one's."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Every one's."""
        return {"optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of `state_dict`."""
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.param_groups[:] = [group for o in self.optimizers for group in o.param_groups]


def beside(kind: Callable[..., Any], ps: list[nn.Parameter]) -> Any:
    """Hidden matrices to this class, the rest to AdamW."""
    two = [p for p in ps if p.ndim == 2 and 4 not in p.shape]
    rest = [p for p in ps if all(p is not q for q in two)]
    return Several(kind(two), torch.optim.AdamW(rest, lr=1e-3))


MATRICES = ("torch.optim.Muon", "muon.SingleDeviceMuon")


def candidates(kind: Callable[..., Any]) -> Iterator[Callable[[list[nn.Parameter]], Any]]:
    """Ways to make an optimizer of this class, the plainest first."""
    name = f"{kind.__module__}.{kind.__name__}"
    if name in MATRICES or name.endswith("SpectralSphere"):
        yield lambda ps: beside(kind, ps)
    yield lambda ps: kind(ps)
    yield lambda ps: kind(ps, lr=1e-3)
    yield lambda ps: kind(ps, lr=1e-3, momentum=0.9)
    yield lambda ps: matrices(kind, ps)
    yield lambda ps: kind([p for p in ps if p.ndim == 2], [p for p in ps if p.ndim != 2])
    yield lambda ps: kind(torch.optim.AdamW(ps, lr=1e-3))
    yield lambda ps: kind(torch.optim.AdamW(ps, lr=1e-3), num_iterations=18)
    yield lambda ps: kind(ps, base_optimizer=torch.optim.SGD, lr=1e-2)
    yield lambda ps: kind(ps, lr=1e-3, num_epochs=6, num_batches_per_epoch=3)
    yield lambda ps: kind(ps, num_iterations=18)
    yield lambda ps: kind(ps, num_data=96)


def factory_of(kind: Callable[..., Any]) -> Callable[[list[nn.Parameter]], Any]:
    """The first candidate that gives an optimizer of the network.

    Where there is none the first error is raised, or the second where only lr was missing.
    """
    errors = []
    for make in candidates(kind):
        try:
            make(list(network().parameters()))
            return make
        except Exception as error:  # of any package
            errors.append(error)
    raise errors["'lr'" in str(errors[0])]


class Killed(BaseException):
    """Nothing behind the last checkpoint is written."""


class Kill:
    """A kill at the end of these epochs, once each."""

    def __init__(self, epochs: list[int]) -> None:
        """epochs: 0-based; emptied as they come."""
        self.epochs = epochs

    def on_epoch_end(self, run: Any, record: dict[str, Any]) -> None:
        """Kill."""
        if record["epoch"] in self.epochs:
            self.epochs.remove(record["epoch"])
            raise Killed


class AtTau:
    """The weights behind the noise."""

    def on_perturb(self, run: Any) -> None:
        """Copy them."""
        self.weights = [p.detach().clone() for p in run.network.model.parameters()]


def trainer(model: nn.Module, factory: Any, **settings: Any) -> tp.Trainer:
    """A Trainer that says nothing."""
    plain = {"run_dir": False, "progress": False, "verify": False, **SETTINGS}
    return tp.Trainer(model, optimizer=factory, **{**plain, **settings})


def loop(factory: Any, seed: int = 0) -> nn.Module:
    """The base algorithm in a plain loop; seed: of torch's random numbers."""
    (x, y), model = data(), network()
    optimizer = factory(list(model.parameters()))
    if hasattr(optimizer, "train"):
        optimizer.train()
    sampler = tp.EpochSampler(len(x), seed=1)
    for epoch in range(SETTINGS["epochs"]):
        sampler.set_epoch(epoch)
        drawn = tp.stream_seed(1, "model", epoch) + seed  # as the Trainer's, for seed 0
        torch.manual_seed(drawn)
        random.seed(drawn)
        numpy.random.seed(drawn % 2**32)
        for index in torch.tensor(list(sampler)).split(SETTINGS["batch_size"]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def judge(factory: Any) -> dict[str, Any]:
    """CHECKS of one optimizer: True, False, or why there is no answer."""
    found: dict[str, Any] = {}

    def check(name: str, work: Callable[[], Any]) -> None:
        try:
            found[name] = work()
        except Exception as error:  # of any package
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]

    model, watch = network(), AtTau()

    def runs() -> bool:
        result = trainer(model, factory, callbacks=[watch]).fit(data())
        if result.status != "completed":
            finite = all(bool(p.isfinite().all()) for p in loop(factory).parameters())
            return result.status + ("" if finite else ", as a plain loop does")  # type: ignore[return-value]
        hidden = zip(list(model.parameters())[:-2], watch.weights, strict=False)
        return all(torch.equal(p, q) for p, q in hidden)

    def first() -> Any:
        own = network()
        trainer(own, factory, second_phase="none").fit(data())
        plain = loop(factory)
        if same(own, plain):
            return True
        return "draws random numbers" if not same(plain, loop(factory, 1)) else False

    def branch() -> bool:
        return same(trainer(network(), factory).branch({"b": {}}, data())["b"].model, model)

    def resumed() -> bool:
        again, kills = network(), [1, 4]
        with tempfile.TemporaryDirectory() as folder:
            for attempt in range(3):
                again = network(1 + attempt)  # a checkpoint replaces all weights
                run = trainer(again, factory, run_dir=folder, callbacks=[Kill(kills)])
                try:
                    run.fit(data(), resume="auto")
                except Killed:
                    continue
        return same(again, model)

    check("runs", runs)
    if found["runs"] is True:
        check("first phase", first)
        check("branch", branch)
        check("resumed", resumed)
    return found
