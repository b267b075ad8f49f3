"""The exact Softplus module and `widen`, the wide last hidden layer."""

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import Given
from twophase_ext.model import layers
from twophase_ext.nn import Softplus, WideHead, analytic, wide_units, widen

# Softplus


def test_softplus_has_no_threshold(device):
    # torch returns x itself from beta x = 20 on; the excess over x is there for every x
    x = torch.linspace(0.0, 0.3, 301, dtype=torch.float64, device=device)
    y = Softplus(beta=100.0)(x)
    with mpmath.workdps(40):
        exact = [mpmath.log1p(mpmath.exp(100 * mpmath.mpf(v))) / 100 for v in x.tolist()]
        ours = max(abs(mpmath.mpf(a) - b) for a, b in zip(y.tolist(), exact, strict=True))
        stable = torch.logaddexp(100 * x, torch.zeros_like(x)) / 100
        torchs = max(abs(mpmath.mpf(a) - b) for a, b in zip(stable.tolist(), exact, strict=True))
    assert ours <= 2 * torchs
    assert y[x > 0.2].gt(x[x > 0.2]).any()
    assert torch.equal(nn.Softplus(100.0)(x)[x > 0.2], x[x > 0.2])


def test_softplus_in_place(device):
    x = torch.randn(7, 5, device=device)
    y = Softplus()(x)
    assert y.data_ptr() != x.data_ptr()
    z = Softplus(inplace=True)(x)
    assert z.data_ptr() == x.data_ptr() and torch.equal(z, y)


def test_softplus_repr_and_state():
    assert repr(Softplus()) == "Softplus(beta=100)"
    assert repr(Softplus(2.5, inplace=True)) == "Softplus(beta=2.5, inplace=True)"
    assert not Softplus().state_dict()


@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf"), 1e31, 1e-31])
def test_beta_out_of_range(beta):
    for call in (
        lambda: Softplus(beta),
        lambda: analytic(nn.Sequential(nn.ReLU()), beta),
        lambda: widen(nn.Sequential(nn.Linear(2, 2)), 3, beta=beta),
    ):
        with pytest.raises(ValueError, match="beta: expected a finite number > 0"):
            call()


@pytest.mark.parametrize("beta", ["100", None, True, torch.ones(())])
def test_beta_of_another_type(beta):
    with pytest.raises(TypeError, match="beta: expected a number, got"):
        Softplus(beta)


# widen


@pytest.mark.parametrize(
    ("n", "ratio"), [(1, 1.0), (10, 1.1), (110, 1.1), (60_000, 1.1), (3, 0.5), (7, 2), (5, 1 / 3)]
)
def test_wide_units_is_the_exact_ceiling(n, ratio):
    assert wide_units(n, ratio) == math.ceil(Fraction(str(ratio)) * n)


def test_wide_units_of_the_paper():
    assert wide_units(60_000) == 66_000
    assert wide_units(110) == 121  # although 1.1 * 110 > 121 in floating point


@pytest.mark.parametrize(
    ("n", "ratio", "error", "name"),
    [
        (0, 1.1, ValueError, "n"),
        (-3, 1.1, ValueError, "n"),
        (2.0, 1.1, TypeError, "n"),
        (True, 1.1, TypeError, "n"),
        (5, 0.0, ValueError, "ratio"),
        (5, -1.0, ValueError, "ratio"),
        (5, 0.1, ValueError, "ratio"),
        (5, math.nan, ValueError, "ratio"),
        (5, math.inf, ValueError, "ratio"),
        (5, "1.1", TypeError, "ratio"),
    ],
)
def test_bad_sizes(n, ratio, error, name):
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(error, match=f"^{name}: expected"):
        widen(model, n, ratio)
    assert isinstance(model[0], nn.Linear)


def nested() -> nn.Module:
    body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    head = nn.ModuleDict({"out": nn.Linear(6, 3, bias=False)})
    return Given(lambda m, x: m.head["out"](m.body(x)), head=head, body=body)


def branching() -> nn.Module:
    return Given(
        lambda m, x: m.out(m.body(x if x.sum() > 0 else -x)),
        out=nn.Linear(6, 3),
        body=nn.Linear(4, 6),
    )


