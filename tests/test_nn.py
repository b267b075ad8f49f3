"""Analytic modules, the replacement of kinked ones, and the wide layer."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import bits, same_bits, toy_convnet, toy_images
from torch import nn

import twophase_ext as tp
from twophase_ext.network import Network


def test_softplus_module():
    x = torch.randn(50)
    assert torch.equal(tp.nn.Softplus(7.0)(x), tp.softplus(x, 7.0))
    y = x.clone()
    assert tp.nn.Softplus(7.0, inplace=True)(y) is y and torch.equal(y, tp.softplus(x, 7.0))
    assert repr(tp.nn.Softplus(inplace=True)) == "Softplus(beta=100, inplace=True)"
    for bad in (0.0, -1.0, float("nan"), float("inf"), "100"):
        with pytest.raises(ValueError, match="beta: expected a finite number > 0"):
            tp.nn.Softplus(bad)
    module = tp.nn.Softplus(3.0)
    assert copy.deepcopy(module).beta == pickle.loads(pickle.dumps(module)).beta == 3.0


class Kinked(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Linear(4, 4), self.shared, nn.Softplus(20.0), nn.LeakyReLU())
        self.pool = nn.MaxPool1d(2)
        self.gate = nn.Hardtanh()
        self.also = self.shared

    def forward(self, x):
        x = F.relu(self.body(x)) + self.also(x)
        return self.gate(self.pool(x[None])).clamp(min=0) + torch.max(x)


def test_analytic_replaces_and_reports():
    model = Kinked().eval()
    report = tp.nn.analytic(model, beta=50.0)
    assert dict(report.replaced) == {
        "shared": "ReLU",
        "also": "ReLU",
        "body.1": "ReLU",
        "body.2": "Softplus",
        "body.3": "LeakyReLU",
    }
    assert model.shared is model.body[1] is model.also and model.shared.inplace
    assert model.shared.beta == 50.0 and model.body[2].beta == 20.0 and not model.shared.training
    remaining = " ".join(f"{a} {b}" for a, b in report.remaining)
    for expected in ("pool (MaxPool1d)", "gate (Hardtanh)", "relu()", "clamp()", "max()"):
        assert expected in remaining
    assert "average pooling" in remaining and report.traced and not report.is_analytic
    assert "replaced    body.1: ReLU -> Softplus" in str(report)


def test_analytic_on_an_analytic_network():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
    )
    report = tp.nn.analytic(model)
    assert report.is_analytic and str(report).endswith("the network is real analytic")
    assert tp.nn.analytic(toy_convnet()).is_analytic


def test_what_cannot_be_traced_is_said():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    report = tp.nn.analytic(nn.Sequential(Branching(3, 3), nn.ReLU()))
    assert not report.is_analytic  # an unknown leaf type, or untraceable

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else F.relu(x)

    report = tp.nn.analytic(Untraceable())
    assert not report.traced and "unseen" in str(report) and not report.is_analytic


def test_unknown_leaves_are_not_called_analytic():
    class Mystery(nn.Module):
        def forward(self, x):
            return x

    report = tp.nn.analytic(nn.Sequential(nn.Linear(2, 2), Mystery()))
    assert [kind.type for kind in report.unknown] == ["Mystery"] and not report.is_analytic
    with pytest.raises(ValueError, match="is itself ReLU"):
        tp.nn.analytic(nn.ReLU())


def test_classify_names_reasons():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Softplus(), nn.Dropout(0.5), nn.GELU(), nn.Mish())
    kinds = tp.nn.classify(model)
    assert [k.status for k in kinds] == [
        "analytic",
        "not analytic",
        "analytic",
        "analytic",
        "not analytic",
    ]
    assert "beta x > 20" in kinds[1].reason and "evaluation mode" in kinds[2].reason


def test_widen_nested_model():
    x, _ = toy_images(10)
    model = toy_convnet().double().eval()
    before = {k: v for k, v in bits(model).items() if not k.startswith("head.out")}
    assert tp.nn.widen(model, 10, example_input=x.double()) is model
    head = model.head["out"]
    assert isinstance(head, tp.nn.WideHead) and head.wide.out_features == 11
    assert head.wide.weight.dtype == torch.float64 and not head.training
    assert same_bits(before, {k: v for k, v in bits(model).items() if k in before})
    network = Network(model, x.double())
    assert network.last.name == "head.out.last_layer" and network.width == 11
    assert network.wide is not None and network.wide.name == "head.out.wide"


def test_widen_sequential_by_name_and_ratio():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    tp.nn.widen(model, 100, ratio=1.5, last_layer="2", beta=10.0)
    assert model[2].wide.out_features == 150 and model[2].activation.beta == 10.0
    assert model[2].last_layer.bias is None and model(torch.randn(5, 3)).shape == (5, 2)


def test_widen_errors():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for n, ratio, message in ((0, 1.1, "n: expected"), (2.5, 1.1, "n:"), (5, 0.0, "ratio:")):
        with pytest.raises(ValueError, match=message):
            tp.nn.widen(model, n, ratio)
    with pytest.raises(ValueError, match="is itself the last layer"):
        tp.nn.widen(nn.Linear(3, 2), 5)
    with pytest.raises(ValueError, match=r"has no nn\.Linear"):
        tp.nn.widen(nn.Sequential(nn.Tanh()), 5)
    with pytest.raises(TypeError, match=r"expected nn\.Linear, got Tanh"):
        tp.nn.widen(model, 5, last_layer="1")
    with pytest.raises(ValueError, match="'9' is not in the model"):
        tp.nn.widen(model, 5, last_layer="9")
