"""twophase reproduce: cells are computed once, shared, resumed; tables and figures say what ran."""

import csv
import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from mpmath import mp, mpf

import twophase.cli
import twophase_ext as tp
from twophase import data
from twophase.paper import PAPER_SETTING, PAPER_TABLE_1, PAPER_TABLE_2
from twophase.reproduce import SCALES, cells, experiments, reproduce
from twophase.tables import ResultTable
from twophase_ext.training.phases import FirstPhase

DIGITS = ["--scale", "smoke", "--datasets", "digits", "--seeds", "1"]


def run(*arguments: str) -> int:
    return twophase.cli.main(["reproduce", *arguments])


def read(folder):
    """{trunk's folder: cell}, timings left out."""
    found = {}
    for path in folder.glob("trunks/*/cell.json"):
        cell = json.loads(path.read_text())
        for branch in cell["branches"].values():
            del branch["timings"]
            for row in branch["history"]:
                del row["seconds"]
        found[path.parent.name] = cell["branches"], cell["spectrum"]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with Table 1's smoke runs on digits."""
    folder = tmp_path_factory.mktemp("reproduce")
    assert run("table1", *DIGITS, "--run_dir", str(folder)) == 0
    return folder


@pytest.mark.slow
def test_table1_holds_what_the_runs_reached(finished):
    table = ResultTable.from_json((finished / "table1-smoke.json").read_text())
    runs = read(finished)
    assert [row["augmentation"] for row in table.rows] == ["no", "yes"] and len(runs) == 2
    for row, kind in zip(table.rows, ("plain", "augmented"), strict=True):
        branches, _ = next(cell for name, cell in runs.items() if f"-{kind}-" in name)
        assert row["base"].values == (branches["base"]["test_error"],)
        assert row["two_phase"].values == (branches["two-phase"]["test_error"],)
        assert row["n"] == 96 and row["paper_base"] is None
        assert "proved" in row["expressivity"] and "in 1 of 1" in row["expressivity"]
        first = [[r for r in b["history"] if r["phase"] == 1] for b in branches.values()]
        tau = round(PAPER_SETTING.tau_0 * SCALES["smoke"].epochs)
        assert all(rows[:tau] == first[0][:tau] for rows in first)  # one first phase
        assert [r["phase"] for r in branches["two-phase"]["history"]] == [1, 1, 1, 2, 2]
        assert [r["phase"] for r in branches["base"]["history"]] == [1] * 5
    assert {path.suffix for path in finished.glob("table1-smoke.*")} == {
        ".md",
        ".csv",
        ".json",
        ".tex",
    }
    assert "2 channels (64)" in (finished / "table1-smoke.md").read_text()
    assert not list(finished.glob("trunks/*/*/checkpoint*"))  # finished: no longer needed


@pytest.mark.slow
def test_second_phases_stand_beside_each_other(finished):
    runs = read(finished)
    branches, _ = next(cell for name, cell in runs.items() if "-plain-" in name)
    table = ResultTable.from_json((finished / "second-phases-smoke.json").read_text())
    plain = {row["branch"]: row for row in table.rows if row["augmentation"] == "no"}
    assert set(plain) == {"base", "two-phase", "gd", "agd"}
    assert [r["branch"] for r in table.rows if r["augmentation"] == "yes"] == ["base", "two-phase"]
    for name, row in plain.items():
        own = branches[name]
        assert row["test_error"].values == (own["test_error"],)
        assert row["loss"].values == (own["minimum"]["loss"],)
        assert float(row["gap"]) >= own["minimum"]["loss"] - own["minimum"]["floor"]["upper"]
        assert (row["second"].values[0] > 0) == (name != "base")
    assert plain["agd"]["loss"].mean < plain["two-phase"]["loss"].mean
    drawn = list(csv.DictReader((finished / "equal-time-smoke.csv").read_text().splitlines()))
    agd = [r for r in drawn if r["run"] == "agd"]
    assert len(agd) == SCALES["smoke"].epochs and float(agd[-1]["test_error"]) == pytest.approx(
        branches["agd"]["test_error"]
    )
    seconds = [float(r["seconds"]) for r in agd]
    assert seconds == sorted(seconds) and (finished / "equal-time-smoke.svg").stat().st_size > 1000


def test_the_test_error_is_that_of_the_trained_network():
    images, labels = data.load("digits", "test")
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10)
    )
    model.train()
    model(torch.rand(30, 64))  # running statistics that are not those of the test images
    with torch.no_grad():
        wrong = (model.eval()(images.float() / 255).argmax(1) != labels).float().mean()
    model.train()
    assert cells.test_error(model, images, labels) == pytest.approx(100 * float(wrong), rel=1e-6)
    assert cells.test_error(model, images.float() / 255, labels) == pytest.approx(
        100 * float(wrong), rel=1e-6
    )


