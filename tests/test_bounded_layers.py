"""Bounds of the features' rounding errors, judged by 40-digit arithmetic."""

import pytest
import torch
from torch import nn
from torch.func import jvp, vjp

import exact_layers
import twophase_ext as tp
from exact_layers import distances, exactly
from twophase.models import MLP, PreActResNet18, SmallConvNet
from twophase_ext.expressivity.backbone import branches, damped
from twophase_ext.expressivity.running.engine import Running
from twophase_ext.expressivity.running.features import bounded_features

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (7,)),
    "linear on rows": (lambda: nn.Linear(4, 3), (5, 4)),
    "conv": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 5)),
    "conv, stride": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (2, 6, 5)),
    "conv, dilation, groups": (lambda: nn.Conv2d(4, 6, (2, 3), dilation=2, groups=2), (4, 6, 6)),
    "conv, same": (lambda: nn.Conv2d(1, 2, 3, padding="same", dilation=2), (1, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "batch norm": (lambda: _filled(nn.BatchNorm2d(3)), (3, 3, 2)),
    "batch norm of rows": (lambda: _filled(nn.BatchNorm1d(5)), (5,)),
    "layer norm": (lambda: _filled(nn.LayerNorm(6)), (6,)),
    "layer norm of images": (lambda: _filled(nn.LayerNorm((3, 4))), (2, 3, 4)),
    "softplus": (lambda: tp.nn.Softplus(10.0), (9,)),
    "softplus in place": (lambda: tp.nn.Softplus(100.0, inplace=True), (3, 4)),
    "relu": (nn.ReLU, (9,)),
    "sigmoid": (nn.Sigmoid, (9,)),
    "tanh": (nn.Tanh, (9,)),
    "silu": (nn.SiLU, (9,)),
    "gelu": (nn.GELU, (9,)),
    "average pool": (lambda: nn.AvgPool2d(2), (2, 6, 4)),
    "average pool, overlap": (lambda: nn.AvgPool2d(4, 2, padding=1), (2, 6, 4)),
    "adaptive pool": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 7)),
    "flatten": (nn.Flatten, (2, 3, 2)),
    "dropout": (nn.Dropout, (4,)),
    "identity": (nn.Identity, (4,)),
}


pytestmark = pytest.mark.usefixtures("one_thread")


ENTER = Running.enter
EXACT = {"relu", "flatten", "dropout", "identity"}


def _filled(norm, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*norm.named_parameters(), *norm.named_buffers()]:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=g))
                if name == "running_var":
                    value.abs_()
    return norm


def _seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def _features(layer, x, **settings):
    """bounded_features of a layer, flattened, and the module they enter."""
    stop = nn.Identity()
    model = nn.Sequential(layer, nn.Flatten(), stop).double().eval()
    return bounded_features(model, stop, [x], n=len(x), **settings)


def _assert_bounds(found, true, most=1e6):
    apart = distances(found.z, true.reshape(len(true), -1))
    bounds = found.error.tolist()
    assert all(a <= b for a, b in zip(apart, bounds, strict=True))
    size = float(found.z.norm(dim=1).max())
    assert max(bounds) <= most * max(max(apart), 2.0**-53 * size)


@pytest.mark.parametrize("name", LAYERS)
def test_rounding_of_every_layer(name):
    make, shape = LAYERS[name]
    layer = _seeded(make)
    g = torch.Generator().manual_seed(1)
    for size in (1.0, 1e-3, 40.0):
        x = torch.randn(4, *shape, generator=g, dtype=torch.float64) * size
        found = _features(layer, x)
        _assert_bounds(found, exact_layers.run(layer.eval(), exactly(x)))
        assert name in EXACT or bool((found.error > 0).all())


