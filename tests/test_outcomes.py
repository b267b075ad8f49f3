"""What a method comes to, an exception included, is in the verdict; the run goes on."""

import time

import numpy as np
import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import Given, toy_data, toy_mlp
from twophase.cli import main
from twophase_ext.expressivity import attempts, certify, methods, verify

X = toy_data(20)[0]


def no_memory(*arguments, **settings):
    raise MemoryError("n = 20 rows need 26.8 GiB of host; there are 1 GiB of host")


def equal_features():
    """All samples leave the backbone as one point."""
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 30), tp.nn.Softplus())
    nn.init.zeros_(model[0].weight)
    return model.append(nn.Linear(30, 2))


@pytest.mark.parametrize("method", ["auto", "certificate", "separation", "svd"])
@pytest.mark.parametrize("w", ["current", "init", "witness"])
def test_equal_features_and_overflow_are_undecided(w, method):
    overflow = nn.Sequential(nn.Linear(5, 30), tp.nn.Softplus(), nn.Linear(30, 2)).double()
    nn.init.constant_(overflow[0].weight, 1e308)
    verdict = tp.verify_expressivity(equal_features(), X, w=w, method=method)
    if w == "current":
        assert verdict.status == "undecided" and verdict.reason
    assert verdict.status in ("undecided", "full rank", "proved")
    found = tp.verify_expressivity(overflow, 100 * X.double(), w=w, method=method)
    if w == "current":  # of these weights nothing is claimed; others there are
        assert (found.status, found.claim) in (("undecided", "at w"), ("proved", "exists"))


def test_every_attempt_is_in_the_reason(monkeypatch):
    """The triangular certificate, then the Gram one without memory, then one that is too large."""
    monkeypatch.setattr(certify, "certify_gram", no_memory)
    monkeypatch.setattr(certify, "PRECONDITIONED_ROWS", 10)
    verdict = tp.verify_expressivity(equal_features(), X, w="witness", method="certificate")
    assert verdict.status == "undecided"
    for part in ("triangular: the neuron of sample", "gram: MemoryError: n = 20 rows", "not tried"):
        assert part in verdict.reason
    assert verdict.culprits and verdict.explanation
    auto = tp.verify_expressivity(equal_features(), X, w="witness")
    assert "gram: MemoryError" in auto.reason and "not apart" in auto.reason  # separation's


def test_the_command_line_ends_with_1_and_the_reasons(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(certify, "certify_gram", no_memory)
    monkeypatch.setattr(certify, "PRECONDITIONED_ROWS", 10)
    x = np.zeros((20, 1, 4, 4), dtype=np.float32)
    x[:, 0, 0, 0] = np.arange(20) * 1e-7  # distinct inputs that float32 features do not tell apart
    np.save("x.npy", x)
    options = ["--x", "x.npy", "--model", "mlp", "--width", "2", "--w", "witness"]
    code = main(["verify", *options, "--method", "certificate", "--factorization", "auto"])
    out, errors = capsys.readouterr()
    assert (code == 0) == ("proved for some weights" in out) and "Traceback" not in out + errors
    if code:
        assert code == 1 and "triangular: " in out and "gram: MemoryError" in out


@pytest.mark.parametrize("error", [IndexError("tuple index"), AttributeError("x"), MemoryError()])
def test_a_method_that_raises_leaves_the_others(monkeypatch, error):
    def fails(*arguments, **settings):
        raise error

    monkeypatch.setattr(methods, "separate", fails)
    verdict = tp.verify_expressivity(toy_mlp(), X)
    assert verdict.status == "proved" and verdict.method == "certificate"
    alone = tp.verify_expressivity(toy_mlp(), X, method="separation")
    assert alone.status == "undecided" and type(error).__name__ in alone.reason
    monkeypatch.setattr(methods, "certify_given", fails)
    monkeypatch.setattr(methods, "find_culprits", fails)
    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    verdict = tp.verify_expressivity(toy_mlp(), X)
    assert verdict.status == "undecided"
    for name in ("separation", "svd", "certificate"):
        assert f"{name}: {type(error).__name__}" in verdict.reason


def test_training_goes_on_where_the_verification_raises(monkeypatch):
    def fails(*arguments, **settings):
        raise IndexError("a rule's own")

    for name in ("Problem", "separate", "certify_given"):
        monkeypatch.setattr(verify if name == "Problem" else methods, name, fails)
        settings = {"epochs": 4, "tau": 0.5, "run_dir": False, "progress": False}
        result = tp.Trainer(toy_mlp(), **settings).fit(toy_data(20))
        assert result.status == "completed"
        if name == "Problem":
            assert "IndexError: a rule's own" in result.verdict.reason


def test_what_fits_nowhere_is_refused_before_the_first_step(monkeypatch):
    calls = []

    def counted(module, x):
        calls.append(len(x))
        return module.fc(x)

    model = Given(counted, fc=nn.Linear(5, 30))
    model = nn.Sequential(model, tp.nn.Softplus(), nn.Linear(30, 3))
    for module in (attempts, __import__("sys").modules["twophase_ext.linalg.plan"]):
        monkeypatch.setattr(module, "available_memory", lambda device: 1000)
    for method in ("svd", "certificate"):
        settings = {"epochs": 4, "tau": 0.5, "run_dir": False, "progress": False}
        trainer = tp.Trainer(model, verify=method, feature_cache="none", **settings)
        started = time.perf_counter()
        with pytest.raises(MemoryError, match="GiB"):
            trainer.fit(toy_data(20))
        assert time.perf_counter() - started < 5 and not model[0].fc.weight.grad
    verdict = tp.verify_expressivity(toy_mlp(), X, method="certificate", factorization="gram")
    assert verdict.status == "undecided" and "MemoryError" in verdict.reason
    assert all(stage["name"] != "backbone features" for stage in verdict.stages)
