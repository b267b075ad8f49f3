"""Loggers: TensorBoard's event file read back, wandb's calls recorded, what is missing named."""

import csv
import sys
from types import ModuleType

import pytest

import twophase.cli
from helpers import quiet, toy_data, toy_mlp
from interrupts import End

TRAIN = ["train", "--n", "60", "--width", "2", "--epochs", "4", "--tau", "2", "--progress", "false"]
TRAIN += ["--verify", "off"]
LOGGED = {"phase", "train_loss", "train_accuracy", "val_loss", "val_accuracy"}
LOGGED |= {"learning_rate", "seconds"}


def train(*arguments: str) -> int:
    return twophase.cli.main([*TRAIN, *arguments])


def columns(folder) -> dict[str, list[float]]:
    """metrics.csv: column -> its values by epoch."""
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    return {name: [float(row[name]) for row in rows] for name in LOGGED}


def events(folder):
    """What TensorBoard itself reads: scalars {name: [(step, value)]}, and the markers' steps."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(folder)).Reload()
    tags = found.Tags()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags["scalars"]}
    markers = {tag: [e.step for e in found.Tensors(tag)] for tag in tags["tensors"]}
    return scalars, markers


def test_tensorboard_holds_the_csv_and_a_marker_at_tau(tmp_path):
    pytest.importorskip("tensorboard")
    assert train("--logger", "tensorboard", "--run_dir", str(tmp_path)) == 0
    scalars, markers = events(tmp_path)
    assert scalars.keys() == LOGGED
    for name, values in columns(tmp_path).items():
        assert [step for step, _ in scalars[name]] == [0, 1, 2, 3]
        assert [value for _, value in scalars[name]] == pytest.approx(values, rel=1e-6)  # float32
    assert markers == {"tau/text_summary": [2]}


def test_tensorboard_hides_the_epochs_that_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")

    def fit(*callbacks, resume):
        settings = {"epochs": 5, "tau": 4, "checkpoint_every": 2, "logger": "tensorboard"}
        quiet(toy_mlp(), tmp_path, callbacks=callbacks, **settings).fit(toy_data(), resume=resume)

    with pytest.raises(RuntimeError, match="went down"):
        fit(End(2, by=RuntimeError("the machine went down")), resume=False)
    fit(resume=True)  # from epoch 2
    scalars, markers = events(tmp_path)
    assert [step for step, _ in scalars["train_loss"]] == [0, 1, 2, 3, 4]
    assert "val_loss" not in scalars and markers == {"tau/text_summary": [4]}


class Wandb(ModuleType):
    """Records what is called."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.settings, self.logged, self.summary, self.finished = {}, {}, {}, 0

    def init(self, **settings):
        self.settings = settings
        return self

    def log(self, values, step):
        self.logged.setdefault(step, {}).update(values)

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("mode", [None, "online"])
def test_wandb_gets_every_record(tmp_path, monkeypatch, mode):
    stub = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    if mode is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", mode)
    folder = tmp_path / "run"
    assert train("--logger", "wandb", "--run_dir", str(folder)) == 0
    assert stub.settings["mode"] == (mode or "offline")
    assert stub.settings["dir"] == str(folder) and stub.settings["name"] == "run"
    assert stub.settings["config"]["tau_epoch"] == 2
    assert list(stub.logged) == [0, 1, 2, 3] and stub.finished == 1
    for name, values in columns(folder).items():
        assert [stub.logged[step][name] for step in range(4)] == pytest.approx(values, rel=1e-9)
    assert stub.summary == {"tau": 2}
    assert [step for step, values in stub.logged.items() if "tau" in values] == [2]


def test_logger_is_closed_where_training_fails(tmp_path, monkeypatch):
    stub = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(stub, "log", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        train("--logger", "wandb", "--run_dir", str(tmp_path / "run"))
    assert stub.finished == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package_names_its_extra_before_training(tmp_path, monkeypatch, capsys, name):
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    folder = tmp_path / "run"
    assert train("--logger", name, "--run_dir", str(folder)) == 2
    error = capsys.readouterr().err
    assert f"logger: {name} is not installed" in error and f"twophase-ext[{name}]" in error
    assert error.count("\n") == 1 and not folder.exists()


def test_a_logger_by_name_needs_the_runs_folder(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    with pytest.raises(ValueError, match="logger: expected a Trainer with a run_dir"):
        quiet(toy_mlp(), logger="wandb").fit(toy_data())
    with pytest.raises(ValueError, match=r"logger: expected one of .* got 'csv' .every run"):
        quiet(toy_mlp(), logger="csv")
    with pytest.raises(TypeError, match=r"logger: expected .* add_scalar, log_metrics or log"):
        quiet(toy_mlp(), logger=object())


@pytest.mark.parametrize("method", ["add_scalar", "log_metrics", "log"])
def test_loggers_of_ones_own_get_every_row(method):
    got: dict[int, dict] = {}

    class Own:
        pass

    def add_scalar(self, name, value, step):
        got.setdefault(step, {})[name] = value

    def log(self, values, step):
        got.setdefault(step, {}).update(values)

    setattr(Own, method, add_scalar if method == "add_scalar" else log)
    result = quiet(toy_mlp(), logger=Own()).fit(toy_data())
    for row in result.history:
        known = {key: row[key] for key in row if key != "epoch" and row[key] is not None}
        assert got[row["epoch"]] == known | ({"tau": 2} if row["epoch"] == 2 else {})


def test_callbacks_are_told_of_every_end():
    told = []

    class Ends:
        def on_fit_end(self, run):
            told.append(run.epoch)

    with pytest.raises(RuntimeError, match="down"):
        quiet(toy_mlp(), callbacks=[Ends(), End(1, by=RuntimeError("down"))]).fit(toy_data())
    quiet(toy_mlp(), callbacks=[Ends()]).fit(toy_data())
    assert told == [2, 4]
