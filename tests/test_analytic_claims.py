"""Nothing is called analytic that has a kink, by whatever way it runs."""

import random
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import Given, KinksSeen
from twophase_ext.nn import Softplus, analytic, classify


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), *between, nn.Linear(16, 16), nn.Linear(16, 3))


def hooked(register: str, hook, at: int | None = 0) -> nn.Module:
    model = mlp()
    getattr(model if at is None else model[at], register)(hook)
    return model


class Block(nn.Sequential):
    def forward(self, x):
        return F.relu(super().forward(x))


class Blocks(nn.ModuleList):
    def forward(self, x):
        for layer in self:
            x = torch.clamp(layer(x), -1, 1)
        return x


class Called(nn.Linear):
    def __call__(self, x):
        return super().__call__(x).relu()


class Inner(nn.Linear):
    def _call_impl(self, x):
        return self.forward(x).abs()

    __call__ = _call_impl


class Super(nn.Linear):
    def forward(self, x):
        return super().forward(x).floor()


class Stored(nn.Linear):
    def __getattr__(self, name):
        value = super().__getattr__(name)
        return value.relu() if name == "weight" else value


class Property(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.raw = self.weight
        del self._parameters["weight"]

    @property
    def weight(self):
        return self.raw.abs()


class ConvOfAbs(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.abs(), bias)


class Abs(nn.Module):
    def forward(self, w):
        return w.abs()


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


@torch.jit.script
def scripted(x):
    return torch.relu(x)


def parametrized() -> nn.Module:
    model = mlp(nn.Tanh())
    nn.utils.parametrize.register_parametrization(model[0], "weight", Abs())
    return model


def replaced(name: str = "forward") -> nn.Module:
    model = mlp(nn.Tanh())
    old = getattr(model[1], name)
    setattr(model[1], name, lambda *a: old(*a).relu())
    return model


def method() -> nn.Module:
    model = mlp(Softplus())
    model[1].forward = types.MethodType(lambda self, z: torch.relu(z), model[1])
    return model


def root() -> nn.Module:
    model = mlp(nn.Tanh())
    model.forward = lambda x: model[3](model[2](model[0](x).clamp(min=0)))
    return model


def convolution_replaced() -> nn.Module:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(12, 3))
    model[0]._conv_forward = lambda x, w, b: F.conv1d(x, w.abs(), b)
    return model


class WeightRelu(nn.Module):
    def __init__(self, read) -> None:
        super().__init__()
        self.fc, self.w, self.out = (
            nn.Linear(8, 16),
            nn.Parameter(torch.randn(16)),
            nn.Linear(16, 3),
        )
        self.kept, self.read = [self.w], read

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x)) * self.read(self).abs())


def own(run) -> nn.Module:
    return Given(run, fc=nn.Linear(8, 16), out=nn.Linear(16, 3))


def through_numpy(m, x):
    h = m.fc(x)
    return m.out(torch.from_numpy(np.maximum(h.detach().numpy(), 0)) + h)


def by_value(m, x):
    h = m.fc(x)
    return m.out(h if h.sum() > 0 else -h)


def bits(m, x):
    return m.out((m.fc(x).view(torch.int32) & -256).view(torch.float32))


def swallowed(m, x):
    try:
        if m.fc(x).max() > 1:
            x = x * 2
    except Exception:
        pass
    return m.out(m.fc(x))


def asked(m, x):
    h = m.fc(x)
    if isinstance(h, torch.Tensor):
        h = h.clamp(max=1)
    return m.out(h)


def typed(m, x):
    h = m.fc(x)
    return m.out(h.relu() if type(h) is torch.Tensor else h)


def indexed(m, x):
    h = m.fc(x)
    h[h < 0] = 0
    return m.out(h)


def called_often(m, x):
    m.calls = getattr(m, "calls", 0) + 1
    h = m.fc(x)
    return m.out(h.relu() if m.calls > 5 else h)


def in_another_thread(m, x):
    with ThreadPoolExecutor(1) as pool:
        h = pool.submit(lambda: m.fc(x).relu().detach()).result()
    return m.out(h)


def growing(m, x):
    m.__dict__.setdefault("seen", []).append(1)
    h = m.fc(x)
    return m.out(h.relu() if len(m.seen) > 9 else h)


