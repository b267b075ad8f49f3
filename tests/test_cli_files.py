"""twophase on files of one's own, and on runs that Python made."""

import json

import numpy as np
import pytest
import torch

import twophase.cli
import twophase_ext as tp
from twophase.files import read_inputs, read_targets
from twophase.runs import load_run

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 7)).astype(np.float32)
WORDS = np.array(["iris", "rose", "aster"])[RNG.integers(3, size=50)]
TRAIN = ["train", "--model", "mlp", "--epochs", "3", "--tau", "2", "--progress", "false"]


def run(*arguments: str) -> int:
    return twophase.cli.main(list(arguments))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        ["kind", *"abcdefg"],
        *([w, *map(repr, map(float, r))] for w, r in zip(WORDS, X, strict=True)),
    ]
    (tmp_path / "x.csv").write_text("\n".join(",".join(row) for row in rows))
    labels = np.unique(WORDS, return_inverse=True)[1]
    np.savez(tmp_path / "both.npz", x=X, y=labels)
    (tmp_path / "hole.csv").write_text("a,b\n1,2\n3,\n5,6\n")
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", labels)
    np.save(tmp_path / "numbers.npy", X[:, 0] * 0.3)
    return tmp_path


@pytest.mark.parametrize(
    "files",
    [
        ("x.csv", "kind"),
        ("x.npy", "y.npy"),
        ("both.npz", None),
        ("both.npz", "y"),
        ("x.npy", "both.npz"),
    ],
)
def test_the_same_arrays_from_every_file(here, files):
    x, y = files
    targets, names = read_targets(y, x)
    assert torch.equal(read_inputs(x, y), torch.from_numpy(X))
    assert targets.tolist() == np.unique(WORDS, return_inverse=True)[1].tolist()
    assert names == (("aster", "iris", "rose") if y == "kind" else None)


def test_a_run_on_a_table_its_recheck_and_its_losses(here, capsys):
    arguments = ["--x", "x.csv", "--y", "kind", "--x_test", "x.csv", "--run_dir", "run"]
    assert run(*TRAIN, *arguments) == 0, capsys.readouterr().err
    config = json.loads((here / "run" / "config.json").read_text())
    assert (config["n"], config["outputs"]) == (50, 3)
    result = load_run("run")
    assert result.classes == ("aster", "iris", "rose")
    with pytest.raises(FileNotFoundError, match=r"folder: .* holds no options\.yaml of"):
        load_run(here)
    right = result.predict(X, labels=True) == WORDS
    assert right.mean() == pytest.approx(result.final["train_accuracy"])
    final = json.loads((here / "run" / "result.json").read_text())["final"]
    assert final["val_loss"] == pytest.approx(final["train_loss"], rel=1e-6)
    assert run("verify", "--recheck", "run/verdict.json") == 0, capsys.readouterr().out
    assert run(*TRAIN, "--x", "x.npy", "--y", "numbers.npy", "--run_dir", "r") == 2
    assert "--loss squared_error trains on numbers" in capsys.readouterr().err
    numbers = ["--x", "x.npy", "--y", "numbers.npy", "--loss", "squared_error", "--run_dir", "r"]
    assert run(*TRAIN, *numbers) == 0
    assert json.loads((here / "r" / "config.json").read_text())["outputs"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--x", "x.csv"], "x.csv, kind, a, b, c, d, e, f, g; got None"),
        (["--x", "x.csv", "--y", "a"], "expected numbers in column kind"),
        (
            ["--x", "hole.csv", "--y", "a"],
            "in column b of hole.csv, in row 2 below the header it is",
        ),
        (["--x", "no.npy", "--y", "y.npy"], "x: there is no file no.npy"),
        (["--x", "x.npy", "--y", "x.txt"], "y: expected a file"),
        (["--y", "y.npy"], "x: expected a file beside y.npy, got none"),
        (["--x", "both.npz", "--y_test", "y.npy"], "x_test: expected a file"),
        (["--optimizer", "AdamW", "--momentum", "0.5"], "momentum: of SGD alone; give the opt"),
        (["--second_phase", "bass"], "(did you mean base?)"),
    ],
)
def test_what_does_not_go_together_is_said(here, capsys, arguments, message):
    assert run(*TRAIN, "--run_dir", "run", *arguments) == 2
    assert message in capsys.readouterr().err


def test_run_dir_false_writes_nothing(here):
    before = set(here.iterdir())
    assert run(*TRAIN, "--x", "x.npy", "--y", "y.npy", "--run_dir", "False") == 0
    assert set(here.iterdir()) == before


def test_columns_of_very_different_sizes_are_named(here):
    (here / "wine.csv").write_text("hue,proline,kind\n1.0,1680,0\n1.1,280,1\n0.9,500,0\n")
    with pytest.warns(UserWarning, match="column proline varies by .*, column hue by 0.08"):
        read_inputs("wine.csv", "kind")


def test_near_misses_of_values_are_named(here, capsys):
    for words, told in (("--data_name=mnst", "mnist?"), ("--optimizer=AdamWw", "AdamW?")):
        with pytest.raises(SystemExit):
            run("train", words)
        assert f"(did you mean {told}" in capsys.readouterr().err


def test_a_run_made_from_python_is_proved_again(here, capsys, monkeypatch):
    (here / "of_mine.py").write_text(
        "import torch, twophase_ext as tp\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.BatchNorm1d(9),\n"
        "                                torch.nn.Linear(9, 3))\n"
        "    return tp.nn.widen(model, n=50)\n"
    )
    monkeypatch.syspath_prepend(str(here))
    from of_mine import build

    trainer = tp.Trainer(build(), epochs=3, tau=2, run_dir="made", progress=False)
    y = torch.from_numpy(np.load("y.npy"))
    assert trainer.fit((torch.from_numpy(X), y)).verdict.status == "proved"
    again = ["verify", "--recheck", "made/verdict.json"]
    assert run(*again) == 2
    assert "--model package.module:callable" in capsys.readouterr().err
    assert run(*again, "--model", "of_mine:build", "--x", "x.npy") == 0, capsys.readouterr().out
    np.save("x.npy", X + 1)
    assert run(*again, "--model", "of_mine:build", "--x", "x.npy") == 1


def test_ctrl_c_says_how_to_go_on(here, capsys, monkeypatch):
    import signal

    from interrupts import End

    save = twophase.cli.SaveOptions

    class Ends(save):
        def on_epoch_end(self, run, record):
            End(0, by=signal.SIGINT).on_epoch_end(run, record)

    monkeypatch.setattr(twophase.cli, "SaveOptions", Ends)
    assert run(*TRAIN, "--x", "both.npz", "--run_dir", "a run") == 130
    told = capsys.readouterr().err
    command = "twophase train --config 'a run'/options.yaml --run_dir 'a run' --resume true"
    assert told == f"interrupted; it goes on with: {command}\n"
    monkeypatch.setattr(twophase.cli, "SaveOptions", save)
    words = ["--config", "a run/options.yaml", "--run_dir", "a run", "--resume", "true"]
    assert run("train", *words) == 0, capsys.readouterr().err
