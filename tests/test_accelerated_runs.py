"""second_phase="agd": runs of it, resumed, stopped early, refused."""

import pytest
import torch
import torch.nn.functional as F

import twophase_ext as tp
from accelerated_problem import Problem, reference
from helpers import bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from test_second_phases import AtTau
from twophase_ext.model.losses import resolve_loss
from twophase_ext.theory.accelerated import Point, accelerated_guarantee
from twophase_ext.training.phases import accelerated as phase
from twophase_ext.training.steps import metric
from twophase_ext.training.steps.accelerated import Iterate, weight_of


@pytest.mark.parametrize("cache", ["hidden", "backbone", "none", "disk"])
@pytest.mark.parametrize("n", [60, 110])
def test_a_run_is_the_method_with_any_cache(cache, n):
    x, y = toy_data(n)
    model, at_tau = toy_mlp(), AtTau()
    trainer = quiet(
        model,
        epochs=7,
        tau=3,
        second_phase="agd",
        agd={"steps": 3, "l2": 0.01},
        precision="float64",
        feature_cache=cache,
        callbacks=[at_tau],
    )
    with pytest.warns(UserWarning) if n > 81 else torch.no_grad():
        result = trainer.fit((x, y))
    assert (result.feature_cache, result.status) == (cache, "completed")
    problem = Problem(0, "cross_entropy", n=n, m=80, l2=0.01)
    problem.h, problem.y = at_tau.h, y
    with torch.no_grad():
        problem.layer.weight.copy_(at_tau.weight)
        problem.layer.bias.copy_(at_tau.bias)
    last = problem.start() + reference(problem, problem.side(), 12)[-1]
    torch.testing.assert_close(model[4].weight, last[:, :-1], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model[4].bias, last[:, -1], rtol=1e-9, atol=1e-11)
    curve = result.guarantee.curve
    assert [p["steps"] for p in curve] == [0, 3, 6, 9, 12]
    assert curve[-1]["loss"] == pytest.approx(problem.value(last), rel=1e-12)
    assert all(p["loss"] <= p["bound"] for p in curve) and not result.guarantee.refuted
    held = {name: state for name, state, _ in result.guarantee.premises}
    assert held["steps H^-1 grad / L_ell, H >= M^T M / n"] == "held"
    assert held["no other steps"] == held["gradient"] == "held"


def test_in_float32_the_measured_weights_are_bounded():
    """The weights are rounded at each epoch's end, the iterates are not."""
    for seed in range(3):
        run = {"epochs": 14, "tau": 4, "second_phase": "agd", "agd": {"steps": 4}}
        result = quiet(toy_mlp(), **run).fit(toy_data(seed=seed))
        curve = result.guarantee.curve
        assert all(p["loss"] <= p["bound"] for p in curve) and not result.guarantee.refuted
        assert min(p["bound"] / p["loss"] for p in curve[1:]) < 10
        assert curve[-1]["loss"] == pytest.approx(result.final["train_loss"], rel=1e-4)
        assert "guaranteed at every step" in str(result)


def test_a_bound_that_is_wrong_is_called_so():
    result = accelerated_guarantee(
        lambda: [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))],
        torch.zeros(2, 2),
        None,
        loss=resolve_loss("cross_entropy"),
        mode="agd",
        points=[Point(0, 0, 1, 0, 0, 0), Point(3, 5.0, weight_of(3), 0, 0, 0)],
        damping=0.1,
        l2=0.0,
        ones=False,
        estimates=[],
        most=1,
        assumptions=[],
    )
    assert "measured above the bound at 1 of 2 points" in result.refuted


def test_declared_losses_have_their_assumptions():
    def smooth(outputs, y):
        return torch.sqrt(1 + (outputs - y).square()).sum(1).mean()

    custom = tp.ConvexLoss(smooth, smoothness=1.0)
    x, y = toy_data()
    trainer = quiet(toy_mlp(), loss=custom, second_phase="agd", epochs=12, precision="float64")
    result = trainer.fit((x, F.one_hot(y, 3).double()))
    assert all(p["loss"] <= p["bound"] for p in result.guarantee.curve)
    assert any("gradients in float64" in line for line in result.guarantee.assumptions)
    assert result.guarantee.curve[-1]["loss"] < 1.05 * 3


