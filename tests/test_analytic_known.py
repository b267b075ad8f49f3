"""What is known to be analytic is said: functions of the inputs alone, what eval mode skips."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import Given
from twophase_ext.nn import Softplus, analytic, classify


def own(run) -> nn.Module:
    return Given(run, fc=nn.Linear(8, 16), out=nn.Linear(16, 3))


class Tokens(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.table, self.fc, self.act = nn.Embedding(50, 16, padding_idx=0), nn.Linear(16, 16), act
        self.out = nn.Linear(16, 2)

    def forward(self, x):
        keep = (x != 0).unsqueeze(-1).float()
        return self.out(self.act(self.fc((self.table(x) * keep).sum(1))))


class Depth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.aux = nn.Linear(8, 8), nn.Linear(8, 3), Given(lambda m, x: x.abs())

    def forward(self, x):
        h = torch.tanh(self.fc(x))
        if self.training:
            return self.aux(h) * torch.bernoulli(torch.full((len(x), 1), 0.5))
        return self.out(h)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(8, 8), nn.Embedding(8, 8)
        self.register_buffer("mask", torch.randn(8).sign().abs() > 0)

    def forward(self, x):
        h = self.fc(x) + self.table(x.argmax(-1)) * F.one_hot(x.argmin(-1), 8)
        return h.masked_fill(~self.mask, 0.0) * torch.ones_like(h).tril().ne(0)


ANALYTIC = {
    "mask of token ids": lambda: Tokens(nn.Tanh()),
    "stochastic depth in eval mode": Depth,
    "positions of the inputs' extremes": Positions,
    "fft": lambda: own(lambda m, x: m.out(torch.fft.rfft(m.fc(x), n=30).imag)),
    "rms_norm": lambda: own(lambda m, x: m.out(F.rms_norm(m.fc(x), (16,)))),
    "scripted": lambda: own(lambda m, x: m.out(m.fc(x).tanh())),
    "Linear, its forward written out": lambda: nn.Sequential(Written(8, 3)),
}


class Written(nn.Linear):
    def forward(self, x):
        if torch.jit.is_scripting():
            return F.linear(x, self.weight.relu(), self.bias)
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("case", ANALYTIC)
def test_what_is_known_to_be_analytic_is_said(case):
    report = analytic(ANALYTIC[case]())
    assert report.is_analytic, str(report)


def test_a_mask_of_token_ids_is_no_objection_in_the_table():
    torch.manual_seed(0)
    model, x = Tokens(Softplus()), torch.randint(0, 50, (60, 12))
    tp.nn.widen(model, n=60)
    table = tp.check_assumptions(model, x)
    assert {r.status for r in table.rows if r.name.startswith("analytic")} == {"held"}


def test_the_example_and_the_model_are_as_before():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.bn(x.mul_(2)))

    model, x = Writes(), torch.randn(6, 8)
    state, kept = {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    assert {f.status for f in classify(model, example_input=x)} == {"analytic"}
    assert torch.equal(x, kept) and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inputs_that_cannot_be_made_up_are_asked_for():
    model = Given(lambda m, x: m.fc(x.a) + x.b, fc=nn.Linear(4, 4))
    (left,) = (f for f in analytic(model).remaining)
    assert left.status == "unknown" and "no made-up input fits" in left.reason
    with pytest.raises(TypeError, match="example_input: expected"):
        classify(model, example_input="x")
