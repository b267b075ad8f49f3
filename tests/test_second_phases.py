"""second_phase="gd" and "sgd" (Theorem 1): their steps, their descent, resumption, the audit."""

import copy
import itertools
import json
import math
import os
import signal
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from twophase_ext.core.seeds import stream_seed
from twophase_ext.model.losses import squared_error
from twophase_ext.theory.guarantee import guarantee
from twophase_ext.training import loop
from twophase_ext.training.phases import theorem
from twophase_ext.training.phases.gradient_descent import GradientDescentPhase
from twophase_ext.training.phases.stochastic import StochasticPhase
from twophase_ext.training.transition import enter_second_phase

EPS = 0.1


class AtTau:
    """The last layer when the second phase begins, and h."""

    def on_perturb(self, run):
        layer = run.network.last.module
        self.weight = layer.weight.detach().double().clone()
        self.bias = layer.bias.detach().double().clone()
        self.h = run.network.hidden(next(run.train.in_order(run.train.n))[0]).double()


def run(data, loss="cross_entropy", callbacks=(), **settings):
    model, at_tau = toy_mlp(), AtTau()
    settings = {"epochs": 12, "tau": 4, "precision": "float64", **settings}
    trainer = quiet(model, loss=loss, callbacks=[at_tau, *callbacks], **settings)
    return model, trainer.fit(data), at_tau


def objective(weight, bias, h, y, loss, l2=0.0):
    outputs = F.linear(h, weight, bias)
    data = F.cross_entropy(outputs, y) if loss == "cross_entropy" else squared_error(outputs, y)
    return data + l2 / 2 * (weight.square().sum() + bias.square().sum())


def targets(y, loss):
    return y if loss == "cross_entropy" else F.one_hot(y, 3).double()


