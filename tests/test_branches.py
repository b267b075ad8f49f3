"""trainer.branch: several second phases from one first phase."""

import json
import os
import signal

import pytest
import torch
from torch.utils.data import Dataset

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from twophase_ext.training.features import cache as features
from twophase_ext.training.phases import SecondPhase
from twophase_ext.training.steps import sharded as columns

BRANCHES = {
    "paper": {},
    "gd": {"second_phase": "gd", "gd": {"steps": 3}},
    "loud": {"noise_std": 0.01},
    "other noise": {"noise_seed": 7},
    "base": {"second_phase": "none"},
    "slow": {"optimizer": lambda p: tp.optim.SGD(p, lr=1e-3, momentum=0.9), "epochs": 8},
    "lazy": {"second_phase": "lazy", "verify": "svd"},
}
SETTINGS = {"epochs": 6, "tau": 3}


def test_a_branch_is_the_run_of_its_own(tmp_path):
    data = toy_data()
    model = toy_mlp()
    results = quiet(model, tmp_path, **SETTINGS).branch(BRANCHES, data, data)
    assert list(results) == list(BRANCHES)
    for name, changes in BRANCHES.items():
        if name == "slow":
            continue  # its first phase has another learning rate in a run of its own
        own = toy_mlp()
        alone = quiet(own, **{**SETTINGS, **changes}).fit(data, data)
        result = results[name]
        assert same_bits(bits(own), bits(result.model)), name
        assert result.final == alone.final, name
        assert [r["train_loss"] for r in alone.history] == [r["train_loss"] for r in result.history]
        assert result.run_dir == tmp_path / name and result.status == alone.status
        assert json.loads((tmp_path / name / "result.json").read_text())["status"] == "completed"
    assert len(results["slow"].history) == 8
    assert results["slow"].history[-1]["learning_rate"] == 1e-3
    half = toy_mlp()  # the trainer's own model ends at tau
    quiet(half, **{**SETTINGS, "second_phase": "none", "epochs": 3, "tau": 1}).fit(data)
    assert same_bits(bits(half), bits(model))


def test_the_optimizer_s_state_is_carried_over():
    data = toy_data()
    rate = {"optimizer": lambda p: torch.optim.Adam(p, lr=0.004)}
    trainer = quiet(toy_mlp(), **rate, **SETTINGS)
    results = trainer.branch({"same": {}, "again": rate, "sgd": {"optimizer": tp.optim.SGD}}, data)
    assert same_bits(bits(results["same"].model), bits(results["again"].model))
    assert not same_bits(bits(results["same"].model), bits(results["sgd"].model))


def test_features_and_verdicts_are_made_once(monkeypatch):
    made, verified = [], []

    class Counted(features.Features):
        def __init__(self, *arguments):
            made.append(arguments[2])
            super().__init__(*arguments)

    own = SecondPhase.verify
    monkeypatch.setattr(columns, "Features", Counted)
    monkeypatch.setattr(SecondPhase, "verify", lambda phase: verified.append(1) or own(phase))
    modes = {mode: {"second_phase": mode} for mode in ("base", "gd", "sgd")}
    quiet(toy_mlp(), verify="svd", **SETTINGS).branch(
        {**modes, "loud": {"noise_std": 0.1}, "again": {}}, toy_data()
    )
    assert made == ["hidden", "hidden"] and len(verified) == 2


@pytest.mark.parametrize("stop", [("trunk", 1), ("gd", 4)])
def test_interrupted_branches_continue(tmp_path, stop):
    class Stop:
        def on_epoch_end(self, run, record):
            if (run.folder.name, record["epoch"]) == stop:
                os.kill(os.getpid(), signal.SIGINT)

    class Count:
        def on_epoch_end(self, run, record):
            done.append((run.folder.name, record["epoch"]))

    data, done = toy_images(33), []
    chosen = {name: BRANCHES[name] for name in ("paper", "gd", "loud")}
    whole = quiet(toy_convnet(), **SETTINGS).branch(chosen, data)
    first = quiet(toy_convnet(), tmp_path, callbacks=[Stop()], **SETTINGS).branch(chosen, data)
    assert list(first) == (["trunk"] if stop[0] == "trunk" else ["paper", "gd"])
    assert list(first.values())[-1].status == "interrupted"
    again = quiet(toy_convnet(seed=3), tmp_path, callbacks=[Count()], **SETTINGS)
    results = again.branch(chosen, data, resume=True)
    for name in chosen:
        assert same_bits(bits(whole[name].model), bits(results[name].model)), name
    expected = [("loud", e) for e in (3, 4, 5)]
    if stop[0] == "gd":
        assert done == [("gd", 5), *expected]
    done.clear()
    quiet(toy_convnet(seed=4), tmp_path, callbacks=[Count()], **SETTINGS).branch(
        chosen, data, resume=True
    )
    assert done == []


