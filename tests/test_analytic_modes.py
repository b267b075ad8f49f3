"""Ways in which another function runs in evaluation, without gradients or under torch.jit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import Given, quiet, toy_data, toy_mlp
from twophase_ext.nn import Softplus, classify


class Scripted(nn.Module):
    """A part that torch.jit compiled: its Python class has no forward to look at."""

    def __init__(self):
        super().__init__()
        self.part = torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.Tanh()))
        self.rest = toy_mlp()

    def forward(self, x):
        return self.rest(self.part(x))


def test_a_scripted_part_is_unknown_and_ends_no_run():
    x, y = toy_data()
    assert "unknown" in {finding.status for finding in classify(Scripted())}
    rows = {row.name: row.status for row in tp.check_assumptions(Scripted(), x).rows}
    assert rows["analytic calls"] == "not checked"
    result = quiet(Scripted(), second_phase="gd").fit((x, y))
    assert result.status == "completed" and result.guarantee.premises


def test_a_rule_that_raises_is_a_row(monkeypatch):
    def broken(*_, **__):
        raise IndexError("a rule's own")

    monkeypatch.setattr("twophase_ext.theory.premises.classify", broken)
    monkeypatch.setattr("twophase_ext.training.audit.depth_premise", broken)
    result = quiet(toy_mlp(), second_phase="gd").fit(toy_data())
    rows = {name: (status, evidence) for name, status, evidence in result.guarantee.premises}
    for name in ("analytic modules", "analytic calls", "depth"):
        assert rows[name] == ("not checked", "not judged: IndexError: a rule's own")
    assert result.guarantee.curve


@pytest.mark.parametrize("activation", [F.gelu, Softplus(), nn.Tanh(), torch.sin])
def test_the_fused_kernel_of_an_encoder_layer(activation):
    """It goes by what the layer was built with, in evaluation without gradients."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.activation = activation
    x = torch.randn(5, 3, 8)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 4)).eval()
    for given in (None, x):
        assert "not analytic" in {f.status for f in classify(model, example_input=given)}
    with torch.no_grad():
        before = model(x)
    with torch.enable_grad():
        truth = model(x).detach()
    assert not torch.allclose(before, truth, atol=1e-4)
    tp.nn.analytic(model, example_input=x)
    with torch.no_grad():
        assert torch.allclose(model(x), truth, atol=1e-5)


def test_a_kink_behind_the_grad_mode():
    model = Given(
        lambda m, x: m.a(torch.relu(x) if torch.is_grad_enabled() else x), a=nn.Linear(5, 2)
    )
    for given in (None, torch.randn(4, 5)):
        assert {f.status for f in classify(model, example_input=given)} != {"analytic"}