@pytest.mark.filterwarnings("ignore:the last hidden layer has 40 units")
@pytest.mark.parametrize(("n", "at"), [(33, (4, 2)), (90, (2, 0))])
def test_resumed_runs_end_with_the_same_bits(tmp_path, monkeypatch, n, at):
    data = toy_images(n)
    settings = {"epochs": 5, "tau": 2, "second_phase": "agd", "agd": {"steps": 5}}
    whole = toy_convnet()
    reference = quiet(whole, **settings).fit(data)
    own, stopped = Iterate.advance, []

    def advance(place, side):
        value = own(place, side)
        if place.steps == 5 * (at[0] - 2) + at[1] + 1 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return value

    with monkeypatch.context() as patch:
        patch.setattr(Iterate, "advance", advance)
        patch.setattr(phase.AcceleratedPhase, "save_within", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            quiet(toy_convnet(), tmp_path, **settings).fit(data)
    model = toy_convnet(seed=5)
    result = quiet(model, tmp_path, **settings).fit(data, resume=True)
    assert same_bits(bits(whole), bits(model))
    assert result.guarantee.curve == reference.guarantee.curve
    again = quiet(toy_convnet(seed=6), tmp_path, **settings).fit(data, resume=True)
    assert again.guarantee.curve == reference.guarantee.curve


def test_a_checkpoint_within_an_epoch_goes_on_from_there(tmp_path):
    data = toy_images(33)
    settings = {"epochs": 4, "tau": 2, "second_phase": "agd", "agd": {"steps": 6}}
    whole = toy_convnet()
    quiet(whole, **settings).fit(data)

    class Stop(Exception):
        pass

    class After:
        def on_epoch_end(self, run, record):
            if record["epoch"] == 3:
                raise Stop

    with pytest.raises(Stop):
        folder = quiet(
            toy_convnet(), tmp_path, callbacks=[After()], checkpoint_every="4 steps", **settings
        )
        folder.fit(data)
    model, begun = toy_convnet(seed=5), []
    own = Iterate.advance
    resumed = quiet(model, tmp_path, **settings)

    class Count:
        def on_fit_start(self, run):
            begun.append((run.epoch, run.batch))

    resumed.callbacks = (Count(),)
    resumed.fit(data, resume=True)
    assert begun[0][1] > 0 and own is Iterate.advance
    assert same_bits(bits(whole), bits(model))


def test_early_stopping_keeps_the_best_weights():
    x, y = toy_data(60)
    held_out = toy_data(60, seed=9)
    run = {"epochs": 60, "tau": 4, "second_phase": "agd", "agd": {"damping": 0, "steps": 5}}
    run["agd"]["early_stopping"] = 3
    result = quiet(toy_mlp(), **run).fit((x, y), held_out)
    rows = [row for row in result.history if row["phase"] == 2]
    best = min(rows, key=lambda row: row["val_loss"])
    assert len(rows) < 56 and rows[-1]["epoch"] == best["epoch"] + 3
    assert result.status == "completed"
    assert result.final["val_loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    assert result.guarantee.curve[-1]["loss"] == best["objective"]
    assert f"weights kept are those of epoch {best['epoch']}" in str(result)
    with pytest.raises(ValueError, match="early_stopping: expected validation data"):
        quiet(toy_mlp(), **run).fit((x, y))


def test_a_stopped_early_run_stays_ended(tmp_path):
    data, held_out = toy_data(60), toy_data(60, seed=9)
    run = {"epochs": 60, "tau": 1, "second_phase": "agd"}
    run["agd"] = {"damping": 0, "early_stopping": 2}
    first = quiet(toy_mlp(), tmp_path, **run).fit(data, held_out)
    again = quiet(toy_mlp(seed=3), tmp_path, **run).fit(data, held_out, resume=True)
    assert len(first.history) == len(again.history) < 60
    assert same_bits(bits(first.model), bits(again.model))
    assert again.guarantee.curve == first.guarantee.curve


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, r"agd: expected damping in \(0, 1e\+06\), got -1", {"agd": {"damping": -1}}),
        (TypeError, "agd: expected a number for l2", {"agd": {"l2": "big"}}),
        (ValueError, "agd: steps: expected at least 1", {"agd": {"steps": 0}}),
        (ValueError, "early_stopping: expected at least 1", {"agd": {"early_stopping": 0}}),
        (ValueError, "agd: expected settings among .*'lr'", {"agd": {"lr": 1}}),
        (ValueError, "gd: expected None with second_phase='agd'", {"gd": {"l2": 1}}),
        (ValueError, "batch_norm: second_phase='agd' needs", {"batch_norm": "batch"}),
    ],
)
def test_wrong_settings(error, message, settings):
    with pytest.raises(error, match=message):
        quiet(toy_mlp(), **{"second_phase": "agd", **settings})


def test_what_does_not_fit_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(metric, "available_memory", lambda device: 1 << 19)
    model = toy_mlp()
    before = bits(model)
    with pytest.raises(ValueError, match=r"factors the smaller side of M, 60 x 81.*or sketches it"):
        quiet(model, second_phase="agd").fit(toy_data())
    assert same_bits(before, bits(model))
    result = quiet(model, second_phase="agd", agd={"damping": None}).fit(toy_data())
    assert result.status == "completed" and result.guarantee.curve


def test_features_that_are_not_finite_stop_the_run():
    x, y = toy_data()
    model = toy_mlp()

    class Blow:
        def on_perturb(self, run):
            with torch.no_grad():
                run.network.wide.linear.weight.fill_(1e38)

    result = quiet(model, second_phase="agd", callbacks=[Blow()]).fit((x, y))
    assert result.status == "stopped" and not result.guarantee.curve