def test_branches_leave_one_trunk_at_several_epochs(tmp_path):
    data, taus = toy_data(), {"late": 4, "early": 2, "own": 3}
    branches = {name: {"tau": tau} for name, tau in taus.items() if name != "own"} | {"own": {}}
    model = toy_mlp()
    results = quiet(model, tmp_path, **SETTINGS).branch(branches, data)
    assert list(results) == ["late", "early", "own"]
    for name, tau in taus.items():
        own = toy_mlp()
        quiet(own, **{**SETTINGS, "tau": tau}).fit(data)
        assert same_bits(bits(own), bits(results[name].model)), name
        assert [r["phase"] for r in results[name].history].index(2) == tau
    half = toy_mlp()  # the trunk was trained once, to the last of them
    quiet(half, second_phase="none", epochs=4, tau=1).fit(data)
    assert same_bits(bits(half), bits(model))
    again = quiet(toy_mlp(seed=3), tmp_path, **SETTINGS).branch(branches, data, resume=True)
    assert same_bits(bits(again["early"].model), bits(results["early"].model))
    with pytest.raises(
        ValueError, match=r"new begins at epoch 2, but the trunk in .* is at epoch 4"
    ):
        quiet(toy_mlp(), tmp_path, **SETTINGS).branch({"new": {"tau": 2}}, data, resume=True)


def test_wrong_branches():
    trainer, data = quiet(toy_mlp(), **SETTINGS), toy_data()
    before = bits(trainer.model)
    for error, message, branches in (
        (TypeError, "branches: expected a dict", {}),
        (TypeError, "branches: expected a dict of arguments for a, got 'gd'", {"a": "gd"}),
        (ValueError, "branches: a changes 'seed'", {"a": {"seed": 2}}),
        (ValueError, "tau: expected an epoch in 0..5, got 6", {"a": {"tau": 6}}),
        (ValueError, "branches: expected the name of a folder", {"a/b": {}}),
        (ValueError, "branches: expected the name of a folder", {"trunk": {}}),
        (
            ValueError,
            "gd: expected smoothness among",
            {"a": {}, "b": {"second_phase": "gd", "gd": {"smoothness": 1}}},
        ),
        (ValueError, "tau: expected an epoch in", {"a": {"epochs": 3}}),
    ):
        with pytest.raises(error, match=message):
            trainer.branch(branches, data)
    assert same_bits(before, bits(trainer.model))


class Jittered(Dataset):
    """Inputs with new noise at every visit."""

    def __init__(self, n=40):
        self.x, self.y = toy_data(n)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(5), self.y[i]


@pytest.mark.parametrize("mode", ["base", "gd", "sgd"])
def test_augmented_copies(mode):
    class Cache:
        def on_epoch_end(self, run, record):
            self.features = run._run.train_features

    cache = Cache()
    settings = {"augment_copies": 3, "second_phase": mode, "callbacks": [cache], **SETTINGS}
    result = quiet(toy_mlp(width=130), precision="float64", **settings).fit(Jittered())
    held = cache.features
    assert held.n == 120 and len(held.stored.rows) == 120 and result.feature_cache == "hidden"
    copies = held.stored.rows.view(3, 40, -1)
    assert not torch.equal(copies[0], copies[1]) and not torch.equal(copies[1], copies[2])
    assert torch.equal(held.stored.targets, torch.cat([Jittered().y] * 3))
    # copy k is the visit of epoch tau + k, as feature_cache="none" would make it
    held.samples.epoch = 4
    x = torch.cat([x for x, _ in held.samples.in_order(features.BATCH)])
    torch.testing.assert_close(copies[1], held.network.hidden(x))
    premise = next(p for p in result.guarantee.premises if p[0] == "fixed features")
    assert premise[1] == "failed" and "3 augmented copies" in premise[2]
    outputs = held.network.logits(held.stored.rows).detach()
    loss = torch.nn.functional.cross_entropy(outputs, held.stored.targets)
    assert result.final["train_loss"] == pytest.approx(float(loss), rel=1e-12)
    if mode != "base":
        assert result.guarantee.curve[-1]["loss"] == pytest.approx(float(loss), rel=1e-12)


def test_base_visits_the_copies_in_turn():
    class Visits:
        def on_epoch_end(self, run, record):
            if record["phase"] == 2:
                copies.append(run._run.train_features.copy)

    copies = []
    settings = {"augment_copies": 2, "callbacks": [Visits()], "epochs": 8, "tau": 3}
    quiet(toy_mlp(), **settings).fit(Jittered())
    assert copies == [1, 0, 1, 0, 1]


def test_copies_are_refused_where_they_make_no_sense():
    with pytest.raises(ValueError, match="do not change from visit to visit"):
        quiet(toy_mlp(), augment_copies=2).fit(toy_data())
    with pytest.raises(ValueError, match="augment_copies: expected at least 1"):
        quiet(toy_mlp(), augment_copies=0)
    with pytest.raises(ValueError, match="feature_cache='none'"):
        quiet(toy_mlp(), augment_copies=2, feature_cache="none")
    for mode in ("gd", "sgd"):
        with pytest.raises(ValueError, match=r"needs fixed features.*augment_copies=k"):
            quiet(toy_mlp(), second_phase=mode).fit(Jittered())
