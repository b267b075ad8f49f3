"""recheck: a genuine certificate holds, whatever made it; of an edited one no field is believed."""

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import Given, toy_data, toy_mlp
from twophase.cli import main
from twophase_ext.expressivity import screening
from twophase_ext.expressivity.outcome import STATUSES
from twophase_ext.expressivity.recheck import NOT_COMPARED
from twophase_ext.linalg.bounds import bound_text

X = torch.rand(10, 4, generator=torch.Generator().manual_seed(0))


def deep(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, 8),
            tp.nn.Softplus(10.0),
            nn.Linear(8, 16),
            tp.nn.Softplus(10.0),
            nn.Linear(16, 2),
        )


def holds(verdict, model, x):
    said = []
    found = verdict.recheck(model, x, say=said.append)
    assert len(said) == 1 and said[0].startswith("holds: " if found else "does not hold: ")
    return found, said[0]


MADE = [
    ("current", "auto", "auto"),
    ("current", "separation", "auto"),
    ("current", "certificate", "auto"),
    ("current", "certificate", "gram"),
    ("current", "certificate", "preconditioned"),
    ("init", "certificate", "preconditioned"),
    ("init", "auto", "auto"),
    ("witness", "auto", "auto"),
    ("witness", "certificate", "auto"),
    ("witness", "certificate", "gram"),
    ("witness", "certificate", "preconditioned"),
]


@pytest.mark.parametrize(("w", "method", "factorization"), MADE)
def test_a_genuine_certificate_holds_and_says_what_is_proved_now(
    w, method, factorization, tmp_path
):
    verdict = tp.verify_expressivity(deep(), X, w=w, method=method, factorization=factorization)
    assert verdict.status == "proved"
    verdict.save(tmp_path / "v.json")
    read = tp.Verdict.load(tmp_path / "v.json")
    for made in (verdict, read):
        found, said = holds(made, deep(), X)
        assert found, said
        assert "not compared: " + ", ".join(NOT_COMPARED) in said
        if verdict.sigma_min_lower is not None:
            bound = bound_text(verdict.sigma_min_lower)
            assert f"proved now: smallest singular value >= {bound}" in said


def test_the_triangular_certificate_and_one_after_it_failed(monkeypatch):
    x, _ = toy_data(20)
    verdict = tp.verify_expressivity(toy_mlp(), x, w="witness", method="certificate")
    assert verdict.factorization == "triangular" and holds(verdict, toy_mlp(), x)[0]
    monkeypatch.setattr(screening, "MANY", -1)  # non-zeros of a triangle
    dense = tp.verify_expressivity(deep(), X, w="witness", method="certificate")
    assert dense.factorization != "triangular" and "inverse_norm" in dense.constants
    assert holds(dense, deep(), X)[0]


def test_preconditioned_after_the_gram_certificate_failed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.rand(16, 4).double()
        layers = (nn.Linear(4, 3), tp.nn.Softplus(1.0), nn.Linear(3, 30), tp.nn.Softplus(1.0))
        model = nn.Sequential(*layers, nn.Linear(30, 2)).double()
    verdict = tp.verify_expressivity(model, x, method="certificate")
    assert verdict.factorization == "preconditioned" and "gram" in verdict.constants
    assert holds(verdict, model, x)[0]
    # a thousandth more is above the true value: refused
    with torch.no_grad():
        matrix = torch.cat([model[:4](x), torch.ones(16, 1)], 1)
    tight = verdict.sigma_min_lower * 1.0009
    assert tight > float(torch.linalg.svdvals(matrix)[-1])
    found, said = holds(dataclasses.replace(verdict, sigma_min_lower=tight), model, x)
    assert not found and "sigma_min_lower" in said and repr(verdict.sigma_min_lower) in said


