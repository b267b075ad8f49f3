"""Random calls of every public function; and that the harness sees what it is there to see."""

import copy
import importlib
import json
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import twophase_ext as tp
from fuzz import files, harness, run
from fuzz.harness import Refused, attempt, close

CASES = {
    (module, name): {
        "trainer": 6,
        "own_loop": 12,
        "certificates": 6,
        "bound": 6,
        "surgery": 12,
        "claims": 40,
        "training": 15,
        "construction": 6,
    }.get(name, 25)
    for module in (
        "fuzz.ops",
        "fuzz.exact",
        "fuzz.last_layer",
        "fuzz.models",
        "fuzz.altered",
        "fuzz.minima",
    )
    for name in importlib.import_module(module).CASES
}
# Reached by a case under another name, or a class that a function returns.
ELSEWHERE = {
    "perturb_": "perturb_",
    "SGD": "SGD.step",
    "Trainer": "Trainer.fit",
    "Softplus": "nn.Softplus",
    "analytic": "analytic",
}
RETURNED = {
    *("Assumptions", "Guarantee", "LazyGuarantee", "NtkRank", "RankLogdet", "Result", "Verdict"),
    *("GlobalMinimum", "LossFloor"),
    *("Callback", "RunView"),
    *("AnalyticReport", "Finding", "Frozen", "Replacement", "Rows", "WideHead"),
    *("nn", "ops", "optim"),
    *(name for name in tp.nn.__all__ if name.startswith("Smooth")),  # what `analytic` puts
}
READ = {"load_run"}  # of files, which are damaged below
bounded = settings(suppress_health_check=list(HealthCheck))
randoms = st.randoms(use_true_random=False)


@pytest.fixture(autouse=True)
def fewer_repeats(monkeypatch):
    monkeypatch.setattr(harness, "REPEATS", 2)


@pytest.mark.parametrize(("module", "name"), CASES)
def test_case(module, name, one_thread):
    case = importlib.import_module(module).CASES[name][0]
    settings(bounded, max_examples=CASES[module, name])(given(randoms)(case))()


def test_every_public_function_has_a_case(one_thread):
    harness.CALLS.clear()
    for module, name in CASES:
        for seed in range(40 if name in ("small", "surgery", "settings", "own_loop") else 8):
            importlib.import_module(module).CASES[name][0](random.Random(seed))
    called = set(harness.CALLS)
    public = {*tp.__all__, *tp.ops.__all__, *tp.nn.__all__, "SGD"} - RETURNED - READ
    assert {ELSEWHERE.get(name, name) for name in public} <= called


# ---- files


@pytest.mark.parametrize("name", files.READERS)
def test_damaged_files(name, one_thread):
    content = (files.original(name)[0] / files.READERS[name].file).read_bytes()

    @settings(bounded, max_examples=3 if name.startswith("run ") else 30)
    @given(randoms)
    def check(r):
        files.read_damaged(name, files.damaged(r, content))

    check()
    if not name.startswith("run "):
        for foreign in files.FOREIGN:
            files.read_damaged(name, foreign)


def test_an_intact_file_is_read(one_thread):
    for name, reader in files.READERS.items():
        if not name.startswith("run "):
            kept, truth = files.original(name)
            assert files.same(reader.read(kept), truth), name


def test_a_reader_that_believes_damage_is_found(monkeypatch):
    kept, _ = files.original("verdict")
    content = (kept / "verdict.json").read_text().replace('"n": 4', '"n": 5').encode()
    files.read_damaged("verdict", content)  # refused
    naive = files.READERS["verdict"]._replace(
        read=lambda f: json.loads((f / "verdict.json").read_text())
    )
    monkeypatch.setitem(files.READERS, "verdict", naive)
    with pytest.raises(AssertionError, match="read something else"):
        files.read_damaged("verdict", content)
    with pytest.raises(AssertionError, match="not named"):
        files.read_damaged("verdict", b"[")  # json's own message


def test_a_forged_certificate_is_not_believed(tmp_path, one_thread):
    """Saved again, so that its checksum fits: whatever is claimed beyond the proof is seen."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 6), tp.nn.Softplus(), torch.nn.Linear(6, 2))
    x = torch.randn(4, 2)
    verdict = tp.verify_expressivity(model, x)
    assert verdict.recheck(model, x, say=lambda _: None)
    forged = {
        "status": "deficient",
        "claim": "exists",
        "n": 3,
        "width": 7,
        "sigma_min_lower": verdict.sigma_min_lower * 1.01,
        "logabsdet_lower": verdict.logabsdet_lower + 0.1,
        "margin": float("inf"),
        "bias": False,
        "w": "init",
        "method": "separation",
        "dtype": "float32",
        "culprits": [[0, 1]],
        "hashes": {**verdict.hashes, "data": "0" * 64},
    }
    for name, value in forged.items():
        one = copy.copy(verdict)
        setattr(one, name, value)
        one.save(tmp_path / "v.json")
        read = tp.Verdict.load(tmp_path / "v.json")
        try:
            assert not read.recheck(model, x, say=lambda _: None), name
        except ValueError:
            continue


# ---- the harness


def test_attempt_sees_a_change_a_bad_message_and_a_warning():
    def changes(x):
        x.add_(1)
        raise ValueError("x: expected something else")

    def speaks(x):
        raise ValueError("not so")

    def internal(x):
        raise RuntimeError("INTERNAL ASSERT FAILED at x.cpp")

    def warns(x):
        warnings.warn("an internal detail", stacklevel=1)

    x = torch.zeros(3)
    for function, why in (
        (changes, "changed an argument"),
        (speaks, "no argument is named"),
        (internal, "INTERNAL ASSERT"),
        (warns, "warned"),
        (lambda x: x.add_(1), "changed an argument"),
    ):
        with pytest.raises(AssertionError, match=why):
            attempt(function, x)
    assert isinstance(attempt(tp.softplus, x, "a"), Refused)
    with pytest.raises(AssertionError, match="expected, within"):
        close(x, x.numpy() + 1, 0.5, "x")


PLANTED_SEED = 591  # from here: hang, crash, fail, fine, fine, fine
PLANTED = """
import ctypes, os
def crash(r): ctypes.string_at(0)
def hang(r):
    while True: pass
def fail(r): assert False, "planted"
def fine(r):
    from fuzz.harness import CALLS
    CALLS["fine"] += 1
CASES = {"crash": (crash, 1), "hang": (hang, 1), "fail": (fail, 1), "fine": (fine, 3)}
"""


@pytest.mark.slow
def test_the_long_run_counts_crashes_hangs_and_failures(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    monkeypatch.syspath_prepend(str(tmp_path))
    command = [sys.executable, str(Path(run.__file__)), "--modules", "planted", "--jobs", "1"]
    done = subprocess.run(
        [*command, "--calls", "3", "--block", "6", "--hang", "3", "--seed", str(PLANTED_SEED)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    for found in ("SIGSEGV", "hang", "AssertionError: planted"):
        assert found in done.stdout, done.stdout
    assert re.search(r"^fine +3$", done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.endswith(" 2 crashes, 1 failures\n")
    case = re.search(r"--case (planted:fail:\d+)", done.stdout)
    once = subprocess.run(
        [*command, "--case", case[1]], capture_output=True, text=True, check=False
    )
    assert "AssertionError: planted" in once.stderr
