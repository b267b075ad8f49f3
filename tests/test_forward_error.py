"""Bounds of the features' rounding errors, judged by 40-digit arithmetic."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import jvp, vjp

import exact_layers
import twophase_ext as tp
from exact_layers import distances, exactly
from helpers import Given, toy_convnet
from twophase.models import MLP, PreActResNet18, SmallConvNet
from twophase_ext.expressivity import forward_error
from twophase_ext.expressivity.bounded import Bounded
from twophase_ext.expressivity.forward_error import Unbounded, bounded_features, damped
from twophase_ext.expressivity.operator_norms import conv_norms, convolve, linear_norms, pool_norm

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


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: on a busy machine threads mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    model = nn.Sequential(layer, nn.Flatten(), stop)
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
        monkeypatch.setattr(forward_error, "exact", lambda value, e=error: Bounded(value, e))
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


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_convolutions_and_their_norms(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    groups = draw(1, 2)
    kernel, stride, dilation = [(draw(1, 3), draw(1, 3)) for _ in range(3)]
    padding = [(draw(0, 2), draw(0, 2)) for _ in range(2)]
    whole = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [draw(max(1, w - sum(p)), 7) for w, p in zip(whole, padding, strict=True)]
    g = torch.Generator().manual_seed(draw(0, 1000))
    weight = torch.randn(
        2 * groups, draw(1, 2), *kernel, dtype=torch.float64, generator=g
    ) * 10.0 ** draw(-3, 3)
    if draw(0, 1):
        weight[:, :, 1:] *= 0.01  # one tap prevails
    shape = (weight.shape[1] * groups, *size)
    inputs = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    outputs = convolve(inputs, weight, None, stride, padding, dilation, groups)
    (top, bottom), (left, right) = padding
    padded = F.pad(inputs, (left, right, top, bottom))
    assert torch.equal(outputs, F.conv2d(padded, weight, None, stride, 0, dilation, groups))
    matrix = outputs.flatten(1)
    norms = conv_norms(weight, stride, dilation, groups)
    for bound, m in ((norms.plain, matrix), (norms.absolute, matrix.abs())):
        assert float(torch.linalg.matrix_norm(m, 2)) <= bound


@pytest.mark.parametrize("taps", [1, 9])
def test_norms_of_convolutions_are_close(taps):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 8, 3, 3, generator=g, dtype=torch.float64)
    if taps == 1:
        weight[:, :, 1:] = 0
        weight[:, :, :, 1:] = 0
    eye = torch.eye(8 * 36, dtype=torch.float64).reshape(-1, 8, 6, 6)
    matrix = convolve(eye, weight, None, (1, 1), ((1, 1), (1, 1)), (1, 1), 1).flatten(1)
    true = float(torch.linalg.matrix_norm(matrix, 2))
    assert true <= conv_norms(weight, (1, 1), (1, 1), 1).plain <= (1.2 if taps == 1 else 2.5) * true


def test_norm_of_a_matrix_is_close():
    g = torch.Generator().manual_seed(0)
    for shape in ((30, 200), (200, 30), (1, 5), (7, 7)):
        weight = torch.randn(shape, generator=g, dtype=torch.float64)
        norms = linear_norms(weight)
        for bound, m in ((norms.plain, weight), (norms.absolute, weight.abs())):
            true = float(torch.linalg.matrix_norm(m, 2))
            assert true <= bound <= 1.05 * true


@pytest.mark.parametrize("size, output", [(6, 3), (7, 3), (2, 5), (5, 1)])
def test_norm_of_pooling(size, output):
    eye = torch.eye(size, dtype=torch.float64)
    matrix = F.adaptive_avg_pool1d(eye[:, None], output)[:, 0]
    windows = [range(i * size // output, -(-(i + 1) * size // output)) for i in range(output)]
    true = float(torch.linalg.matrix_norm(matrix, 2))
    assert true <= pool_norm([size], [windows]) <= 1.5 * true


def _randomised(model, seed=0):
    for i, m in enumerate(model.modules()):
        if isinstance(m, nn.BatchNorm2d):
            _filled(m, seed + i)
            m.running_var.add_(0.5)
    return model


@pytest.mark.parametrize("factor", [1.0, 0.125, 0.0])
def test_preact_resnet(factor):
    model = _randomised(_seeded(lambda: PreActResNet18(width=2, wide=5)))
    if factor < 1:
        model.load_state_dict(model.state_dict() | damped(model, factor))
    g = torch.Generator().manual_seed(4)
    x = torch.rand(2, 1, 8, 8, generator=g)
    said = []
    found = bounded_features(model, model.head[0], [x[:1], x[1:]], n=2, say=said.append)
    true = exact_layers.preact_features(model.eval(), exactly(x))
    apart = distances(found.z, true)
    assert all(a <= b for a, b in zip(apart, found.error.tolist(), strict=True))
    assert float(found.error.max()) < (1e-3 if factor else 1e-9)
    assert ("8 layers of zero weights" in said[0]) == (factor == 0)


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
    found = bounded_features(model, stop, [x], n=len(x))
    _assert_bounds(found, exact_layers.run(inner.eval(), exactly(x)), 1e5)
    assert any("units in the last place" in a for a in found.assumptions) == (which == "tanh mlp")
    assert any("softplus" in a for a in found.assumptions) == (which != "tanh mlp")


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
    model = _seeded(lambda: MLP([3, 4, 9, 2]))
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
