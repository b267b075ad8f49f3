"""Analytic functions in the places of those with kinks: in modules, and in what a forward calls."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import Given
from twophase_ext.nn import analytic, classify

PIECEWISE = [
    *(nn.ReLU6(), nn.Hardtanh(-0.5, 2.0), nn.LeakyReLU(0.2), nn.PReLU(3), nn.Hardsigmoid()),
    *(nn.Hardswish(), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, ceil_mode=True)),
    *(nn.MaxPool2d((2, 3), (1, 2), (1, 0), (2, 1)), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    *(nn.AdaptiveMaxPool2d(1), nn.AdaptiveMaxPool2d((1, 1))),
]


@pytest.mark.parametrize("old", PIECEWISE, ids=repr)
@pytest.mark.parametrize("beta", [20.0, 1e4])
def test_piecewise_functions_get_softplus_for_each_kink(old, beta):
    x = 4 * torch.randn(2, 3, 9, 8, dtype=torch.float64)
    model = nn.Sequential(nn.Identity(), old.double())
    before = model(x)
    report = analytic(model, beta=beta)
    assert report.is_analytic and len(report.replaced) == 1
    assert type(model[1]).__name__.startswith("Smooth") and report.replaced[0].note == ""
    after = model(x)
    assert after.shape == before.shape
    # log 2 / beta a kink, which hardswish multiplies by x; log k / beta of the largest of k
    most = math.log(72) if "Pool" in repr(old) else 2 * math.log(2) * float(x.abs().max())
    gap = float((after - before).abs().max())
    assert gap <= most / beta + 1e-12 and (gap > 0 or beta > 20)
    if "Pool" in repr(old):
        assert bool((after >= before - 1e-12).all())
    assert torch.autograd.gradcheck(model, x[:1, :, :5, :5].clone().requires_grad_())


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_max_pooling_of_every_dimension(axes):
    x = torch.randn(2, 3, *(9, 8, 7)[:axes], dtype=torch.float64)
    for settings in ({"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2}):
        old = getattr(nn, f"MaxPool{axes}d")(**settings)
        model = nn.Sequential(nn.Identity(), old)
        analytic(model, beta=1e6)
        torch.testing.assert_close(model(x), old(x), rtol=0, atol=1e-5)
        model = nn.Sequential(nn.Identity(), old)
        report = analytic(model, pooling="average")
        mean = getattr(nn, f"AvgPool{axes}d")(**settings, count_include_pad=False)
        assert report.is_analytic and torch.equal(model(x), mean(x))
    with pytest.raises(ValueError, match='pooling: expected "smooth" or "average", got'):
        analytic(nn.Sequential(nn.ReLU()), pooling="mean")


REPLACED_CALLS = {
    "relu": lambda m, x: F.relu(m.fc(x)),
    "relu in place": lambda m, x: F.relu(m.fc(x), inplace=True),
    "relu_": lambda m, x: F.relu_(m.fc(x)),
    "torch.relu": lambda m, x: torch.relu(m.fc(x)),
    "method relu": lambda m, x: m.fc(x).relu(),
    "method relu_": lambda m, x: m.fc(x).relu_(),
    "relu6": lambda m, x: F.relu6(m.fc(x)),
    "hardtanh": lambda m, x: F.hardtanh(m.fc(x), -0.2, max_val=0.3),
    "hardtanh in place": lambda m, x: F.hardtanh(m.fc(x) * 2, inplace=True),
    "leaky_relu": lambda m, x: F.leaky_relu(m.fc(x)),
    "leaky_relu by position": lambda m, x: F.leaky_relu(m.fc(x), 0.3, True),
    "hardsigmoid": lambda m, x: F.hardsigmoid(9 * m.fc(x)),
    "hardswish": lambda m, x: F.hardswish(9 * m.fc(x)),
    "max_pool1d": lambda m, x: F.max_pool1d(m.fc(x), 2),
    "max_pool2d": lambda m, x: F.max_pool2d(m.fc(x)[None], 2, padding=1),
    "an inner module's": lambda m, x: m.__dict__.setdefault("own", [nn.ReLU()])[0](m.fc(x)),
}


@pytest.mark.parametrize("case", REPLACED_CALLS)
def test_functions_of_a_forward_are_replaced(case, tmp_path):
    torch.manual_seed(0)
    inner = Given(REPLACED_CALLS[case], fc=nn.Linear(4, 4))
    model = nn.Sequential(inner).double()
    keys, x = list(model.state_dict()), torch.randn(4, 4, dtype=torch.float64)
    before = model(x)
    report = analytic(model, beta=1e2, example_input=x)
    assert report.is_analytic and [r.name for r in report.replaced] == ["0"], str(report)
    assert model[0] is inner and isinstance(inner, Given) and list(model.state_dict()) == keys
    after = model(x)
    gap = float((after - before).abs().max())
    assert 0 < gap < 0.1
    assert all(f.status == "analytic" for f in classify(model, example_input=x))
    for again in (copy.deepcopy(model), *_saved(model, tmp_path, case)):
        assert torch.equal(again(x), after) and type(again[0]) is type(inner)
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert bool(leaf.grad.isfinite().all())


def _saved(model, folder, case):
    """As torch.save keeps it: a lambda it does not."""
    if case != "relu":
        return []
    model = nn.Sequential(Relu(), nn.Flatten()).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    analytic(model, beta=1e4, example_input=x)
    torch.save(model, folder / "m.pt")
    again = torch.load(folder / "m.pt", weights_only=False)
    assert torch.equal(again(x), model(x)) and not torch.equal(again(x), model[0].fc(x).relu())
    return []


class Relu(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return F.relu(self.fc(x))


def test_replaced_functions_compile_and_train_with_torch_compile():
    torch.manual_seed(0)
    model, x = nn.Sequential(Relu()), torch.randn(4, 4)
    analytic(model, example_input=x)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