def test_nothing_finished_is_computed_again(finished, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(tp.Trainer, "branch", refuse)
    before = (finished / "table1-smoke.json").read_text()
    assert run("table1", *DIGITS, "--run_dir", str(finished)) == 0
    assert "2 of 2 first phases are finished" in capsys.readouterr().out
    assert (finished / "table1-smoke.json").read_text() == before
    assert run("figure3", *DIGITS, "--run_dir", str(finished)) == 0  # from the same runs
    with pytest.raises(AssertionError, match="trained again"):
        run("table1", *DIGITS, "--seeds", "2", "--run_dir", str(finished))


def test_figure3_draws_the_losses_of_the_runs(finished):
    assert run("figure3", *DIGITS, "--run_dir", str(finished)) == 0
    rows = list(csv.DictReader((finished / "figure3-smoke.csv").read_text().splitlines()))
    plain = [r for r in rows if r["augmentation"] == "False" and r["run"] == "base"]
    branches, spectrum = next(c for name, c in read(finished).items() if "-plain-" in name)
    assert [float(r["mean"]) for r in plain] == pytest.approx(
        [r["train_loss"] for r in branches["base"]["history"]], rel=1e-12
    )
    assert {r["trials"] for r in rows} == {"1"} and {r["std"] for r in rows} == {""}
    assert set(spectrum) == {"trunk", "base", "two-phase"}
    bound = list(csv.DictReader((finished / "guarantee-smoke.csv").read_text().splitlines()))
    assert bound and all(float(r["bound"]) >= float(r["loss"]) for r in bound if r["bound"])
    for stem in ("figure3", "guarantee", "spectrum"):
        for suffix in (".svg", ".png"):
            assert (finished / f"{stem}-smoke{suffix}").stat().st_size > 1000


def test_sigma_min_is_that_of_the_features(tmp_path):
    class Last:
        def on_epoch_end(self, run, record):
            self.found = cells.smallest_singular_value(run)
            assert run.network.model.training  # as it was

    images, labels = (part[:40] for part in data.load("digits"))
    last = Last()
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.BatchNorm1d(64),  # its running statistics are meant
        torch.nn.Linear(64, 60),
        tp.nn.Softplus(),
        torch.nn.Linear(60, 10),
    )
    tp.Trainer(
        model,
        epochs=2,
        tau=1,
        second_phase="none",
        run_dir=False,
        progress=False,
        callbacks=[last],
    ).fit((images, labels))
    with torch.no_grad():
        h = model.eval()[:4](images.float() / 255).double().numpy()
    expected = np.linalg.svd(np.hstack([h, np.ones((40, 1))]), compute_uv=False)[-1]
    assert last.found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [("trunk", 2), ("two-phase", 4)])
def test_a_killed_sweep_continues(tmp_path, monkeypatch, stop, capsys):
    arguments = ["table1", *DIGITS, "--augmentation", "no"]
    assert run(*arguments, "--run_dir", str(tmp_path / "whole")) == 0
    own = cells.Watch.on_epoch_end

    def killed(watch, run, record):
        own(watch, run, record)
        if (run.folder.name, record["epoch"] + 1) == stop:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(cells.Watch, "on_epoch_end", killed)
        assert run(*arguments, "--run_dir", str(tmp_path / "part")) == 130
    assert "the same command goes on from here" in capsys.readouterr().out
    assert not read(tmp_path / "part")
    assert run(*arguments, "--run_dir", str(tmp_path / "part")) == 0
    assert read(tmp_path / "part") == read(tmp_path / "whole")


@pytest.mark.slow
def test_table2_is_a_grid_over_one_first_phase(tmp_path, monkeypatch):
    epochs, own = [], FirstPhase.epoch

    def counted(phase, interrupt):
        epochs.append(phase.context.folder.path.name)
        return own(phase, interrupt)

    monkeypatch.setattr(FirstPhase, "epoch", counted)
    assert run("table2", *DIGITS, "--run_dir", str(tmp_path)) == 0
    assert epochs == ["trunk"] * round(max(PAPER_SETTING.tau_0_grid) * SCALES["smoke"].epochs)
    table = ResultTable.from_json((tmp_path / "table2-digits-smoke.json").read_text())
    ((branches, _),) = read(tmp_path).values()
    assert len(branches) == 12 == len(PAPER_TABLE_2)
    for row in table.rows:
        for tau in PAPER_SETTING.tau_0_grid:
            branch = branches[f"tau {tau:g}, noise {row['delta_0']:g}"]
            assert row[f"tau_0={tau}"].values == (branch["test_error"],)
            assert [r["phase"] for r in branch["history"]].index(2) == round(tau * 5)
    assert not any("paper" in column.key for column in table.columns)  # another data set