@torch.library.custom_op("claims::kink", mutates_args=())
def kink(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


kink.register_fake(torch.empty_like)


def inferred(m, x):
    with torch.inference_mode():
        h = m.fc(x).relu()
    return m.out(h.clone())


def written(m, x):
    h = m.fc(x).detach()
    torch.clamp(h, min=0, out=h)
    return m.out(h)


def unregistered(m, x):
    return m.out(m.__dict__.setdefault("inner", [nn.ReLU()])[0](m.fc(x)))


def called_with_others(m, x):
    own = {"weight": m.fc.weight.abs(), "bias": m.fc.bias}
    return m.out(torch.func.functional_call(m.fc, own, (x,)))


def drawn(draw):
    def run(m, x):
        h = m.fc(x)
        return m.out(h if draw() < 2 else -h)

    return run


KINKS = {
    "Sequential with a forward": lambda: nn.Sequential(Block(nn.Linear(8, 16)), nn.Linear(16, 3)),
    "ModuleList with a forward": lambda: nn.Sequential(Blocks([nn.Linear(8, 8)]), nn.Linear(8, 3)),
    "__call__ of a class": lambda: nn.Sequential(Called(8, 16), nn.Linear(16, 3)),
    "_call_impl": lambda: nn.Sequential(Inner(8, 16), nn.Linear(16, 3)),
    "super().forward": lambda: nn.Sequential(Super(8, 16), nn.Linear(16, 3)),
    "__getattr__": lambda: nn.Sequential(Stored(8, 16), nn.Linear(16, 3)),
    "property": lambda: nn.Sequential(Property(8, 16), nn.Linear(16, 3)),
    "_conv_forward": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), ConvOfAbs(1, 2, 3), nn.Flatten(), nn.Linear(12, 3)
    ),
    "_conv_forward of an instance": convolution_replaced,
    "parametrization": parametrized,
    "forward of an instance": replaced,
    "method of an instance": method,
    "forward of the model": root,
    "forward hook": lambda: hooked("register_forward_hook", lambda m, i, o: o.relu()),
    "hook of the model": lambda: hooked("register_forward_hook", lambda m, i, o: o.relu(), None),
    "pre-hook": lambda: hooked(
        "register_forward_pre_hook", lambda m, i: (i[0].clamp(min=0),), at=1
    ),
    "where in a hook": lambda: hooked(
        "register_forward_hook", lambda m, i, o: torch.where(o > 0, o, 0.0)
    ),
    "parameter in a list": lambda: WeightRelu(lambda m: m.kept[0]),
    "named_parameters": lambda: WeightRelu(lambda m: dict(m.named_parameters())["w"]),
    "_parameters": lambda: WeightRelu(lambda m: m._parameters["w"]),
    "int32": lambda: own(lambda m, x: m.out(m.fc(x).to(torch.int32).float())),
    "bool": lambda: own(lambda m, x: m.out(m.fc(x).bool().float())),
    "copy into integers": lambda: own(
        lambda m, x: m.out(torch.zeros(len(x), 16, dtype=torch.long).copy_(m.fc(x)).float())
    ),
    "bits": lambda: own(bits),
    "autograd.Function": lambda: own(lambda m, x: m.out(Straight.apply(m.fc(x)))),
    "torch.jit.script": lambda: own(lambda m, x: m.out(scripted(m.fc(x)))),
    "indexing by a comparison": lambda: own(indexed),
    "isinstance": lambda: own(asked),
    "type": lambda: own(typed),
    "argmax": lambda: own(lambda m, x: m.out(m.fc(x)[m.fc(x).argmax(0) % 2])),
    "max_norm": lambda: Given(
        lambda m, x: m.out(F.embedding(x.sum(1).long() % 9, m.table.weight, max_norm=1.0)),
        fc=nn.Linear(8, 3), table=nn.Embedding(9, 16), out=nn.Linear(16, 3)
    ),
    "NumPy": lambda: own(through_numpy),
    "path by a value": lambda: own(by_value),
    "path, error caught": lambda: own(swallowed),
    "item": lambda: own(lambda m, x: m.out(m.fc(x) * m.fc(x).sum().item())),
    "another thread": lambda: own(in_another_thread),
    "list that grows": lambda: own(growing),
    "custom operator": lambda: own(lambda m, x: m.out(torch.ops.claims.kink(m.fc(x)))),
    "inference_mode": lambda: own(inferred),
    "out=": lambda: own(written),
    "vmap": lambda: own(lambda m, x: m.out(torch.vmap(lambda r: torch.relu(m.fc(r)))(x))),
    "a module that nobody registered": lambda: own(unregistered),
    "functional_call": lambda: own(called_with_others),
    "tolist": lambda: own(lambda m, x: m.out(m.fc(x) * m.out.bias.tolist()[0])),
    "state": lambda: own(called_often),
    "random": lambda: own(drawn(random.random)),
    "numpy.random": lambda: own(drawn(np.random.rand)),
    "weight_norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 3))),
}  # fmt: skip
# Functions of a forward, which `analytic` replaces.
REPLACED = {
    *("Sequential with a forward", "type", "inference_mode", "vmap", "__getattr__"),
    "__call__ of a class",
    "a module that nobody registered",
}
UNKNOWN = {
    *("NumPy", "item", "tolist", "state", "weight_norm", "another thread", "list that grows"),
    "custom operator",
}


