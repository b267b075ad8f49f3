"""The command line as a user types it."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import twophase.cli
import twophase.commands
import twophase.help
import twophase.runs
import twophase_ext as tp


def run(*arguments: str) -> int:
    return twophase.cli.main(list(arguments))


@pytest.mark.slow
def test_demo_leaves_a_run_folder_and_a_summary(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TWOPHASE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-cache"))
    assert run("demo", "--run_dir", str(tmp_path / "run"), "--epochs", "3") == 0
    out = capsys.readouterr().out
    for part in ("1,437 images", "run completed after 3 epochs", "phase 2", "bit-identical"):
        assert part in out
    verdict = tp.Verdict.load(tmp_path / "run" / "verdict.json")
    assert verdict.n == 1437 and verdict.width == 1581
    assert verdict.status == "proved" and f"rank {verdict.rank} of 1437" in out
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [row["phase"] for row in rows] == ["1", "1", "2"]
    report = tmp_path / "run" / "report.html"
    assert f"report: {report}" in out and "</html>" in report.read_text()


def test_demo_on_iris_ends_with_how_far_the_minimum_is(tmp_path, capsys):
    """With its repeated flower."""
    arguments = ("--data_name", "iris", "--run_dir", str(tmp_path / "run"), "--epochs", "8")
    assert run("demo", *arguments) == 0
    out = capsys.readouterr().out
    assert "149 distinct inputs of n = 150" in out and "samples 101, 142 have equal inputs" in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("The training loss is ") and last.endswith(" above it.")
    assert "the global minimum over all weights of this network is 0 (proved" in last


TRAIN = ["--n", "60", "--width", "2", "--epochs", "4", "--tau", "2", "--progress", "false"]


def test_train_saves_its_options_and_reads_them_back(tmp_path, capsys):
    first = tmp_path / "first"
    assert run("train", *TRAIN, "--lr", "0.02", "--run_dir", str(first)) == 0
    options = first / "options.yaml"
    assert "lr: 0.02" in options.read_text()
    second = tmp_path / "second"
    assert run("train", "--config", str(options), "--run_dir", str(second)) == 0
    drop = lambda text: [row.rsplit(",", 1)[0] for row in text.splitlines()]  # noqa: E731  seconds
    assert drop((first / "metrics.csv").read_text()) == drop((second / "metrics.csv").read_text())
    config = json.loads((second / "config.json").read_text())
    assert config["tau_epoch"] == 2 and config["epochs"] == 4
    assert "</html>" in (second / "report.html").read_text()
    told = capsys.readouterr().out.splitlines()  # the sentence of each run, nothing else
    assert len(told) == 2 and all(line.startswith("The training loss is 2.") for line in told)


def test_train_takes_torchs_optimizers_and_schedulers(tmp_path):
    """Classes by name with their arguments, in the options that are saved, too."""
    options = [
        *("--precision=bf16-mixed", "--accumulate=2", "--optimizer=AdamW", "--optimizer.lr=1e-3"),
        *("--scheduler=StepLR", "--scheduler.step_size=1", "--scheduler.gamma=0.5"),
    ]
    assert run("train", *TRAIN, *options, "--run_dir", str(tmp_path / "first")) == 0
    saved = ["--config", str(tmp_path / "first" / "options.yaml")]
    assert run("train", *saved, "--run_dir", str(tmp_path / "again")) == 0
    tables = []
    for name in ("first", "again"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["optimizer"]["class"].endswith("AdamW") and config["scheduler"] == "StepLR"
        assert (config["precision"], config["accumulate"]) == ("bf16-mixed", 2)
        rows = csv.DictReader((tmp_path / name / "metrics.csv").read_text().splitlines())
        tables.append([(row["learning_rate"], row["train_loss"]) for row in rows])
    assert tables[0] == tables[1] and [float(r) for r, _ in tables[0]][:2] == [1e-3, 5e-4]
    with pytest.raises(SystemExit) as stop:
        run("train", *TRAIN, "--scheduler", "NoSuchLR")
    assert stop.value.code == 2


def test_a_report_that_cannot_be_written_costs_one_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left\non the device")

    monkeypatch.setattr(twophase.runs, "write_report", full)
    assert run("train", *TRAIN, "--run_dir", str(tmp_path / "run")) == 0
    assert capsys.readouterr().err == "report.html was not written: no space left\n"
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("model", ["mlp", "preactresnet18"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_train_builds_every_model_and_loss(tmp_path, model, loss):
    code = run("train", *TRAIN, "--model", model, "--loss", loss, "--run_dir", str(tmp_path / "r"))
    assert code == 0


def test_train_a_model_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run("train", *TRAIN, "--model", "mine:build", "--run_dir", "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"] == "Sequential"
    assert run("doctor", "--model", "mine:build", "--n", "60") == 0


def test_doctor_tells_what_fails(capsys):
    assert run("doctor", "--n", "60", "--width", "2") == 0
    assert "expressivity" in capsys.readouterr().out
    assert run("doctor", "--n", "60", "--width", "2", "--ratio", "0") == 1
    assert "tp.nn.widen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--second_phase", "gd", "--gd.steps", "0"], "gd: steps: expected at least 1, got 0"),
        (["--second_phase", "lazy", "--lazy.eta_bar", "2"], "lazy: expected eta_bar in (0, 1)"),
        (["--tau", "1.5"], "tau: expected a fraction"),
        (["--model", "nonsense"], "model: expected mlp"),
        (["--model", "no_such_package:build"], "no_such_package"),
        (["--noise_std", "0"], "noise_std: expected a number > 0"),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path, capsys, arguments, message):
    assert run("train", *TRAIN, "--run_dir", str(tmp_path / "r"), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unknown_options_exit_with_usage():
    with pytest.raises(SystemExit) as stop:
        run("train", "--no_such_option", "1")
    assert stop.value.code == 2


def test_print_config_round_trip(capsys):
    with pytest.raises(SystemExit) as stop:
        run("train", "--print_config")
    assert stop.value.code == 0 and "noise_std: 0.001" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_resumes(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "twophase.cli", "train", "--n", "200", "--width", "2"]
    command += ["--epochs", "2000", "--verify", "off", "--run_dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "run interrupted" in output
    done = len((folder / "metrics.csv").read_text().splitlines()) - 1
    assert 0 < done < 2000


def test_classes_are_those_of_the_whole_set(tmp_path, capsys):
    few = [*TRAIN, "--n", "3", "--run_dir", str(tmp_path / "few")]  # three digits, ten classes
    assert run("train", *few) == 0, capsys.readouterr().err
    assert run("train", *TRAIN, "--n", "0", "--run_dir", str(tmp_path / "none")) == 2
    assert "n: expected at least 1" in capsys.readouterr().err
    assert run("doctor", "--n", "-4") == 2


def test_ctrl_c_outside_of_training_exits_with_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(twophase.cli.data, "load", interrupted)
    assert run("train", *TRAIN) == 130
    assert capsys.readouterr().err == "twophase train: interrupted\n"


def test_help_and_unknown_commands_need_no_torch():
    code = (
        "import sys; from twophase.console import main\n"
        "try: main()\n"
        "except SystemExit as end: assert bool(end.code) == ('--help' not in sys.argv)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    for word, told in [
        ("--help", "reproduce"),
        ("train --help", "--feature_cache FEATURE_CACHE"),
        ("trian", "did you mean train?"),
        ("xyzzy", "'xyz"),
    ]:
        command = [sys.executable, "-c", code, *word.split()]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 0 and told in found.stdout + found.stderr, found
    assert "did you mean" not in found.stderr
    module = [sys.executable, "-m", "twophase", "-h"]
    assert "download" in subprocess.run(module, capture_output=True, text=True, check=True).stdout


def test_help_has_each_option_of_its_command_once_in_a_group():
    for name, part in twophase.cli.make_parser()[1].items():
        words = {word for word in part._option_string_actions if re.fullmatch(r"--\w+", word)}
        text, positional = twophase.help.help_of(name), twophase.help.POSITIONAL.get(name, ())
        found = re.findall(r"^  (?:-h, )?(--\w+)", text, re.M)
        assert sorted(found) == sorted(words) and max(map(len, text.splitlines())) <= 100
        assert {word.upper() for word in positional} <= set(re.findall(r"^  (\w+)$", text, re.M))
        for option in twophase.help.options_of(name).values():
            assert option[2], (name, option)  # each says what it is
    train = twophase.help.help_of("train")
    assert [t for t in train.splitlines() if t and not t.startswith(" ") and t.endswith(":")] == [
        *(f"{title}:" for title in twophase.help.GROUPS),
        "This command:",
    ]
    assert "(default: 1.1)" in train and "{cross_entropy,squared_error}" in train


def test_commands_are_what_their_functions_say():
    assert {
        name: function.__doc__.splitlines()[0] for name, function in twophase.cli.COMMANDS.items()
    } == twophase.commands.SUMMARIES


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--optimiser", "Adam"], "--optimiser Adam (did you mean --optimizer?)"),
        (["train", "--batchsize=3"], "(did you mean --batch_size?)"),
        (["reproduce", "tabel1"], "(did you mean table1?)"),
    ],
)
def test_near_misses_are_named(words, told, capsys):
    with pytest.raises(SystemExit) as end:
        run(*words)
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_far_misses_are_not(capsys):
    with pytest.raises(SystemExit):
        run("train", "--qqq", "1")
    assert "did you mean" not in capsys.readouterr().err


def test_the_version_is_the_projects():
    root = Path(__file__).parent.parent
    assert f'\nversion = "{tp.__version__}"\n' in (root / "pyproject.toml").read_text()
    assert f"\nversion: {tp.__version__}\n" in (root / "CITATION.cff").read_text()
    assert f"\n## {tp.__version__} " in (root / "CHANGELOG.md").read_text()
