"""Roots, logarithms and quotients whose argument is > 0 for all weights are analytic."""

import pytest
import torch
from torch import nn

from helpers import Given
from twophase_ext.nn import classify


def of(run):
    return Given(run, fc=nn.Linear(4, 4), out=nn.Linear(4, 2))


ANALYTIC = {
    "RMS norm": lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
    "squares": lambda h: h / (h * h + 0.1).sqrt(),
    "square": lambda h: (h.square().sum(-1, keepdim=True) + torch.tensor(0.5)).log() + h,
    "exponentials": lambda h: h.exp() / h.exp().sum(-1, keepdim=True),
    "reciprocal": lambda h: 1 / (1 + h.exp()),
    "variance": lambda h: h / (h.var(-1, keepdim=True) + 1e-5).sqrt(),
    "power": lambda h: (h**4 + 1) ** 0.3,
    "a buffer": lambda h: h / torch.tensor([1.0, 2.0, 3.0, 4.0]).sqrt(),
}
UNKNOWN = {
    "root": lambda h: h.sqrt(),
    "root of squares": lambda h: (h * h).sqrt(),  # |h|
    "less an eps": lambda h: (h * h - 1e-6).sqrt(),
    "product of two": lambda h: (h * h.flip(-1) + 0.1).sqrt(),
    "cube": lambda h: (h**3 + 1).log(),
    "written over": lambda h: _written(h).sqrt(),
    "quotient": lambda h: 1 / h,
    "masked exponentials": lambda h: 1 / _masked(h).exp(),
    "tan": lambda h: h.exp().tan(),
    "arccosine": lambda h: h.exp().acos(),
}


def _written(h):
    squares = h * h + 1
    squares[:, 0] = h[:, 0]
    return squares


def _masked(h):
    return h.masked_fill(torch.tensor([True, False, False, False]), -float("inf"))


@pytest.mark.parametrize("case", ANALYTIC)
def test_arguments_above_zero(case):
    torch.manual_seed(0)
    model = of(lambda m, x: m.out(ANALYTIC[case](m.fc(x))))
    found = classify(model, example_input=torch.randn(5, 4))
    assert all(f.status == "analytic" for f in found), found


@pytest.mark.parametrize("case", UNKNOWN)
def test_arguments_of_any_sign(case):
    torch.manual_seed(0)
    model = of(lambda m, x: m.out(UNKNOWN[case](m.fc(x))))
    found = classify(model, example_input=torch.randn(5, 4))
    assert any(f.status != "analytic" and f.kind.startswith("function ") for f in found), found
