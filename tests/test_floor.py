"""L_floor: exact rationals, scikit-learn, torch's own losses minimised over tables of outputs."""

import math
from fractions import Fraction
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, mutual_info_score
from torch import nn

import twophase_ext as tp
from helpers import toy_mlp
from twophase_ext.model.groups import groups_of
from twophase_ext.model.losses import prepare_targets, resolve_loss
from twophase_ext.theory.floor import floor_of

N, K = 40, 3
W = torch.tensor([2.0, 0.5, 3.0])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


X = whole(12, N, 1, seed=7).double()  # 40 samples, at most 12 distinct inputs
GROUPS = groups_of(X)
LABELS = whole(K, N, seed=8)
SOFT = random(N, K, seed=9).softmax(1)
BITS = whole(2, N, K, seed=10).double()
REALS = 5 * random(N, K, seed=11)


def ignoring(y):
    return torch.where(torch.arange(N) % 4 == 0, -100, y)


CASES = {
    "labels": (nn.CrossEntropyLoss(), LABELS),
    "weights": (nn.CrossEntropyLoss(W), LABELS),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), LABELS),
    "weights, smoothed, ignored": (nn.CrossEntropyLoss(W, label_smoothing=0.2), ignoring(LABELS)),
    "ignored": (nn.CrossEntropyLoss(), ignoring(LABELS)),
    "probabilities": (nn.CrossEntropyLoss(W, label_smoothing=0.1), SOFT),
    "mse": (nn.MSELoss(), REALS),
    "squared error": ("squared_error", REALS),
    "bce": (nn.BCEWithLogitsLoss(W, pos_weight=torch.tensor([3.0, 0.1, 1.0])), BITS),
    "soft bce": (nn.BCEWithLogitsLoss(), SOFT),
    "huber": (nn.HuberLoss(delta=0.7), REALS),
    "smooth l1": (nn.SmoothL1Loss(beta=3.0), REALS),
    "soft margin": (nn.SoftMarginLoss(), 2 * BITS - 1),
    "multi-label": (nn.MultiLabelSoftMarginLoss(W), BITS),
}


def least_over_tables(loss, y):
    """The least loss of a table of outputs, one row a group, by Newton's method on torch's loss."""

    def objective(q):
        return loss(q.reshape(-1, K)[GROUPS], y)

    q = torch.zeros((int(GROUPS.max()) + 1) * K, dtype=torch.float64)
    for _ in range(40):
        gradient = torch.autograd.functional.jacobian(objective, q)
        if float(gradient.norm()) < 1e-13:
            break
        hessian = torch.autograd.functional.hessian(objective, q, vectorize=True)
        step = torch.linalg.solve(hessian + 1e-9 * torch.eye(len(q)), gradient)
        step *= min(1.0, 3 / float(step.abs().max().clamp_min(1e-300)))
        while float(objective(q - step)) > float(objective(q)) and float(step.abs().max()) > 1e-12:
            step = step / 2
        q = q - step
    return float(objective(q))


@pytest.mark.parametrize("case", CASES)
def test_no_table_of_outputs_is_below_and_the_best_is_at_the_floor(case):
    given, y = CASES[case]
    found = tp.loss_floor(X, y, given, outputs=K)
    assert 0 < found.lower <= found.upper <= found.lower * (1 + 1e-12)
    assert (found.n, found.distinct, found.repeated) == (N, 12, 11)
    assert found.disagreeing > 0 and found.reason == ""
    loss = given if isinstance(given, str) else given.double()
    loss = resolve_loss(loss)
    least = least_over_tables(loss, prepare_targets(loss, y, K, "y"))
    if not isinstance(given, str):
        given.float()
    assert found.lower * (1 - 1e-14) <= least <= found.upper + 1e-6
    if found.attained:
        assert least == pytest.approx(found.upper, rel=1e-10)


def test_sample_weights_stand_in_both_sums():
    times = whole(4, N, seed=3)
    times[GROUPS == 2] = 0
    index = torch.arange(N).repeat_interleave(times)
    for case, (given, y) in CASES.items():
        repeated = tp.loss_floor(X[index], y[index], given, outputs=K)
        found = tp.loss_floor(X, y, given, weights=times / 4, outputs=K)
        assert found.upper == pytest.approx(repeated.upper, rel=1e-12), case
        assert found.disagreeing == repeated.disagreeing


