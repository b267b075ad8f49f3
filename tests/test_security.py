"""Nothing runs code that a file brings, fetches or unpacks unchecked: sources, files, downloads."""

import os
import pickle
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

import twophase.cli
import twophase_ext as tp
from helpers import quiet, toy_data, toy_mlp
from twophase import data
from twophase.report.gather import read_folder
from twophase.verification import verify
from twophase_ext.training.persistence import checkpoint

ROOT = Path(__file__).resolve().parent.parent


# ---- sources (calls that run, fetch or unpack what they are given: ruff, in `make lint`)


def test_templates_trust_two_expressions():
    """The separator of dotted names, and the charts, which an XML library wrote."""
    trusted = []
    for file in (ROOT / "python").rglob("*.jinja"):
        text = file.read_text(encoding="utf-8")
        assert "autoescape" not in text and "<script" not in text
        trusted += re.findall(r"\{\{[^}]*\|\s*safe\b", text)
    assert trusted == ['{{ name.split(".") | join(".<wbr>" | safe', "{{ chart.svg | safe"]


# ---- files that bring code


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """Must not exist at the end; the payload that would make it works."""
    path = tmp_path / "owned"
    pickle.loads(pickle.dumps(Payload(path)))
    path.rmdir()
    yield path
    assert not path.exists()


def hostile(path: Path, marker: Path, how: str) -> None:
    if how == "pickle":
        path.write_bytes(pickle.dumps({"format": checkpoint.FORMAT, "model": Payload(marker)}, 2))
    else:
        state = {"format": checkpoint.FORMAT, "model": {}, "config": Payload(marker), "epoch": 1}
        torch.save(state, path)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_checkpoint_with_code(tmp_path, marker, monkeypatch, how, forced):
    if forced:  # torch's switch for files without the argument
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "checkpoint.pt.new"):
        hostile(tmp_path / name, marker, how)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        quiet(toy_mlp(), tmp_path).fit(toy_data(), resume=True)


def test_features_with_code(tmp_path, marker):
    settings = {"method": "certificate", "folder": tmp_path}
    tp.verify_expressivity(toy_mlp(), toy_data()[0], **settings)
    hostile(next(tmp_path.glob("features-*.pt")), marker, "torch.save")
    with pytest.raises(Exception, match="Weights only load failed"):
        tp.verify_expressivity(toy_mlp(), toy_data()[0], method="certificate", folder=tmp_path)


def test_files_with_code_on_the_command_line(tmp_path, marker):
    def refused(message: str, **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            verify(n=20, width=2, **{key: str(value) for key, value in options.items()})

    hostile(tmp_path / "w.pt", marker, "torch.save")
    refused("weights: .* cannot be read: Weights only", weights=tmp_path / "w.pt")
    np.save(tmp_path / "x.npy", np.array([Payload(marker)], object), allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=np.array([Payload(marker)], object))
    for name in ("x.npy", "x.npz"):
        refused("allow_pickle=False", x=tmp_path / name)
    text = f"model: !!python/object/apply:os.mkdir ['{marker}']\n"
    (tmp_path / "options.yaml").write_text(text)
    refused(r"options\.yaml cannot be read: could not determine a constructor", run=tmp_path)
    with pytest.raises(SystemExit):
        twophase.cli.main(["train", "--config", str(tmp_path / "options.yaml")])
    quiet(toy_mlp(), tmp_path / "run").fit(toy_data())
    (tmp_path / "run" / "options.yaml").write_text(text)
    assert "options.yaml" in read_folder(tmp_path / "run").problems


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """A module in the current folder that says when it is imported, and a certificate of it."""
    (tmp_path / "brought.py").write_text(
        "import pathlib, torch\n"
        "pathlib.Path('imported').touch()\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(),\n"
        "                               torch.nn.Linear(9, 3))\n"
    )
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 7)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = "model: brought:build\ndata_name: digits\nn: 30\nwidth: 8\nratio: 1.1\nseed: 1\n"
    (tmp_path / "options.yaml").write_text(options)
    verdict = tp.Verdict(status="proved", claim="exists", method="separation", n=30, width=33)
    verdict.source = {"data_name": "digits", "model": "brought:build", "n": None, "width": 8}
    verdict.source |= {"ratio": 1.1, "seed": 1, "x": "x.npy"}
    verdict.save(tmp_path / "v.json")


@pytest.mark.parametrize("what", [{"recheck": "v.json"}, {"run": "."}], ids=str)
def test_a_callable_that_only_a_file_names_is_not_called(own_model, what):
    for model in ("small", "brought:other"):
        with pytest.raises(ValueError, match="the file names 'brought:build', code that would run"):
            verify(model=model, **what)
    assert not Path("imported").exists()


def test_a_callable_that_the_command_line_names_too_is_called(own_model, capsys):
    assert verify(model="brought:build", recheck="v.json") == 1  # this certificate is made up
    assert Path("imported").exists() and "does not hold" in capsys.readouterr().out


# ---- downloads


def test_every_download_has_a_sha256(monkeypatch):
    hashes = [h for _, sums in data._IDX_SETS.values() for h in sums]
    hashes += [h for _, h, _ in data._CIFAR.values()] + [h for _, h in data._SVHN.values()]
    assert len(hashes) == len(set(hashes)) == 16
    assert all(re.fullmatch("[0-9a-f]{64}", h) for h in hashes)
    asked = []
    monkeypatch.setattr("pooch.retrieve", lambda url, **k: asked.append((url, k)) or 1 / 0)
    for name in data.NAMES:
        for split in ("train", "test"):
            if name != "digits":
                with pytest.raises(FileNotFoundError, match="ZeroDivisionError"):
                    data.load(name, split, ROOT / "nowhere")
    assert len(asked) == 12
    assert all(k["known_hash"].removeprefix("sha256:") in hashes for _, k in asked)


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_sums_are_those_of_the_files(data_dir, name):
    for file, expected in zip(data._IDX.values(), data._IDX_SETS[name][1], strict=True):
        assert sha256((data_dir / name / file).read_bytes()).hexdigest() == expected