def test_figure2_against_mpmath(tmp_path):
    assert run("figure2", "--run_dir", str(tmp_path)) == 0
    rows = list(csv.DictReader((tmp_path / "figure2.csv").read_text().splitlines()))
    mp.dps = 40
    for row in rows[::37]:
        z = mpf(float(row["z"]))
        exact = mp.log1p(mp.exp(-100 * abs(z))) / 100
        assert float(row["difference"]) == pytest.approx(float(exact), rel=1e-12)
        assert float(row["softplus"]) == pytest.approx(float(exact + max(z, 0)), rel=1e-15)
    beyond = [row for row in rows if float(row["z"]) > 0.2 + 1e-9]
    below = [row for row in rows if 0.19 < float(row["z"]) < 0.2 - 1e-9]
    assert all(float(row["torch_softplus_minus_relu"]) == 0 for row in beyond)  # the jump
    assert all(float(row["torch_softplus_minus_relu"]) > 1e-11 for row in below)


@pytest.mark.slow
def test_missing_data_are_named_with_their_command(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TWOPHASE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-cache"))
    arguments = ["--scale", "smoke", "--run_dir", str(tmp_path)]
    assert run("table2", *arguments) == 1
    out = capsys.readouterr().out
    assert "`twophase download kmnist` fetches it" in out and "--datasets digits" in out
    assert run("table1", *arguments, "--datasets", "kmnist", "digits", "--seeds", "1") == 0
    assert "kmnist skipped" in (tmp_path / "table1-smoke.md").read_text()


def test_unknown_names_are_refused(tmp_path):
    for name, value in (("what", "table3"), ("scale", "huge"), ("augmentation", "maybe")):
        settings = {"what": "table1", name: value}
        with pytest.raises(ValueError, match=f"{name}: expected one of .*, got '{value}'"):
            reproduce(settings.pop("what"), run_dir=tmp_path, **settings)
    with pytest.raises(ValueError, match="datasets: expected one of"):
        reproduce("table1", datasets=["imagenet"], run_dir=tmp_path)


def test_full_is_the_paper_s_setting():
    full = SCALES["full"]
    data_sets = ("mnist", "cifar10", "cifar100", "svhn")
    trunks = experiments.table1_trunks(
        full, data_sets, (False, True), range(1, full.trials + 1), "frozen"
    )
    assert len(trunks) == 5 * len(PAPER_TABLE_1)
    for trunk in trunks:
        assert (trunk.n, trunk.n_test, trunk.width) == (None, None, 64)
        assert trunk.epochs == (400 if trunk.augmentation else 100)
        assert dict(trunk.branches) == {
            "base": {"second_phase": "none"},
            "two-phase": {"second_phase": "base"},
        }
        assert trunk.setting == {
            "batch_size": 64,
            "lr": 0.01,
            "momentum": 0.9,
            "weight_decay": 1e-5,
            "wide_ratio": 1.1,
            "tau_0": 0.6,
            "delta_0": 0.001,
        }
    grid = experiments.table2_trunks(full, ["kmnist"], range(1, full.trials_grid + 1), "frozen")
    places = {(c["noise_std"], c["tau"]) for trunk in grid for c in trunk.branches.values()}
    assert len(grid) == 3 and places == set(PAPER_TABLE_2)
    assert full.note() == "Scale full: the setting of the paper's section 7."


def test_a_trunk_is_named_by_its_settings():
    trunk = experiments.table2_trunks(SCALES["smoke"], ["digits"], [1], "frozen")[0]
    assert trunk.name == dataclasses.replace(trunk).name
    changes = {
        "data_set": "mnist",
        "augmentation": True,
        "seed": 2,
        "n": 95,
        "n_test": 10,
        "width": 3,
        "epochs": 6,
        "branches": {},
        "batch_norm": "batch",
        "spectrum": True,
        "curves": True,
        "setting": {**trunk.setting, "lr": 0.02},
    }
    assert set(changes) == {field.name for field in dataclasses.fields(trunk)}
    names = {dataclasses.replace(trunk, **{key: value}).name for key, value in changes.items()}
    assert len(names | {trunk.name}) == len(changes) + 1