def edited(value):
    """Values of the same type that a reader would believe, and others."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return [value + "x", "", "certificate", "svd", "init"]
    if isinstance(value, int):
        return [value + 1, 0, -1]
    if isinstance(value, float):
        return [value * 1.01 + 0.2, math.inf, math.nan]
    if isinstance(value, list):
        return [[*value, "nothing is assumed"], [[3, 4]], []]
    if isinstance(value, dict):
        return [{}, {**value, "more": 1}] + [
            {**value, key: new} for key, old in value.items() for new in edited(old)[:2]
        ]
    return [1, 0.5, 7.0]  # None


FREE = ("seed", "asked", *NOT_COMPARED)


@pytest.mark.parametrize(
    "made", [("current", "auto"), ("current", "certificate"), ("witness", "auto")], ids=str
)
def test_no_edited_field_is_believed(made):
    verdict = tp.verify_expressivity(deep(), X, w=made[0], method=made[1])
    wrong = []
    for field in dataclasses.fields(verdict):
        old = getattr(verdict, field.name)
        for new in edited(old) if field.name not in FREE else []:
            changed = dataclasses.replace(verdict, **{field.name: new})
            if changed == verdict or (field.name == "constants" and new.get("gram") == {}):
                continue
            weaker = field.name in ("sigma_min_lower", "logabsdet_lower", "margin")
            if holds(changed, deep(), X)[0] and not (weaker and old is not None and new < old):
                wrong.append((field.name, new))
    assert wrong == []


def test_a_seed_and_what_was_asked_are_proved_again():
    verdict = tp.verify_expressivity(deep(), X, w="init", method="certificate", seed=3)
    assert not holds(dataclasses.replace(verdict, seed=4), deep(), X)[0]  # other weights
    assert not holds(dataclasses.replace(verdict, asked="svd"), deep(), X)[0]
    assert holds(dataclasses.replace(verdict, asked="auto"), deep(), X)[0]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(tp.Verdict)])
def test_wrong_types_and_missing_values_are_no_errors(field):
    verdict = tp.verify_expressivity(deep(), X, method="certificate")
    for value in (None, object(), {"a": [1]}, [None], "7", -1, True):
        changed = dataclasses.replace(verdict, **{field: value})
        found, _ = holds(changed, deep(), X)
        free = field == "seed" and value == -1  # the current weights have none
        claims = ("sigma_min_lower", "logabsdet_lower", "margin", "rank", "sigma_min", "condition")
        free |= value is None and (field in claims or getattr(verdict, field) is None)
        free |= field in NOT_COMPARED or value is True is getattr(verdict, field)
        weaker = field in ("sigma_min_lower", "logabsdet_lower", "margin") and value == -1
        assert not found or free or weaker, (field, value)


def test_a_weaker_bound_holds():
    verdict = tp.verify_expressivity(deep(), X, method="certificate")
    weaker = {
        "sigma_min_lower": verdict.sigma_min_lower / 2,
        "logabsdet_lower": verdict.logabsdet_lower - 5,
        "margin": verdict.margin / 2,
    }
    found, said = holds(dataclasses.replace(verdict, **weaker), deep(), X)
    assert found and str(verdict.sigma_min_lower)[:6] in said  # the bound proved now


@pytest.mark.parametrize("method", ["separation", "certificate"])
def test_verdicts_about_distinct_inputs_carry_what_they_assume(method):
    x = X.clone()
    x[7] = x[2]
    verdict = tp.verify_expressivity(deep(), x, method=method)
    assert verdict.status == "proved" and holds(verdict, deep(), x)[0]
    assert verdict.distinct == len(x) - 1
    assert any("each sample alone" in text for text in verdict.assumptions)
    assert any("flushes none to zero" in text for text in verdict.assumptions)
    assert "the network is a deterministic function of each sample" in str(verdict)
    for fields in (
        {"assumptions": []},
        {"assumptions": verdict.assumptions[:-1]},
        {"culprits": [[2, 6]]},
        {"repeated": [[2, 6]]},
        {"repeated": []},
        {"distinct": len(x)},
        {"distinct": len(x), "repeated": [], "version": 1},
        {"explanation": ["samples 2, 6 have identical inputs"]},
        {"rank": 9},
        {"method": "dimension"},
        {"reason": "trust me"},
    ):
        assert not holds(dataclasses.replace(verdict, **fields), deep(), x)[0], fields
    many = torch.rand(40, 4, generator=torch.Generator().manual_seed(1))
    narrow = tp.verify_expressivity(deep(), many)
    assert narrow.method == "dimension" and holds(narrow, deep(), many)[0]


def test_a_model_that_does_not_run_is_a_reason():
    def fails(module, x):
        raise KeyError("weights")

    verdict = tp.verify_expressivity(deep(), X, method="certificate")
    broken = Given(fails, fc=nn.Linear(4, 2))
    for model, x in ((broken, X), (None, X), (deep(), None), (deep(), X[:, :3]), (deep(), "x")):
        found, said = holds(verdict, model, x)
        assert not found and len(said) > len("does not hold: ")
    named = dataclasses.replace(verdict, last_layer="fc")
    found, said = holds(named, broken, X)
    assert not found and "weights" in said


def test_undecided_and_counted_verdicts_claim_nothing():
    verdict = tp.verify_expressivity(deep(), X, method="certificate")
    for status in (*STATUSES[1:2], STATUSES[3], "true", "", None):
        assert not holds(dataclasses.replace(verdict, status=status), deep(), X)[0]


def test_command_line(tmp_path, capsys, monkeypatch):
    """Exit code 1 and a line, no traceback: whatever the file says, whatever the model does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rechecked.py").write_text(
        "import torch, twophase_ext as tp\nfrom torch import nn\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(4, 8), tp.nn.Softplus(), nn.Linear(8, 2))\n"
        "def broken():\n"
        "    raise RuntimeError('no weights here')\n"
    )
    torch.manual_seed(0)
    np.save("x.npy", torch.rand(6, 4).numpy())
    options = ("--x", "x.npy", "--ratio", "2", "--progress", "false")
    assert main(["verify", "--model", "rechecked:build", "--out", "v.json", *options]) == 0
    assert main(["verify", "--recheck", "v.json", "--model", "rechecked:build"]) == 0
    assert "proved now" in capsys.readouterr().out
    body = json.loads((tmp_path / "v.json").read_text())

    def write(**fields):
        changed = {k: v for k, v in {**body, **fields}.items() if k != "checksum"}
        text = json.dumps(changed, sort_keys=True).encode()
        changed["checksum"] = hashlib.sha256(text).hexdigest()
        (tmp_path / "edited.json").write_text(json.dumps(changed))
        return main(["verify", "--recheck", "edited.json", "--model", changed_model])

    changed_model = "rechecked:build"
    assert write(margin=1e12) == 1 and write(assumptions=[]) == 1 and write(hashes={}) == 1
    source = {k: v for k, v in body["source"].items() if k != "width"}
    assert write(source=source) == 1  # a field that the model is built from is missing
    changed_model = "rechecked:broken"
    assert write(source={**body["source"], "model": changed_model}) == 1
    out, errors = capsys.readouterr()
    assert out.count("does not hold") == 5 and "no weights here" in out
    assert "Traceback" not in out + errors
    assert main(["verify", "--model", "rechecked:broken", *options]) == 1
    assert "undecided: RuntimeError: no weights here" in capsys.readouterr().out