@pytest.mark.parametrize("cache", ["hidden", "backbone", "none", "disk"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("gd", [{}, {"smoothness": "paper", "l2": 0.1, "steps": 3}])
def test_gradient_descent_is_the_plain_loop(loss, gd, cache):
    x, y = toy_data()
    y = targets(y, loss)
    model, result, start = run((x, y), loss, second_phase="gd", gd=gd, feature_cache=cache)
    l2, steps = gd.get("l2", 0.0), gd.get("steps", 1)
    m = torch.cat([start.h, torch.ones(len(x), 1).double()], 1)
    largest = m.square().sum() if "smoothness" in gd else torch.linalg.matrix_norm(m, 2) ** 2
    smoothness = float(largest) * (0.5 if loss == "cross_entropy" else 2.0) / len(x) + l2
    known = result.guarantee.constants["L_H"]
    assert smoothness * (1 - 1e-12) <= known <= 1.02 * smoothness
    weight, bias = start.weight.requires_grad_(), start.bias.requires_grad_()
    losses = []
    for _ in range(8 * steps):
        value = objective(weight, bias, start.h, y, loss, l2)
        losses.append(float(value.detach()))
        gradients = torch.autograd.grad(value, (weight, bias))
        with torch.no_grad():
            for p, g in zip((weight, bias), gradients, strict=True):
                p -= g / known
    torch.testing.assert_close(model[4].weight, weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model[4].bias, bias, rtol=1e-10, atol=1e-12)
    rows = result.history[4:]
    assert [row["objective"] for row in rows] == pytest.approx(losses[::steps], rel=1e-12)
    curve = result.guarantee.curve
    assert [point["steps"] for point in curve] == [steps * k for k in range(9)]
    assert all(point["loss"] <= point["bound"] for point in curve)
    assert all(a["loss"] > b["loss"] for a, b in pairwise(curve))


@pytest.mark.parametrize("cache", ["hidden", "none"])
def test_stochastic_descent_is_the_plain_loop(cache):
    x, y = toy_data()
    model, result, start = run((x, y), second_phase="sgd", sgd={"c": 0.7}, feature_cache=cache)
    weight, bias = start.weight.requires_grad_(), start.bias.requires_grad_()
    t = 0
    for epoch in range(4, 12):
        generator = torch.Generator().manual_seed(stream_seed(1, "draw", epoch))
        for index in torch.randint(len(x), (64,), generator=generator).split(8):
            t += 1
            value = objective(weight, bias, start.h[index], y[index], "cross_entropy")
            gradients = torch.autograd.grad(value, (weight, bias))
            with torch.no_grad():
                for p, g in zip((weight, bias), gradients, strict=True):
                    p -= 0.7 / t**0.6 * g
    torch.testing.assert_close(model[4].weight, weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model[4].bias, bias, rtol=1e-10, atol=1e-12)
    last = objective(weight, bias, start.h, y, "cross_entropy")
    assert result.history[-1]["objective"] == pytest.approx(float(last), rel=1e-12)
    assert [point["steps"] for point in result.guarantee.curve] == [8 * k for k in range(9)]
    assert result.guarantee.in_expectation


@pytest.mark.parametrize("mode", ["gd", "sgd"])
def test_in_float32_too_the_curve_begins_at_its_bound(mode):
    """One evaluation of L(w^tau) serves for both: two would differ by their rounding."""
    for seed in range(5):
        result = run(toy_data(seed=seed), second_phase=mode, precision="float32")[1]
        first, *points = result.guarantee.curve
        assert first["loss"] == first["bound"]
        assert mode == "sgd" or all(p["loss"] <= p["bound"] for p in points)


def test_mini_batches_of_sgd_are_independent_and_uniform():
    class Draws:
        def on_epoch_end(self, run, record):
            if record["phase"] == 2:
                run._run.state.epoch -= 1
                orders.append(StochasticPhase(run._run).draws()[0])
                run._run.state.epoch += 1

    orders = []
    run(toy_data(), callbacks=[Draws()], second_phase="sgd", epochs=204)
    drawn = torch.cat(orders)
    counts = torch.bincount(drawn, minlength=60).double()
    expected = len(drawn) / 60
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert 59 - 5 * math.sqrt(118) < chi2 < 59 + 5 * math.sqrt(118)
    assert any(len(order.unique()) < 60 for order in orders)  # no permutation
    a, b = drawn[:-1].double(), drawn[1:].double()
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / math.sqrt(len(drawn))


def test_a_rise_of_the_loss_ends_the_claim():
    class Push:
        def on_epoch_end(self, run, record):
            if record["epoch"] == 7:
                run._run.train_features.stored.rows.mul_(-1)

    for precision in ("float32", "float64"):
        with pytest.warns(UserWarning, match="nothing is claimed: the objective rose in epoch 8"):
            _, result, _ = run(
                toy_data(), callbacks=[Push()], second_phase="gd", precision=precision
            )
        assert result.status == "completed" and not result.guarantee.curve
        assert status(result, "fixed features") == "failed"
        assert status(result, "monotone descent") == "not checked"


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_rounding_alone_is_no_rise(loss):
    """Far beyond convergence the last bits go up and down."""
    x, y = toy_data(n=12)
    data = (x, targets(y, loss).to(torch.float32) if loss != "cross_entropy" else y)
    gd = {"steps": 1000, "l2": 0.1}
    settings = {"second_phase": "gd", "gd": gd, "precision": "float32", "epochs": 10}
    _, result, _ = run(data, loss, **settings)
    losses = [row["objective"] for row in result.history[4:]]
    rises = [b - a for a, b in pairwise(losses)]
    assert result.status == "completed" and max(rises) < 1e-6
    assert abs(result.guarantee.curve[-1]["loss"] - result.guarantee.curve[-2]["loss"]) < 1e-6


def status(result, name):
    return next(p[1] for p in result.guarantee.premises if p[0].startswith(name))


def test_audit():
    x, y = toy_data()
    results = {
        mode: run((x, y), second_phase=mode, verify="svd")[1] for mode in ("base", "gd", "sgd")
    }
    for mode, result in results.items():
        held = {name: state for name, state, _ in result.guarantee.premises}
        failed = [name for name, state in held.items() if state == "failed"]
        assert len(failed) == (3 if mode == "base" else 0), failed
        assert status(result, "hidden layers frozen") == "held"
        assert status(result, "expressivity") == "held"
        assert "no momentum" in str(result) and result.guarantee.mode == mode
        assert bool(result.guarantee.curve) == (mode != "base")
    plain = run((x, y), optimizer=lambda p: torch.optim.SGD(p, lr=0.01))[1]
    assert status(plain, "no momentum") == "held" and status(plain, "unbiased") == "failed"
    assert status(plain, "expressivity") == "not checked"
    assert status(run((x, y), second_phase="none")[1], "perturbation") == "failed"
    narrow = quiet(toy_mlp(width=20), epochs=4, tau=2, second_phase="gd")
    with pytest.warns(UserWarning, match="m_H >= N - 1 fails"):
        assert status(narrow.fit((x, y)), "m_H >= N") == "failed"
    batch = quiet(toy_convnet(), batch_norm="batch").fit(toy_images(33))
    assert status(batch, "hidden layers frozen") == status(batch, "fixed features") == "failed"


def interrupt(patch, at):
    """Ctrl-C before a step of an epoch."""

    def watched(own):
        def call(phase, *arguments):
            if (phase.state.epoch, phase.state.batch) == at and phase.run.phase == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return own(phase, *arguments)

        return call

    for kind, name in ((GradientDescentPhase, "_descend"), (StochasticPhase, "rates")):
        patch.setattr(kind, name, watched(getattr(kind, name)))


@pytest.mark.parametrize("at", [(4, 0), (5, 0), (6, 2)])
@pytest.mark.parametrize("mode", ["gd", "sgd"])
def test_resumed_runs_end_with_the_same_bits(tmp_path, monkeypatch, mode, at):
    data = toy_images(33)
    settings = {"epochs": 9, "tau": 4, "second_phase": mode}
    if mode == "gd":
        settings["gd"] = {"steps": 5}
    whole = toy_convnet()
    reference = quiet(whole, **settings).fit(data)
    at = at if mode == "gd" else (at[0], 0)
    with monkeypatch.context() as patch:
        interrupt(patch, at)
        cut = quiet(toy_convnet(), tmp_path, **settings).fit(data)
    assert cut.status == "interrupted" and not cut.guarantee.curve
    model = toy_convnet(seed=5)
    result = quiet(model, tmp_path, **settings).fit(data, resume=True)
    assert same_bits(bits(whole), bits(model))
    assert result.guarantee.curve == reference.guarantee.curve
    assert (tmp_path / "guarantee.csv").read_text().splitlines()[0] == "steps,loss,bound,comparator"
    again = quiet(toy_convnet(seed=6), tmp_path, **settings).fit(data, resume=True)
    assert again.guarantee.curve == reference.guarantee.curve


@pytest.mark.parametrize("mode", ["base", "gd", "sgd"])
def test_any_number_of_threads_gives_the_same_bits(mode, monkeypatch):
    """From the same features: torch's own forward pass promises nothing of the kind."""
    data, threads, states = toy_data(), torch.get_num_threads(), []

    def enter(*arguments):
        torch.set_num_threads(1)
        enter_second_phase(*arguments)
        torch.set_num_threads(count)

    monkeypatch.setattr(loop, "enter_second_phase", enter)

    class Threads:
        def on_fit_start(self, run):
            torch.set_num_threads(1)

        def on_epoch_end(self, run, record):
            torch.set_num_threads(count if record["phase"] == 2 else 1)

    try:
        for count in (1, 2, 4):  # noqa: B007  the callback reads it
            states.append(bits(run(data, callbacks=[Threads()], second_phase=mode)[0]))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(states[0], states[1]) and same_bits(states[0], states[2])


def test_bfloat16_features_and_custom_losses():
    x, y = toy_data()
    settings = {"feature_cache": "hidden-bfloat16", "precision": "float32"}
    model, result, start = run((x, y), second_phase="gd", **settings)
    assert status(result, "fixed features") == "failed"
    assert result.feature_cache == "hidden-bfloat16"
    rounded = start.h.bfloat16().double()
    last = objective(model[4].weight.double(), model[4].bias.double(), rounded, y, "cross_entropy")
    assert result.guarantee.curve[-1]["loss"] == pytest.approx(float(last.detach()), rel=1e-5)

    def smooth(outputs, y):
        return torch.sqrt(1 + (outputs - y).square()).sum(1).mean()

    custom = tp.ConvexLoss(smooth, smoothness=1.0)
    result = run((x, F.one_hot(y, 3).double()), custom, second_phase="gd", gd={"steps": 4})[1]
    losses = [row["objective"] for row in result.history[4:]]
    assert losses == sorted(losses, reverse=True)
    assert status(result, "monotone") == "not checked"


def test_no_bias_and_a_fixed_bias(monkeypatch):
    x, y = toy_data()
    moved = []

    def remembered(*arguments, ones, **settings):
        moved.append(ones)
        return guarantee(*arguments, ones=ones, **settings)

    monkeypatch.setattr(theorem, "guarantee", remembered)
    for fixed in (False, True):
        model = toy_mlp()
        model[4] = nn.Linear(80, 3, bias=fixed)
        if fixed:
            model[4].bias.requires_grad_(False)
            with torch.no_grad():
                model[4].bias.copy_(torch.tensor([8.0, -8.0, 0.0]))
        for mode, loss in itertools.product(("gd", "sgd"), ("cross_entropy", "squared_error")):
            settings = {"second_phase": mode, "precision": "float64", "loss": loss}
            trained = quiet(copy.deepcopy(model), epochs=6, tau=2, **settings)
            result = trained.fit((x, targets(y, loss)))
            points = result.guarantee.curve
            assert points[-1]["loss"] == pytest.approx(result.final["train_loss"], rel=1e-12)
            assert mode == "sgd" or all(p["loss"] <= p["bound"] for p in points)
            same = torch.tensor([8.0, -8.0, 0.0]).double()
            assert not fixed or torch.equal(result.model[4].bias, same)
    assert moved == [False] * 8  # a comparator that moved it would claim too much


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, "gd: expected smoothness among", {"gd": {"smoothness": "L"}}),
        (ValueError, r"gd: expected l2 in \(0, inf\), got -1", {"gd": {"l2": -1}}),
        (TypeError, "gd: expected a number for l2", {"gd": {"l2": "big"}}),
        (ValueError, "gd: steps: expected at least 1", {"gd": {"steps": 0}}),
        (ValueError, "gd: expected settings among .*'lr'", {"gd": {"lr": 1}}),
        (ValueError, "sgd: expected None with second_phase='gd'", {"sgd": {"c": 1}}),
        (ValueError, r"sgd: expected c in \(0, inf\)", {"second_phase": "sgd", "sgd": {"c": 0}}),
        (
            ValueError,
            r"sgd: expected eps in \(0",
            {"second_phase": "sgd", "sgd": {"eps": 1}},
        ),
        (ValueError, "batch_norm: second_phase='gd' needs", {"batch_norm": "batch"}),
    ],
)
def test_wrong_settings(error, message, settings):
    with pytest.raises(error, match=message):
        quiet(toy_mlp(), **{"second_phase": "gd", **settings})


def dead(scale):
    """Units that are off, and a last layer without bias."""
    model = nn.Sequential(nn.Linear(5, 80), tp.nn.Softplus(100.0), nn.Linear(80, 3, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[0].bias.fill_(-1.0)
    return model


@pytest.mark.parametrize("mode", ["gd", "sgd"])
def test_steps_that_cannot_be_made_stop_the_run_and_lose_nothing(mode, tmp_path):
    settings = {"second_phase": mode, "epochs": 4, "tau": 2}
    result = quiet(dead(0.01), tmp_path, **settings).fit(toy_data())
    assert result.status == "stopped" and len(result.history) == 2
    assert "no step of 1 / L_H can be made" in result.guarantee.reason
    assert "no step of 1 / L_H can be made" in str(result)
    assert not result.guarantee.curve and result.guarantee.premises
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["status"] == "stopped" and (tmp_path / "checkpoint.pt").exists()
    again = quiet(dead(0.01), tmp_path, **settings).fit(toy_data(), resume=True)
    assert again.status == "stopped" and same_bits(bits(again.model), bits(result.model))
