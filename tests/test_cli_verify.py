"""twophase verify as a user types it."""

import json

import numpy as np
import pytest

import twophase.cli
import twophase_ext as tp


def run(*arguments: str) -> int:
    return twophase.cli.main(list(arguments))


def test_verify_and_recheck(tmp_path, capsys):
    out = tmp_path / "v.json"
    assert run("verify", "--n", "60", "--width", "2", "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert "proved for some weights" in text and f"twophase verify --recheck {out}" in text
    assert run("verify", "--recheck", str(out)) == 0
    assert "holds: proved" in capsys.readouterr().out
    data = json.loads(out.read_text())
    assert data["schema"] == "twophase-verdict/2" and data["environment"]["processor"]


@pytest.mark.parametrize(
    ("key", "value"), [("n", 59), ("data_name", "other.npy"), ("seed", 2), ("width", 3)]
)
def test_other_data_or_another_model_are_refused(tmp_path, capsys, key, value):
    out = tmp_path / "v.json"
    assert run("verify", "--n", "60", "--width", "2", "--out", str(out), "--progress", "false") == 0
    verdict = tp.Verdict.load(out)
    if key == "data_name":
        np.save(tmp_path / value, np.random.default_rng(0).random((60, 1, 8, 8), np.float32))
        key, value = "x", str(tmp_path / value)
    verdict.source[key] = value
    verdict.save(out)
    assert run("verify", "--recheck", str(out)) == 1
    text = capsys.readouterr().out
    assert "does not hold" in text and "certificate" in text


def test_an_edited_file_is_refused(tmp_path, capsys):
    out = tmp_path / "v.json"
    run("verify", "--n", "40", "--width", "2", "--out", str(out), "--progress", "false")
    out.write_text(out.read_text().replace('"seed": 1', '"seed": 2', 1))
    assert run("verify", "--recheck", str(out)) == 2
    assert "has been changed" in capsys.readouterr().err


def test_a_model_and_data_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_model.py").write_text(
        "import torch, twophase_ext as tp\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(),\n"
        "                               torch.nn.Linear(9, 3))\n"
    )
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 7)))
    monkeypatch.chdir(tmp_path)
    arguments = ["verify", "--model", "own_model:build", "--x", "x.npy", "--out", "v.json"]
    assert run(*arguments) == 0
    assert "--recheck v.json --model own_model:build\n" in capsys.readouterr().out
    assert run("verify", "--recheck", "v.json", "--model", "own_model:build") == 0
    assert run("doctor", "--model", "own_model:build", "--x", "x.npy") == 0
    assert "expressivity" in capsys.readouterr().out


def test_the_verdict_of_a_run_is_proved_again_from_its_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--n", "60", "--width", "2", "--epochs", "4", "--tau", "2", "--progress", "false"]
    assert run("train", *options, "--run_dir", str(folder)) == 0
    assert run("verify", "--recheck", str(folder / "verdict.json")) == 0, capsys.readouterr().out
    assert run("verify", "--run", str(folder), "--w", "current", "--progress", "false") == 0


def test_duplicates_count_once_and_near_ones_are_named_and_drawn(tmp_path, capsys):
    images = np.random.default_rng(0).random((20, 1, 8, 8), dtype=np.float32)
    images[7] = images[3]
    out = tmp_path / "v.json"
    arguments = ["--x", str(tmp_path / "x.npy"), "--width", "2", "--out", str(out)]
    np.save(tmp_path / "x.npy", images)
    assert run("verify", *arguments) == 0
    assert "samples 3, 7 have equal inputs" in capsys.readouterr().out
    assert not (tmp_path / "v.png").exists()
    assert run("verify", "--recheck", str(out)) == 0
    images[11] = 0  # within rounding of the next one
    images[12] = 1e-30
    np.save(tmp_path / "x.npy", images)
    assert run("verify", *arguments) == 1
    assert "samples 11, 12 have identical features" in capsys.readouterr().out
    assert (tmp_path / "v.png").read_bytes()[:4] == b"\x89PNG"