@pytest.mark.parametrize("name", LAYERS)
def test_errors_pass_through_every_layer(name, monkeypatch):
    make, shape = LAYERS[name]
    layer = _seeded(make).double().eval()
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, *shape, generator=g, dtype=torch.float64)
    # the direction that the layer amplifies most
    direction = torch.randn(3, *shape, generator=g, dtype=torch.float64)
    for _ in range(8):
        with torch.no_grad():
            out = jvp(lambda v: layer(v.clone()), (x,), (direction,))[1]
        direction = vjp(lambda v: layer(v.clone()), x)[1](out)[0]
        direction = direction / direction.flatten(1).norm(dim=1).view(3, *[1] * len(shape))
    for size in (1e-9, 1e-2):
        error = torch.full((3,), size * (1 + 1e-12), dtype=torch.float64)
        with monkeypatch.context() as patch:
            patch.setattr(Running, "enter", lambda self, x, e=error: ENTER(self, x, e))
            found = _features(layer, x)
        moved = exactly(x) + exactly(direction * size)
        apart = distances(found.z, exact_layers.run(layer, moved).reshape(3, -1))
        bounds = found.error.tolist()
        assert all(a <= b for a, b in zip(apart, bounds, strict=True))
        loose = 40 if "norm" in name else 5
        assert all(b <= loose * a for a, b in zip(apart, bounds, strict=True))


@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv", "batch norm", "conv1d"])
def test_bound_holds_under_cancellation(name):
    """Large numbers that cancel: the result is nothing but rounding."""
    make, shape = LAYERS[name]
    layer = _seeded(make).double()
    g = torch.Generator().manual_seed(3)
    x = torch.randn(20, *shape, generator=g, dtype=torch.float64) * 1e12
    with torch.no_grad():
        for bias in [layer.bias] if layer.bias is not None else []:
            flat = layer(x).flatten(2).mean(2) if x.dim() > 2 else layer(x)
            bias.copy_(bias - flat[0])
    _assert_bounds(_features(layer, x), exact_layers.run(layer.eval(), exactly(x)))


def test_worst_rounding_comes_near_the_bound():
    """Half the gamma term, and this layer's error is above it."""
    k = 4
    weight = torch.full((1, k), 1 + 2.0**-52, dtype=torch.float64)
    layer = nn.Linear(k, 1, bias=False).double()
    layer.weight.data = weight
    g = torch.Generator().manual_seed(0)
    x = 1 + torch.rand(3_000, k, generator=g, dtype=torch.float64)
    found = _features(layer, x)
    true = (exactly(x) @ exactly(weight).T)[:, 0]
    apart = torch.tensor(
        [float(abs(a - b)) for a, b in zip(exactly(found.z)[:, 0], true, strict=True)]
    )
    assert bool((apart <= found.error).all())
    assert float((apart / found.error).max()) > 0.1


def _randomised(model, seed=0):
    for i, m in enumerate(model.modules()):
        if isinstance(m, nn.BatchNorm2d):
            _filled(m, seed + i)
            m.running_var.add_(0.5)
    return model


@pytest.mark.parametrize("factor", [1.0, 0.125, 0.0])
def test_preact_resnet(factor):
    model = _randomised(_seeded(lambda: PreActResNet18(width=2, wide=5))).double().eval()
    g = torch.Generator().manual_seed(4)
    x = torch.rand(2, 1, 8, 8, generator=g, dtype=torch.float64)
    found = branches(model, [model.head[0]], x)
    model.load_state_dict(model.state_dict() | damped(model, found, [factor] * len(found)))
    found = bounded_features(model, model.head[0], [x[:1], x[1:]], n=2)
    true = exact_layers.preact_features(model.eval(), exactly(x))
    apart = distances(found.z, true)
    assert all(a <= b for a, b in zip(apart, found.error.tolist(), strict=True))
    assert float(found.error.max()) < (1e-3 if factor else 1e-9)


@pytest.mark.parametrize("which", ["mlp", "convnet", "tanh mlp"])
def test_whole_models(which):
    g = torch.Generator().manual_seed(5)
    if which == "convnet":
        model = _randomised(_seeded(lambda: SmallConvNet(width=1, wide=4)))
        stop, inner, x = model.head[0], model.backbone, torch.rand(2, 1, 8, 8, generator=g)
    else:
        act = nn.Tanh if which == "tanh mlp" else tp.nn.Softplus
        model = _seeded(lambda: MLP([6, 8, 7, 20, 2], activation=act))
        inner = nn.Sequential(*list(model)[:4])
        stop, x = model[4], torch.randn(4, 6, generator=g)
    x = x.double()
    found = bounded_features(model.double().eval(), stop, [x], n=len(x))
    _assert_bounds(found, exact_layers.run(inner.eval(), exactly(x)), 1e5)
    assert any("units in the last place" in a for a in found.assumptions) == (which == "tanh mlp")
    assert any("softplus" in a for a in found.assumptions) == (which != "tanh mlp")