@pytest.mark.parametrize("case", KINKS)
@pytest.mark.parametrize("given", [False, True], ids=["model alone", "example"])
def test_no_way_to_run_a_kink_is_called_analytic(case, given):
    torch.manual_seed(0)
    model = KINKS[case]()
    example = torch.randn(6, 1, 8) if case == "_conv_forward of an instance" else torch.randn(6, 8)
    model(example)
    settings = {"example_input": example if given else None}
    found = [f for f in classify(model, **settings) if f.status != "analytic"]
    hard = [f for f in found if f.status == "not analytic"]
    assert found and bool(hard) != (case in UNKNOWN), found
    assert hard or any(f.kind.startswith("function ") for f in found), found
    # what is said to be analytic once converted has no kink left, whoever runs it
    if analytic(model, **settings).is_analytic:
        assert case in REPLACED
        with KinksSeen() as seen:
            model(example)
        assert seen.found == set()


def test_hooks_of_every_module_are_seen():
    model = mlp(nn.Tanh())
    assert analytic(model).is_analytic
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: o.relu() if isinstance(m, nn.Linear) else None
    )
    try:
        report = analytic(model)
    finally:
        handle.remove()
    assert {f.status for f in report.remaining if f.kind == "function relu"} == {"not analytic"}
    assert not report.is_analytic and analytic(model).is_analytic


def test_the_premise_says_what_the_model_does():
    model = mlp(Softplus())
    model[1].register_forward_hook(lambda m, i, o: torch.relu(o - 0.5))
    rows = {r.name: r for r in tp.check_assumptions(model, torch.rand(6, 8)).rows}
    assert rows["analytic calls"].status == "failed"
    assert rows["analytic calls"].evidence == "1 (function relu) is not analytic"


class Watchful(nn.Module):
    """Leaves arrays alone; a proxy of torch.fx is one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.wide, self.last = how, nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        if self.how == "isinstance" and isinstance(x, torch.Tensor):
            x = x.clamp(max=1)
        if self.how == "try":
            try:
                if x.max() > 1:
                    x = x.clamp(max=1)
            except Exception:
                pass
        if self.how == "batch" and len(x) > 5:
            x = self.wide(x).relu()[:, :4] + x
        return self.last(torch.tanh(self.wide(x)))


@pytest.mark.parametrize("how", ["isinstance", "try", "batch"])
def test_paths_that_a_proxy_does_not_take(how):
    model, x = Watchful(how), torch.rand(6, 4) + torch.arange(6)[:, None]
    assert not analytic(model).is_analytic
    rows = {r.name: r for r in tp.check_assumptions(model, x).rows}
    # a kink of the inputs alone is a constant in the weights, in which the theorem asks h to be
    # analytic; whether it makes inputs equal is the expressivity condition's business
    assert rows["analytic calls"].status == ("failed" if how == "batch" else "held")
    kind, what = ("relu", "not analytic") if how == "batch" else ("clamp", "unknown")
    found = {f.kind: f for f in classify(model, example_input=x)}
    assert found[f"function {kind}"].status == what
    assert how == "batch" or "the inputs alone" in found["function clamp"].reason