@pytest.mark.parametrize("shift", [0.0, 1e6, -1e12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_squared_error_encloses_the_rational_floor(shift, dtype):
    y = (random(300, 2, seed=1) + shift).to(dtype)
    x = whole(60, 300, 1, seed=2)
    groups = groups_of(x)
    exact = Fraction(0)
    for g in groups.unique():
        for column in y[groups == g].double().T.tolist():
            values = [Fraction(v) for v in column]
            mean = sum(values) / len(values)
            exact += sum((v - mean) ** 2 for v in values)
    exact /= 300
    found = tp.loss_floor(x, y, "squared_error")
    assert Fraction(found.lower) <= exact <= Fraction(found.upper)
    assert found.upper - found.lower <= 1e-12 * float(exact) + 1e-28
    half = tp.loss_floor(x, y, "mse")
    assert Fraction(half.lower) <= exact / 2 <= Fraction(half.upper)


@pytest.mark.parametrize("delta", [0.25, 1.0, 100.0])
def test_huber_encloses_the_rational_floor(delta):
    y, x = random(80, 2, seed=4) * 3, whole(20, 80, 1, seed=5)
    y[:30] = y[:30].round()  # ties, and flat pieces of the derivative
    groups, width = groups_of(x), Fraction(delta)

    def value(q, values):
        parts = [abs(q - v) for v in values]
        return sum(a * a / 2 if a <= width else width * (a - width / 2) for a in parts)

    def slope(q, values):
        return sum(max(-width, min(width, q - v)) for v in values)

    exact = Fraction(0)
    for g in groups.unique():
        for column in y[groups == g].T.tolist():
            values = [Fraction(v) for v in column]
            breaks = sorted({v + s * width for v in values for s in (-1, 1)})
            best = min(value(b, values) for b in breaks)
            for a, b in pairwise(breaks):  # a root inside a piece
                low, high = slope(a, values), slope(b, values)
                if low < 0 < high:
                    best = min(best, value(a + (b - a) * -low / (high - low), values))
            exact += best
    exact /= 80 * 2
    found = tp.loss_floor(x, y, nn.HuberLoss(delta=delta))
    assert Fraction(found.lower) <= exact <= Fraction(found.upper)
    assert found.upper - found.lower <= 1e-12 * float(exact)
    smooth = tp.loss_floor(x, y, nn.SmoothL1Loss(beta=delta))
    assert Fraction(smooth.lower) <= exact / width <= Fraction(smooth.upper)


@pytest.mark.parametrize("seed", range(5))
def test_cross_entropy_encloses_forty_digits(seed):
    x, y = whole(30, 400, 1, seed=seed), whole(4, 400, seed=seed + 100)
    counts = {}
    for g, label in zip(groups_of(x).tolist(), y.tolist(), strict=True):
        counts.setdefault(g, {}).setdefault(label, 0)
        counts[g][label] += 1
    found = tp.loss_floor(x, y)
    with mpmath.workdps(40):
        exact = mpmath.mpf(0)
        for of in counts.values():
            total = sum(of.values())
            exact += sum(c * mpmath.log(mpmath.mpf(total) / c) for c in of.values())
        exact /= 400
        assert mpmath.mpf(found.lower) <= exact <= mpmath.mpf(found.upper)
        assert mpmath.mpf(found.upper) - mpmath.mpf(found.lower) <= mpmath.mpf(1e-12) * exact


@pytest.mark.parametrize("seed", range(4))
def test_large_groups_whose_sums_are_rounded_much(seed):
    n = 6000
    x, c = torch.zeros(n, 1), torch.rand(n, generator=torch.Generator().manual_seed(seed)).double()
    y = random(n, 1, seed=seed) * 0.1 + 3
    weights, values = ([Fraction(v) for v in part.flatten().tolist()] for part in (c, y))
    whole = sum(weights)
    first = sum(w * v for w, v in zip(weights, values, strict=True))
    exact = sum(w * v * v for w, v in zip(weights, values, strict=True)) - first**2 / whole
    for loss, share in (("mse", 1), (nn.HuberLoss(delta=1e3), 2)):
        found = tp.loss_floor(x, y, loss, weights=c)
        assert Fraction(found.lower) <= exact / (share * whole) <= Fraction(found.upper)
        assert found.upper - found.lower < 1e-10 * found.upper
    p = (c * 1e-3)[:, None]
    found = tp.loss_floor(x, torch.cat([p, 1 - p], 1), "cross_entropy")
    rows = torch.cat([p, 1 - p], 1)
    sums = [sum(Fraction(v) for v in column.tolist()) for column in rows.T]
    with mpmath.workdps(50):
        a, b = (mpmath.mpf(s.numerator) / s.denominator for s in sums)
        least = (a * mpmath.log((a + b) / a) + b * mpmath.log((a + b) / b)) / n
        assert mpmath.mpf(found.lower) <= least <= mpmath.mpf(found.upper)
    assert found.upper - found.lower < 1e-8 * found.upper


def test_cross_entropy_is_what_scikit_learn_says():
    groups, y = GROUPS.numpy(), LABELS.numpy()
    shares = np.stack([np.bincount(y[groups == g], minlength=K) for g in range(12)]).astype(float)
    shares /= shares.sum(1, keepdims=True)
    found = tp.loss_floor(X, LABELS)
    assert found.upper == pytest.approx(log_loss(y, shares[groups], labels=range(K)), rel=1e-12)
    entropy = -sum(p * math.log(p) for p in np.bincount(y) / N)
    assert found.upper == pytest.approx(entropy - mutual_info_score(groups, y), rel=1e-12)


def test_where_targets_agree_the_floor_is_0_exactly():
    index = torch.arange(30) % 20
    x, targets = random(20, 4)[index], 0.1 * random(20, 3, seed=1)[index]
    for name in ("mse", "squared_error", "huber", "smooth_l1"):
        found = tp.loss_floor(x, targets, name)
        assert (found.lower, found.upper, found.disagreeing) == (0.0, 0.0, 0)
        assert found.attained and found.repeated == 10 and found.distinct == 20
    found = tp.loss_floor(x, index % 3, nn.CrossEntropyLoss(W))
    assert (found.lower, found.upper, found.attained) == (0.0, 0.0, False)
    found = tp.loss_floor(x, (targets > 0).double(), "bce")
    assert (found.lower, found.upper, found.attained) == (0.0, 0.0, False)
    assert "10 groups of equal inputs, 0 with targets that disagree" in str(found)


def test_ignored_samples_neither_count_nor_disagree():
    x, y = torch.zeros(5, 2), torch.tensor([1, 1, -100, 1, -100])
    found = tp.loss_floor(x, y)
    assert (found.upper, found.disagreeing, found.repeated) == (0.0, 0, 1)
    y[4] = 0
    found = tp.loss_floor(x, y)
    assert found.disagreeing == 1
    assert found.upper == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4, rel=1e-12)


def test_no_network_is_below():
    """Random networks, and one trained: repeated inputs hold every loss up."""
    x = random(12, 5)[GROUPS].float()
    for seed in range(3):
        model = toy_mlp(seed=seed)
        for given, y in CASES.values():
            loss = resolve_loss(given)
            targets = prepare_targets(loss, y, K, "y").to(torch.float64)
            targets = targets if y.is_floating_point() else targets.long()
            value = float(loss.over(targets, K)(model(x).detach().double(), targets))
            assert value >= tp.loss_floor(x, y, given, outputs=K).lower


DECLARED = {
    "mse": (lambda q, y: (q - y).square().mean(), 2.0, REALS, "mse"),
    "bce": (
        lambda q, y: nn.functional.binary_cross_entropy_with_logits(q, y),
        0.25,
        0.1 + 0.8 * SOFT,
        "bce",
    ),
    "one output": (lambda q, y: (q - y).square().mean(), 2.0, REALS[:, :1], "squared_error"),
}


@pytest.mark.parametrize("case", DECLARED)
def test_a_declared_loss_has_a_certified_floor(case):
    function, smoothness, y, name = DECLARED[case]
    x, y = X[:9], y[:9]
    found = tp.loss_floor(x, y, tp.ConvexLoss(function, smoothness))
    known = tp.loss_floor(x, y, name)
    assert found.lower <= known.upper and known.lower <= found.upper  # the enclosures meet
    assert found.reason == "" and found.upper - found.lower <= 1e-6 * known.upper
    weights = torch.linspace(0, 2, 9)
    found = tp.loss_floor(x, y, tp.ConvexLoss(function, smoothness), weights=weights)
    known = tp.loss_floor(x, y, name, weights=weights)
    assert found.lower <= known.upper and known.lower <= found.upper
    assert found.upper - found.lower <= 1e-6 * known.upper


def test_a_declared_loss_whose_infimum_is_not_attained_is_undecided():
    labels = 2.0 * BITS[:, :1] - 1
    x = torch.arange(N)[:, None]  # all distinct: each infimum is 0, at infinity

    def logistic(q, y):
        return nn.functional.softplus(-q * y).mean()

    found = tp.loss_floor(x, labels, tp.ConvexLoss(logistic, 0.25))
    assert found.lower == -math.inf and 0 <= found.upper < 1e-9
    assert "not attained" in str(found) and found.attained is None
    found = tp.loss_floor(x, labels, tp.ConvexLoss(logistic, 0.25, least=0.0))
    assert found.lower == 0.0 and "not attained" in found.reason
    wide = tp.ConvexLoss(lambda q, y: nn.functional.huber_loss(q, y), 1.0, least=0.0)
    x, y = X[:12], REALS[:12, :1]
    found, known = tp.loss_floor(x, y, wide), tp.loss_floor(x, y, "huber")
    assert 0 < found.lower < known.lower and found.reason  # groups whose minimisers fill a piece
    assert known.upper <= found.upper * (1 + 1e-14) <= 1.1 * known.upper
    flat = tp.ConvexLoss(lambda q, y: nn.functional.cross_entropy(q, y), 0.5, least=0.0)
    found = tp.loss_floor(X[:9], LABELS[:9], flat, outputs=K)  # in its outputs' common shift
    known = tp.loss_floor(X[:9], LABELS[:9])
    assert found.lower == 0.0 and found.upper >= known.lower * (1 - 1e-12)


def test_too_many_declared_solves_are_not_begun():
    loss = tp.ConvexLoss(lambda q, y: (q - y).square().mean(), 2.0, least=0.0)
    known = tp.loss_floor(X, REALS, "mse")
    for solves, reason in ((3, "more than 3 kinds"), (0, "no minimisation")):
        found = floor_of(loss, GROUPS, REALS, K, solves=solves)
        assert -1e-300 <= found.lower < known.lower
        assert found.upper == math.inf and reason in found.reason


ERRORS = {
    "length": ((X, LABELS[:5]), {}, ValueError, r"y: expected 40 targets, got \[5\]"),
    "empty": ((X[:0], LABELS[:0]), {}, ValueError, "x: the data set is empty"),
    "not finite": ((X / 0, LABELS), {}, ValueError, "x: NaN or infinity"),
    "target": ((X, REALS / 0), {"loss": "mse"}, ValueError, "y: NaN or infinity in the target"),
    "weights": ((X, LABELS), {"weights": -torch.ones(N)}, ValueError, "weights: expected finite"),
    "no weight": ((X, LABELS), {"weights": torch.zeros(N)}, ValueError, "weights: expected finite"),
    "weights' shape": ((X, LABELS), {"weights": [1.0]}, ValueError, r"weights: .* \[40\]"),
    "outputs": (
        (X, LABELS),
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
        ValueError,
        "outputs: expected the number of the network's outputs",
    ),
    "outputs 0": ((X, LABELS), {"outputs": 0}, ValueError, "outputs: expected at least 1"),
    "loss": ((X, LABELS), {"loss": nn.L1Loss()}, ValueError, "loss: nn.L1Loss is refused"),
    "label": ((X, LABELS - 1), {}, ValueError, "y: expected labels in 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    arguments, settings, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        tp.loss_floor(*arguments, **settings)


def test_chunks_of_groups_give_the_same(monkeypatch):
    floor = __import__("sys").modules["twophase_ext.theory.floor"]
    before = {name: tp.loss_floor(X, y, given, outputs=K) for name, (given, y) in CASES.items()}
    monkeypatch.setattr(floor, "ENTRIES", 30)
    for name, (given, y) in CASES.items():
        found = tp.loss_floor(X, y, given, outputs=K)
        assert found.lower == pytest.approx(before[name].lower, rel=1e-13)
        assert found.disagreeing == before[name].disagreeing
