"""Verdicts against matrices whose rank is known."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import bits, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from twophase.models import PreActResNet18
from twophase_ext.expressivity import backbone
from twophase_ext.expressivity.methods import AUTO_SECONDS


def features(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """[h, 1] in float64 by hand, for the toy MLP."""
    with torch.no_grad():
        h = model.double()[:-1](x.double())
    return torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], 1).numpy()


def test_full_rank_agrees_with_numpy():
    x, _ = toy_data(30)
    model = toy_mlp()
    before = bits(model)
    verdict = tp.verify_expressivity(model, x, method="svd")
    assert same_bits(before, bits(model)) and model[0].weight.dtype == torch.float32
    matrix = features(model, x)
    assert verdict.status == "full rank" and verdict.claim == "at w"
    assert verdict.rank == np.linalg.matrix_rank(matrix) == 30
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert verdict.sigma_min == pytest.approx(sigma[-1], rel=1e-6)
    assert verdict.logabsdet == pytest.approx(2 * np.log(sigma).sum(), rel=1e-9)


def test_numerically_low_rank_is_undecided_not_deficient():
    x, _ = toy_data(30)
    model = toy_mlp()
    with torch.no_grad():
        model[2].weight.zero_()  # constant features: no longer a function of x
    verdict = tp.verify_expressivity(model, x, method="svd")
    assert verdict.status == "undecided" and verdict.rank == 1
    # auto proves that other weights have full rank, and does not hide the count at these
    verdict = tp.verify_expressivity(model, x)
    assert (verdict.status, verdict.claim, verdict.rank) == ("proved", "exists", 1)
    assert verdict.rank == np.linalg.matrix_rank(features(model, x))


def test_identical_inputs_are_named():
    x, _ = toy_data(30)
    x[7], x[21], x[3] = x[2], x[2], x[11]
    verdict = tp.verify_expressivity(toy_mlp(), x)
    assert (verdict.status, verdict.n, verdict.distinct) == ("proved", 30, 27)
    assert verdict.repeated == [[2, 7, 21], [3, 11]] and verdict.culprits == []
    assert "rank [h_X', 1] = N = 27 distinct inputs of n = 30 (m_H = " in str(verdict)
    assert "2 groups of repeated inputs\n  samples 2, 7, 21 have equal inputs" in str(verdict)


def test_negative_zero_is_zero():
    x = torch.zeros(2, 5)
    x[1] = -0.0
    assert tp.verify_expressivity(toy_mlp(), x).repeated == [[0, 1]]


def test_too_many_samples_for_the_width():
    x, _ = toy_data(50)
    verdict = tp.verify_expressivity(toy_mlp(width=48), x)
    assert verdict.status == "deficient" and "n = 50 > m_H + 1 = 49" in verdict.reason
    assert tp.verify_expressivity(toy_mlp(width=49), x).status != "deficient"


def test_batch_norm_network_in_evaluation_mode():
    x, _ = toy_images(20)
    model = toy_convnet().train()
    verdict = tp.verify_expressivity(model, x)
    assert verdict.status == "proved" and model.training
    assert verdict.rank == 20


def test_large_problems_are_left_with_an_estimate(monkeypatch):
    x, _ = toy_data(30)
    monkeypatch.setitem(AUTO_SECONDS, "current", 0.0)
    verdict = tp.verify_expressivity(toy_mlp(), x)
    assert verdict.status == "proved" and verdict.claim == "exists" and verdict.rank is None
    assert "pass method='svd'" in verdict.reason
    # separation needs an analytic activation
    model = nn.Sequential(*toy_mlp()[:3], nn.ELU(), toy_mlp()[4])
    verdict = tp.verify_expressivity(model, x)
    assert verdict.status == "undecided" and "pass method='svd'" in verdict.reason
    assert tp.verify_expressivity(model, x, method="svd").status == "full rank"


def test_uint8_numpy_and_bad_arguments():
    x = torch.randint(0, 256, (20, 5), dtype=torch.uint8)
    a = tp.verify_expressivity(toy_mlp(), x.numpy())
    b = tp.verify_expressivity(toy_mlp(), x.float() / 255)
    assert a.sigma_min == pytest.approx(b.sigma_min, rel=1e-9)
    with pytest.raises(ValueError, match="method: expected one of"):
        tp.verify_expressivity(toy_mlp(), x, method="qr")
    with pytest.raises(ValueError, match="w: expected one of"):
        tp.verify_expressivity(toy_mlp(), x, w="best")
    with pytest.raises(ValueError, match="x: the data set is empty"):
        tp.verify_expressivity(toy_mlp(), x[:0])


def test_nan_weights_are_undecided():
    model = toy_mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    verdict = tp.verify_expressivity(model, toy_data(10)[0], last_layer="4")
    assert verdict.status == "undecided" and "NaN" in verdict.reason


def test_save_and_load(tmp_path):
    verdict = tp.verify_expressivity(toy_mlp(), toy_data(20)[0])
    verdict.save(tmp_path / "v.json")
    assert tp.Verdict.load(tmp_path / "v.json") == verdict
    (tmp_path / "other.json").write_text('{"status": "fine"}')
    with pytest.raises(ValueError, match="is not a verdict file"):
        tp.Verdict.load(tmp_path / "other.json")


def test_inputs_that_are_not_finite_are_refused_not_called_identical():
    x, _ = toy_data(20)
    x[4] = x[9] = float("nan")
    for check in (tp.verify_expressivity, tp.check_assumptions):
        with pytest.raises(ValueError, match="x: NaN or infinity in the input of sample 4"):
            check(toy_mlp(), x)


def test_words_say_what_is_known():
    x, _ = toy_data(20)
    text = str(tp.verify_expressivity(toy_mlp(), x, method="svd"))
    assert "full rank at these weights (counted numerically, not proved)" in text
    text = str(tp.verify_expressivity(toy_mlp(width=18), x))
    assert "deficient for all weights (proved)" in text and "some weights" not in text


def test_a_last_layer_without_bias_cannot_use_the_column_of_ones():
    x, _ = toy_data(20)
    model = toy_mlp(width=19)
    assert tp.verify_expressivity(model, x).rank == 20
    model[4] = nn.Linear(19, 3, bias=False)
    verdict = tp.verify_expressivity(model, x)
    assert verdict.status == "deficient" and "n = 20 > m_H = 19" in verdict.reason
    model = toy_mlp(width=40)
    model[4] = nn.Linear(40, 3, bias=False)
    verdict = tp.verify_expressivity(model, x)
    sigma = np.linalg.svd(features(model, x)[:, :-1], compute_uv=False)
    assert verdict.rank == 20 and verdict.sigma_min == pytest.approx(sigma[-1], rel=1e-6)
    assert "rank h_X = n" in str(verdict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    x = toy_data(12)[0].to(dtype)
    assert tp.verify_expressivity(toy_mlp(), x).status == "proved"
    x[5] = x[1]
    assert tp.verify_expressivity(toy_mlp(), x).repeated == [[1, 5]]
    assert tp.check_assumptions(toy_mlp(), x).hold


def test_integer_tokens():
    x = torch.arange(12).reshape(12, 1)
    model = nn.Sequential(nn.Embedding(12, 5), nn.Flatten(), *toy_mlp())
    verdict = tp.verify_expressivity(model, x)
    assert verdict.status == "proved" and verdict.recheck(model, x, say=lambda _: None)
    assert tp.check_assumptions(model, x).verdict.status == "proved"


def test_batch_statistics_are_never_decided():
    x, _ = toy_data(20)
    x[3] = x[8]
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, track_running_stats=False), *toy_mlp())
    assert tp.verify_expressivity(model, x).status == "undecided"


def test_too_little_memory_is_undecided(monkeypatch):
    monkeypatch.setattr("twophase_ext.expressivity.methods.available_memory", lambda _: 1000)
    verdict = tp.verify_expressivity(toy_mlp(), toy_data(20)[0])
    assert verdict.claim == "exists" and verdict.rank is None and "GiB" in verdict.reason


def test_a_model_without_parameters():
    for check in (tp.verify_expressivity, tp.check_assumptions):
        with pytest.raises(
            ValueError, match="model: expected floating-point parameters, found none"
        ):
            check(nn.ReLU(), toy_data(9)[0])


class Residual(nn.Module):
    """An identity beside a branch, which separation may damp."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.out = nn.Linear(6, 12), nn.Linear(12, 60), nn.Linear(60, 3)
        self.branch = nn.Sequential(nn.Linear(12, 12), tp.nn.Softplus(10.0), nn.Linear(12, 12))
        self.act = tp.nn.Softplus(10.0)

    def hidden(self, x):
        z = self.stem(x)
        return self.act(self.wide(z + self.branch(z)))

    def forward(self, x):
        return self.out(self.hidden(x))


