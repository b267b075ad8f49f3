"""How far a run is from the global minimum: the first sentence of all that it says."""

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import twophase_ext as tp
from helpers import quiet, toy_data, toy_mlp
from twophase.report import write_report
from twophase_ext.theory.floor import LossFloor
from twophase_ext.training.minimum import CONDITIONAL, FAILED, PROVED, Minimum

FLOOR = LossFloor(0.25, 0.2500001, 10, 9, 1, 1, "cross_entropy", True)


def repeating(n=40):
    x, y = toy_data(n)
    x[1], x[2] = x[0], x[0]
    y[0], y[1], y[2] = 0, 1, 1
    return x, y


class Listed(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


@pytest.mark.parametrize("listed", [False, True])
def test_a_run_says_it_first_everywhere(tmp_path, listed):
    x, y = repeating()
    data = Listed(x, y) if listed else (x, y)
    result = quiet(toy_mlp(), tmp_path / "run").fit(data)
    floor = tp.loss_floor(x, y, outputs=3)
    found = result.minimum
    assert found.floor == floor
    assert floor.upper == pytest.approx((math.log(3) + 2 * math.log(1.5)) / 40, rel=1e-12)
    assert found.loss == result.final["train_loss"] and found.condition == CONDITIONAL
    assert found.loss - floor.lower <= found.gap <= (found.loss - floor.lower) * 1.001
    sentence = str(found)
    assert sentence.startswith(
        f"The training loss is {found.loss:.6g}; the global minimum over all weights of this "
        "network is 0.0477"
    )
    assert f"({CONDITIONAL}, not attained), so this run is at most " in sentence
    assert " ".join(str(result).splitlines()).startswith(sentence)
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert next(iter(saved.items())) == ("sentence", sentence)
    assert saved["minimum"]["gap"] == found.gap
    assert saved["minimum"]["floor"]["disagreeing"] == 1
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.index("The training loss is") < page.index("was trained on")


def test_proved_is_said_where_it_is():
    for method, said in (("separation", PROVED), ("svd", CONDITIONAL)):
        result = quiet(toy_mlp(), verify=method).fit(toy_data())
        assert result.verdict.status == ("proved" if said == PROVED else "full rank")
        assert f"of this network is 0 ({said}, not attained), so this" in str(result.minimum)


def test_a_narrow_network_is_told_that_its_minimum_may_be_higher():
    x, y = toy_data(60)
    result = quiet(toy_mlp(width=20)).fit((x, y))
    assert result.minimum.condition == FAILED
    assert "this network is at least 0 (no weights of its last layer" in str(result.minimum)
    x[20:] = x[:20].repeat(2, 1)  # 20 distinct inputs, and 21 columns
    assert quiet(toy_mlp(width=20)).fit((x, y)).minimum.condition == CONDITIONAL


def test_inputs_are_compared_as_the_model_is_fed():
    x = torch.tensor([[1.0], [1.0 + 2.0**-40], [0.0], [-0.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 2])
    for precision, distinct in (("float32", 2), ("float64", 3)):
        model = toy_mlp(d=1)
        result = quiet(model, precision=precision, batch_size=2).fit((x, y))
        assert result.minimum.floor.distinct == distinct
        assert (result.minimum.floor.lower > 0) == (distinct == 2)


def test_samples_that_change_have_no_floor():
    result = quiet(toy_mlp(), augment=lambda x, g: x + torch.rand(x.shape, generator=g)).fit(
        toy_data()
    )
    assert result.minimum.floor is None and result.minimum.gap is None
    assert "the samples change from visit to visit" in str(result.minimum)


@pytest.mark.parametrize("least", [-math.inf, 0.0])
def test_a_declared_loss_costs_no_minimisations(least):
    x, y = toy_data()
    loss = tp.ConvexLoss(
        lambda q, y: nn.functional.cross_entropy(q, y.flatten()), 0.5, "mine", least
    )
    text = str(quiet(toy_mlp(), loss=loss).fit((x, y)).minimum)
    if least == 0:
        assert "this network is at least 0 (if" in text and "at most" in text
    else:
        assert "how low mine could be is not known" in text and "at most" not in text


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("gd", {"steps": 40}),
        ("agd", {"steps": 2}),
        ("agd", {"steps": 1, "early_stopping": 3}),
        ("exact", {"steps": 4, "gap": 1e-12}),
    ],
)
def test_under_l2_the_gap_of_the_last_layer_bounds_what_newton_still_gains(mode, settings):
    x, y = toy_data()
    l2 = 0.05
    model = toy_mlp(dtype=torch.float64)
    run = {"second_phase": mode, mode: settings | {"l2": l2}, "precision": "float64"}
    result = quiet(model, **run).fit((x, y), toy_data(seed=9))
    with torch.no_grad():
        h = model[:-1](x.double())
    m = torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], 1)
    w = torch.cat([model[-1].weight, model[-1].bias[:, None]], 1).detach().flatten()

    def objective(w):
        loss = nn.functional.cross_entropy(m @ w.view(3, -1).T, y)
        return loss + l2 / 2 * w.square().sum()

    v = w.clone()
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(objective, v)
        v -= torch.linalg.solve(
            torch.autograd.functional.hessian(objective, v, vectorize=True), gradient
        )
    gap = float(objective(w) - objective(v))
    found = result.minimum.last_layer
    assert gap > 1e-14 or mode != "exact"
    assert gap <= found <= 100 * gap + 1e-12
    assert result.guarantee.constants["last_layer_gap"] == found
    assert "above its minimum over the last layer (strong convexity" in str(result.minimum)


SENTENCES = {
    "proved": (
        Minimum(0.5, FLOOR, PROVED, 1e-7),
        "The training loss is 0.5; the global minimum over all weights of this network is 0.25 "
        "(proved), so this run is at most 0.251 above it.",
    ),
    "interrupted": (Minimum(None, FLOOR, PROVED, 1e-7), "measured at the end; the global minimum"),
    "impossible": (Minimum(0.2, FLOOR, PROVED, 1e-7), "does not give equal inputs equal outputs"),
    "rounding": (Minimum(0.25 - 1e-8, FLOOR, PROVED, 1e-7), "so this run is at most"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_sentences(case):
    found, text = SENTENCES[case]
    assert text in str(found)


def test_a_collapsed_network_is_told_so(tmp_path):
    x, y = toy_data()

    dead, flat = toy_mlp(), toy_mlp()
    with torch.no_grad():
        dead[2].bias.fill_(-1e4)
        flat[2].weight.zero_()
    sgd = {"second_phase": "none", "optimizer": lambda p: torch.optim.SGD(p, lr=1e-30)}
    for model, settings, why in (
        (dead, {"second_phase": "gd"}, "all hidden features are 0 (dead units)"),
        (flat, sgd, "as the hidden features are"),
    ):
        result = quiet(model, tmp_path / why[:3], **settings).fit((x, y))
        said = f"{result.minimum.collapse}."
        assert (
            said.startswith("it has collapsed: its outputs are the same for every") and why in said
        )
        assert str(result.minimum).endswith(said)
        assert tp.load_run(tmp_path / why[:3]).minimum == result.minimum
    result = quiet(toy_mlp()).fit((x, y))
    assert result.minimum.collapse == "" and "collapsed" not in str(result)
    model = toy_mlp()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)  # outputs that hardly differ are no collapse
    trained = quiet(model, second_phase="none", optimizer=lambda p: torch.optim.SGD(p, lr=1e-9))
    assert trained.fit((x, y)).minimum.collapse == ""
    assert quiet(toy_mlp()).fit((x[:1].repeat(8, 1), y[:8])).minimum.collapse == ""
