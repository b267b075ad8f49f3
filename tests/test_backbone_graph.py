"""What the graph of a backbone sees, what it refuses, and what it leaves out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import Given, toy_convnet
from twophase.models import MLP, PreActResNet18
from twophase_ext.expressivity.forward_error import Unbounded, bounded_features, damped


def _augmented(x):
    x *= 2
    x += x - 1
    return x


def _net(run, **modules):
    """A model whose features are run(self, x), and x of 4 samples [4, 3, 4, 4]."""
    model = Given(lambda m, x: m.last(run(m, x)), last=nn.Identity(), **modules)
    g = torch.Generator().manual_seed(6)
    return model, torch.randn(4, 3, 4, 4, generator=g)


FUNCTIONAL = {
    "shapes": lambda m, x: x.view(x.size(0), -1).reshape(x.shape[0], 4, -1).flatten(1),
    "permute": lambda m, x: x.permute(0, 2, 3, 1).transpose(1, -1).contiguous().flatten(1),
    "torch.flatten": lambda m, x: torch.flatten(x, 1),
    "pool": lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "means": lambda m, x: x.mean((2, 3)) + x.mean(-1).mean(dim=2) - torch.sum(x, [2, 3]),
    "scalars": lambda m, x: (2 * x / 3 - 1 + (1 - x) * 0.1).mean((2, 3)).neg(),
    "cat": lambda m, x: torch.cat([x, -x], 1).mean((2, 3)),
    "softplus": lambda m, x: tp.softplus(tp.softplus(x, 5.0).mean((2, 3)), beta=7.0),
    "in place": lambda m, x: tp.softplus_(x.mean((2, 3)), 5.0),
    "smooth": lambda m, x: F.gelu(F.silu(torch.tanh(torch.sigmoid(x).tanh()))).mean((2, 3)),
    "relu": lambda m, x: F.relu(torch.relu(x).relu(), inplace=True).mean((2, 3)),
    "linear": lambda m, x: F.linear(F.pad(x, (1, 1)), m.fc.weight, m.fc.bias).mean((2, 3)),
    "conv": lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, padding=1).mean((2, 3)),
    "dropout off": lambda m, x: F.dropout(x, 0.3, m.training).mean((2, 3)),
    "parameter": lambda m, x: (
        (x * m.bn.weight.double().view(1, -1, 1, 1)).mean((2, 3))
        if False
        else (x.mean((2, 3)) * m.bn.weight + m.bn.bias)
    ),
    "size arithmetic": lambda m, x: x.view(x.size(0), x.size(1) * x.size(2), -1).mean(2),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_forms(name):
    """Judged by the model itself in float64: errors far below the check's own tolerance."""
    modules = {"fc": nn.Linear(6, 5), "conv": nn.Conv2d(3, 2, 3), "bn": nn.BatchNorm1d(3)}
    model, x = _net(FUNCTIONAL[name], **modules)
    found = bounded_features(model, model.last, [x], n=4)
    with torch.no_grad():
        true = model.double().eval()(x.double())
    assert found.z.shape == true.shape
    assert bool(((found.z - true).norm(dim=1) <= found.error).all())
    assert float(found.error.max()) < 1e-13


class _Strange(nn.Module):
    def forward(self, x):
        return x.clamp(min=0)


REFUSED = {
    "no rule": (lambda m, x: m.a(x), nn.MaxPool2d(2), "a (MaxPool2d)"),
    "torch's softplus": (lambda m, x: m.a(x), nn.Softplus(), "a (Softplus)"),
    "functional softplus": (lambda m, x: F.softplus(x), None, "softplus in the model"),
    "user's module": (lambda m, x: m.a(x), _Strange(), "clamp in a's forward"),
    "batch statistics": (
        lambda m, x: m.a(x),
        nn.BatchNorm2d(3, track_running_stats=False),
        "a (BatchNorm2d)",
    ),
    "reflected": (
        lambda m, x: m.a(x),
        nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"),
        "padding_mode",
    ),
    "tanh gelu": (lambda m, x: F.gelu(x, approximate="tanh"), None, "gelu"),
    "dropout on": (lambda m, x: F.dropout(x), None, "dropout is on"),
    "mixes by mean": (lambda m, x: x - x.mean((0, 2), keepdim=True), None, "mixes the samples"),
    "mixes by view": (lambda m, x: x.reshape(-1, 2, 3), None, "mixes the samples"),
    "mixes by permute": (lambda m, x: x.permute(2, 0, 1, 3), None, "mixes the samples"),
    "mixes by transpose": (lambda m, x: x.transpose(0, -1), None, "mixes the samples"),
    "mixes by cat": (lambda m, x: torch.cat([x, x]), None, "mixes the samples"),
    "product": (lambda m, x: x * x, None, "product of two activations"),
    "broadcast": (lambda m, x: x + x.mean(1, keepdim=True), None, "operands of shapes"),
    "half": (lambda m, x: x.half(), None, "half"),
    "random": (lambda m, x: x + torch.rand(1), None, "random"),
    "branches": (lambda m, x: x if x.sum() > 0 else -x, None, "cannot trace"),
    "made of constants": (
        lambda m, x: x * (m.a.running_mean + 1).sum(),
        nn.BatchNorm2d(3),
        "const",
    ),
    "overwritten": (lambda m, x: _act(10.0)(x) + x, None, "overwritten in place"),
    "overwritten view": (lambda m, x: _overwritten_view(x), None, "overwritten in place"),
    "written by index": (lambda m, x: _written_by_index(x), None, "cannot trace"),
    "eps": (lambda m, x: m.a(x), nn.BatchNorm2d(3, eps=0.0), "eps > 0"),
}