WAYS = {
    "traced": {},
    "example": {"example_input": torch.ones(2, 4)},
    "array": {"example_input": torch.ones(2, 4).numpy()},
    "name": {"last_layer": "head.out"},
}


@pytest.mark.parametrize("way", WAYS)
def test_widen_nested_last_layer(device, way):
    model = nested().to(device, torch.float32)
    body = model.body[0].weight.clone()
    arguments = dict(WAYS[way])
    if way == "example":
        arguments["example_input"] = arguments["example_input"].to(device)
    if way == "array" and device != "cpu":
        pytest.skip("NumPy arrays are on the CPU")
    model.head["out"].eval()
    assert widen(model, 10, beta=50.0, **arguments) is model
    head = model.head["out"]
    assert isinstance(head, WideHead) and not head.training and model.training
    assert (head.wide.in_features, head.wide.out_features) == (6, 11)
    assert (head.last_layer.in_features, head.last_layer.out_features) == (11, 3)
    assert head.activation.beta == 50.0
    assert head.wide.bias is not None and head.last_layer.bias is not None
    assert torch.equal(model.body[0].weight, body)
    x = torch.randn(5, 4, device=device)
    last = layers.find_last_layer(model, x)
    wide = layers.find_wide_layer(model, x, last)
    assert last.name == "head.out.last_layer"
    assert wide is not None and wide.linear_name == "head.out.wide"
    z = model.body(x)
    assert torch.equal(model(x), head.last_layer(tp.softplus(head.wide(z), 50.0)))
    assert analytic(model).is_analytic


def test_widen_keeps_dtype_and_default_initialisation():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    torch.manual_seed(4)
    widen(model, 10)
    torch.manual_seed(4)
    wide, last = nn.Linear(4, 11, dtype=torch.float64), nn.Linear(11, 3, dtype=torch.float64)
    assert torch.equal(model[0].wide.weight, wide.weight)
    assert torch.equal(model[0].last_layer.weight, last.weight)
    assert torch.equal(model[0].last_layer.bias, last.bias)


def test_widen_sequential_twice_and_shared_name():
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 3)))
    model.alias = model[1][0]
    model = Given(lambda m, x: m.net[1](m.net[0](x)), net=model)
    widen(model, 2)
    assert model.net.alias is model.net[1][0]
    widen(model, 3)
    assert isinstance(model.net[1][0].last_layer, WideHead)
    assert model(torch.ones(2, 4)).shape == (2, 3)


def test_widen_a_subclass_of_linear():
    class Named(nn.Linear):
        pass

    model = widen(nn.Sequential(Named(4, 3)), 2)
    assert isinstance(model[0], WideHead)


def test_widen_wrapped_model():
    inner = nn.Sequential(nn.Linear(4, 3))
    model = nn.DataParallel(inner)
    assert widen(model, 2) is model
    assert isinstance(inner[0], WideHead)


def test_widen_asks_where_it_cannot_tell():
    with pytest.raises(ValueError, match=r"could not be traced.*give last_layer or example_input"):
        widen(branching(), 5)
    assert isinstance(widen(branching(), 5, example_input=torch.ones(2, 4)).out, WideHead)
    assert isinstance(widen(branching(), 5, last_layer="out").out, WideHead)


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (nn.Linear(4, 3), {}, ValueError, "model: it is itself the last layer"),
        (nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), {}, ValueError, r"not the output.*'0'"),
        (
            nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)),
            {"example_input": torch.ones(2, 4)},
            ValueError,
            r"not the output.*'0'",
        ),
        (nn.Sequential(nn.Tanh()), {}, ValueError, "affine layers: none"),
        (nn.Sequential(nn.Tanh()), {"last_layer": "0"}, TypeError, "got Tanh"),
        (nn.Sequential(nn.Linear(4, 3)), {"last_layer": "x"}, ValueError, r"'x' is not in .*'0'"),
        (nn.Sequential(nn.Linear(4, 3)), {"example_input": "x"}, TypeError, "example_input: "),
    ],
)
def test_widen_refuses(model, arguments, error, message):
    with pytest.raises(error, match=message):
        widen(model, 5, **arguments)
    assert not any(isinstance(m, WideHead) for m in model.modules())
