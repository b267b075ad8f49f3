"""A global minimum by construction: the model itself, with the weights found, is within the gap."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.datasets import load_iris
from torch import nn

import twophase_ext as tp
from helpers import bits, same_bits
from twophase_ext.theory import construction
from twophase_ext.theory.construction import triangular_order
from twophase_ext.theory.floor import loss_floor

N, K = 60, 3
G = torch.Generator().manual_seed(0)
X = torch.randn(N, 5, generator=G)
X[40:] = X[torch.arange(20) // 2]  # 40 distinct inputs; ten groups of three
LABELS = torch.randint(K, (N,), generator=G)
REALS = torch.randn(N, K, generator=G)
BITS = torch.randint(2, (N, K), generator=G).float()
SOFT = REALS.softmax(1)
W = torch.tensor([2.0, 0.5, 3.0])

CASES = {
    "labels": ("cross_entropy", LABELS),
    "weights, smoothed": (nn.CrossEntropyLoss(W, label_smoothing=0.1), LABELS),
    "ignored": (nn.CrossEntropyLoss(), torch.where(torch.arange(N) % 5 == 0, -100, LABELS)),
    "probabilities": ("cross_entropy", SOFT),
    "squared error": ("squared_error", REALS),
    "mse": (nn.MSELoss(), REALS),
    "bce": (nn.BCEWithLogitsLoss(W, pos_weight=torch.tensor(4.0)), BITS),
    "soft margin": ("soft_margin", 2 * BITS - 1),
    "huber": (nn.HuberLoss(delta=0.3), REALS),
    "smooth l1": ("smooth_l1", REALS),
}


def network(d=5, outputs=K, n=40):
    torch.manual_seed(0)
    return tp.nn.widen(nn.Sequential(nn.Linear(d, 16), nn.Tanh(), nn.Linear(16, outputs)), n=n)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_the_model_itself_is_within_the_gap(case, gap):
    loss, y = CASES[case]
    model = network()
    before = bits(model)
    found = tp.global_minimum(model, X, y, loss=loss, gap=gap)
    assert same_bits(before, bits(model))
    assert found.reached and found.verdict.status == "proved" and found.verdict.n == 40
    floor = loss_floor(X, y, loss, outputs=K)
    assert found.floor.lower == floor.lower and floor.disagreeing > 0
    model.load_state_dict(found.state)
    model.eval()
    if isinstance(loss, nn.Module):
        with torch.no_grad():
            value = float(loss(model(X), y))
        assert value == pytest.approx(found.loss, rel=1e-5)
        assert floor.lower - 1e-6 <= value <= floor.upper + gap
    assert floor.lower * (1 - 1e-6) <= found.loss
    assert found.gap >= found.loss - floor.lower


def test_iris_with_its_repeated_flower():
    x, y = load_iris(return_X_y=True)
    model = network(d=4, n=149)
    found = tp.global_minimum(model, x.astype("float32"), y)
    assert (found.floor.n, found.floor.distinct, found.floor.lower) == (150, 149, 0.0)
    assert found.reached and found.loss < 1e-4
    text = str(found)
    assert "no weights of any network go below 0" in text and "generalise badly" in text
    model.load_state_dict(found.state)
    with torch.no_grad():
        assert (model(torch.tensor(x).float()).argmax(1) == torch.tensor(y)).all()


def test_images_in_bytes_float64_and_a_last_layer_without_bias():
    x = torch.randint(256, (30, 1, 4, 4), generator=G, dtype=torch.uint8)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 40), tp.nn.Softplus(), nn.Linear(40, 1, bias=False)
    ).double()
    y = torch.randn(30, generator=G)
    found = tp.global_minimum(model, x, y, loss="mse", gap=1e-12)
    assert found.reached and found.state["3.weight"].dtype == torch.float64


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.wide, self.last = nn.Linear(5, 8), nn.Linear(10, 66), nn.Linear(66, K)
        self.act = tp.nn.Softplus()

    def forward(self, a, b):
        z = torch.cat([torch.tanh(self.first(a)), b], 1)
        return self.last(self.act(self.wide(z)))


def test_several_inputs():
    torch.manual_seed(0)
    model, b = Two(), torch.randn(N, 2, generator=G)
    found = tp.global_minimum(model, {"a": X, "b": b}, LABELS)
    assert found.reached and found.floor.distinct == N
    model.load_state_dict(found.state)
    with torch.no_grad():
        value = float(nn.functional.cross_entropy(model(a=X, b=b), LABELS))
    assert value == pytest.approx(found.loss, abs=1e-6)


def test_a_coarse_type_says_what_it_reaches():
    found = tp.global_minimum(network(), X, 1e4 * REALS, loss="mse", gap=1e-12)
    assert not found.reached and found.gap < 1e-3 * found.floor.lower
    assert "more than the 1e-12 asked for" in str(found)


@pytest.mark.parametrize("broken", ["a wrong T", "nothing"])
def test_one_pass_of_the_model_and_more_where_it_does_not_do(monkeypatch, broken):
    """T of the proof first; T as the model computes it where that misses the gap."""
    made, own = construction._proved_triangle, construction._own_triangle
    asked = []

    def proved(*arguments):
        lower, order, units = made(*arguments)
        return (lower * 3 if broken == "a wrong T" else lower), order, units

    monkeypatch.setattr(construction, "_proved_triangle", proved)
    monkeypatch.setattr(construction, "_own_triangle", lambda *a: asked.append(1) or own(*a))
    found = tp.global_minimum(network(), X, LABELS)
    assert found.reached and len(asked) == (broken == "a wrong T")


def test_a_fallback_that_fails_loses_nothing(monkeypatch):
    def not_triangular(*_):
        raise ValueError("not triangular")

    monkeypatch.setattr(construction, "_own_triangle", not_triangular)
    found = tp.global_minimum(network(), X, 1e4 * REALS, loss="mse", gap=1e-12)
    assert not found.reached and found.gap < 1e-3 * found.floor.lower


ERRORS = {
    "declared": (
        {"loss": tp.ConvexLoss(lambda q, y: (q - y).square().mean(), 2.0)},
        "loss: custom: expected a loss whose minimisers are known",
    ),
    "gap": ({"gap": 0}, "gap: expected a number > 0, got 0"),
    "gap infinite": ({"gap": math.inf}, "gap: expected a number > 0"),
    "targets": ({"y": LABELS[:4]}, r"y: expected 60 targets, got \[4\]"),
    "narrow": ({"model": network(n=20)}, r"at least 40 units .* tp.nn.widen\(model, 40\)"),
    "no witness": (
        {"model": nn.Sequential(nn.Linear(5, 50), nn.Tanh(), nn.Linear(50, K))},
        "no weights were proved",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    changed, message = ERRORS[case]
    arguments = {"model": network(), "x": X, "y": LABELS, **changed}
    with pytest.raises(ValueError, match=message):
        tp.global_minimum(
            arguments.pop("model"), arguments.pop("x"), arguments.pop("y"), **arguments
        )


def test_the_order_of_a_scattered_triangle_is_found():
    rng = np.random.default_rng(0)
    lower = np.tril(rng.random((50, 50)) < 0.1, -1) * rng.random((50, 50)) + np.eye(50)
    p, q = rng.permutation(50), rng.permutation(50)
    rows, columns = triangular_order(csr_matrix(lower[p][:, q]))
    assert sorted(rows) == sorted(columns) == list(range(50))
    found = lower[p][:, q][rows][:, columns]
    assert (np.triu(found, 1) == 0).all() and (found.diagonal() == 1).all()
    with pytest.raises(ValueError, match="not triangular"):
        triangular_order(csr_matrix(np.ones((3, 3))))