@pytest.mark.parametrize("stored", [False, True])
def test_what_auto_says_of_these_weights_is_of_these_weights(tmp_path, monkeypatch, stored):
    """Separation may damp residual branches to find *some* weights; what follows must not."""
    monkeypatch.setattr(backbone, "DAMPINGS", ((0.0, 0.0),))
    monkeypatch.setattr(backbone, "KEPT", 0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, x = Residual(), torch.rand(20, 6)
    separation = tp.verify_expressivity(model, x, method="separation")
    assert separation.status == "proved" and separation.claim == "exists"
    assert any("branch" in name for name in separation.witness)
    with torch.no_grad():
        h = copy.deepcopy(model).double().hidden(x.double()).numpy()
    sigma = np.linalg.svd(np.hstack([h, np.ones((20, 1))]), compute_uv=False)
    for _ in range(2):  # the second time from the folder's features
        verdict = tp.verify_expressivity(model, x, folder=tmp_path if stored else None)
        assert (verdict.status, verdict.claim, verdict.rank) == ("proved", "at w", 20)
        assert verdict.witness is None
        assert verdict.logabsdet == pytest.approx(2 * np.log(sigma).sum(), rel=1e-9)
        assert 0.5 * sigma[-1] < verdict.sigma_min_lower <= sigma[-1]
        printed = re.search(r"smallest singular value >= (\S+)", str(verdict))
        assert printed and float(printed[1]) <= verdict.sigma_min_lower
    if stored:
        assert len(list(tmp_path.glob("features-*.pt"))) == 2  # damped, and as they are


def test_auto_counts_at_these_weights_where_separation_alone_proves():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = PreActResNet18(1, 3, width=4, wide=60).eval()
        x = torch.rand(40, 1, 8, 8)
    verdict = tp.verify_expressivity(model, x)
    assert (verdict.status, verdict.claim, verdict.method) == ("proved", "exists", "separation")
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        z = exact.blocks(exact.conv1(x.double())).mean((2, 3))
        h = exact.head[1](exact.head[0](z)).numpy()
    sigma = np.linalg.svd(np.hstack([h, np.ones((40, 1))]), compute_uv=False)
    assert verdict.logabsdet == pytest.approx(2 * np.log(sigma).sum(), rel=1e-6)