def _act(beta):
    return lambda x: tp.softplus_(x, beta)


def _overwritten_view(x):
    y = x * 2
    rows = y.flatten(1)
    y += 1
    return rows


def _written_by_index(x):
    y = x * 2
    y[:, 0] = 0
    return y


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_culprit(name):
    run, module, text = REFUSED[name]
    modules = {} if module is None else {"a": module}
    model, x = _net(lambda m, x: run(m, x).flatten(1), **modules)
    with pytest.raises(Unbounded) as caught:
        bounded_features(model, model.last, [x], n=4)
    assert text in str(caught.value)


def test_hooks_and_parametrizations_are_refused():
    for change in (
        lambda fc: fc.register_forward_hook(lambda *_: None),
        lambda fc: fc.register_forward_pre_hook(lambda *_: None),
        lambda fc: nn.utils.parametrizations.weight_norm(fc),
        lambda fc: nn.utils.weight_norm(fc),
        lambda fc: setattr(fc, "forward", lambda x: x),
    ):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        change(model[0])
        with pytest.raises(Unbounded, match=r"^0|copied"):
            bounded_features(model, model[1], [torch.randn(2, 3)], n=2)


def test_a_graph_that_is_not_the_model_is_refused():
    calls = itertools.count()
    model, x = _net(lambda m, x: (x * (1.0 + next(calls))).mean((2, 3)))
    with pytest.raises(Unbounded, match="do not reproduce"):
        bounded_features(model, model.last, [x], n=4)


def test_subclasses_are_seen_through():
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Shifted(3, 4), tp.nn.Softplus(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    found = bounded_features(model, model[2], [x], n=5)
    true = tp.softplus(model[0].double()(x.double()))
    assert torch.allclose(found.z, true, atol=1e-14)


def test_zero_layers_cost_nothing_and_give_their_bias():
    class Branch(nn.Module):
        def forward(self, x):
            return x.clamp(min=0)  # without a rule: a result that were needed would be refused

    model, x = _net(
        lambda m, x: (x + m.conv(m.branch(x))).mean((2, 3)),
        conv=nn.Conv2d(3, 3, 3, padding=1),
        branch=Branch(),
    )
    with pytest.raises(Unbounded, match="clamp"):
        bounded_features(model, model.last, [x], n=4)
    nn.init.zeros_(model.conv.weight)
    found = bounded_features(model, model.last, [x], n=4)
    true = (x.double() + model.conv.bias.double()[:, None, None]).mean((2, 3))
    assert torch.allclose(found.z, true, atol=1e-14)
    assert bool(((found.z - true).norm(dim=1) <= found.error).all())


def test_arguments_and_batches():
    model = MLP([3, 4, 9, 2])
    x = torch.randn(6, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = []
    whole = bounded_features(model, model[2], [x], n=6)
    parts = bounded_features(model, model[2], [x[:4], x[4:]], n=6, progress=done.append)
    assert done == [4, 2]
    assert torch.allclose(whole.z, parts.z, atol=1e-15) and whole.z.dtype == torch.float64
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for batches, n in (([x], 5), ([x], 7), ([], 1), ([x[0]], 1)):
        with pytest.raises(ValueError, match="batches"):
            bounded_features(model, model[2], batches, n=n)
    with pytest.raises(ValueError, match="stop"):
        bounded_features(model, nn.Linear(3, 3), [x], n=6)
    with pytest.raises(Unbounded, match="dtype"):
        bounded_features(model, model[2], [x.long()], n=6)
    huge = bounded_features(model, model[2], [x.double() * 1e308], n=6)
    assert not bool(huge.error.isfinite().all())


def test_damped_names_the_branches():
    preact = PreActResNet18(width=1, wide=4)
    names = {f"blocks.{i}.conv2.weight" for i in range(8)}
    assert damped(preact, 0.5).keys() == names
    for name, value in damped(preact, 0.25).items():
        assert torch.equal(value, preact.state_dict()[name] / 4)
    plain = {f"blocks.{i}.conv2.weight" for i in (0, 1, 3, 5, 7)}  # beside an identity
    assert damped(preact, 1.0, 0.0).keys() == plain
    changed = damped(preact, 0.5, identity=0.25)
    for name, value in changed.items():
        assert torch.equal(value, preact.state_dict()[name] * (0.25 if name in plain else 0.5))
    assert changed.keys() == names
    assert damped(toy_convnet(), 0.0).keys() == {"conv.weight", "conv.bias"}
    assert damped(MLP([3, 4, 9, 2]), 0.0) == {}
    # a longer shortcut without weights, and a branch that ends in a norm
    model, _ = _net(
        lambda m, x: m.bn(m.b(m.a(x))) + x.neg().neg().neg().neg(),
        a=nn.Conv2d(3, 3, 1),
        b=nn.Conv2d(3, 3, 1, bias=False),
        bn=nn.BatchNorm2d(3),
    )
    assert damped(model, 0.0).keys() == {"b.weight"}
    model, _ = _net(lambda m, x: x if x.sum() > 0 else -x)
    assert damped(model, 0.0) == {}


@pytest.mark.parametrize("value, error", [(1.5, ValueError), (-0.5, ValueError), ("0", TypeError)])
def test_damped_checks_its_factors(value, error):
    with pytest.raises(error, match="factor"):
        damped(MLP([3, 4, 9, 2]), value)
    with pytest.raises(error, match="identity"):
        damped(MLP([3, 4, 9, 2]), 0.5, value)
