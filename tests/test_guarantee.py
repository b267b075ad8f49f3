"""tp.guarantee: the bound lies above the measured loss, near it, and rests on a true L_H."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

import twophase_ext as tp
from twophase_ext.linalg.bounds import SLACK
from twophase_ext.model.losses import CROSS_ENTROPY, SQUARED_ERROR, resolve_loss, squared_error
from twophase_ext.theory import comparators as family
from twophase_ext.theory.comparators import comparators, last_layer_objective
from twophase_ext.theory.guarantee import Guarantee, guarantee, smoothness
from twophase_ext.training.phases.metric import trace_form

STEPS = [0, 1, 2, 3, 5, 8, 15, 30, 60, 120, 250, 500]


class Problem:
    """Softplus features of random inputs, targets, and a last layer to start from."""

    def __init__(self, seed, loss, n=None, ones=True, l2=0.0):
        g = torch.Generator().manual_seed(seed)
        self.n = n or int(torch.randint(20, 401, (), generator=g))
        m = int(self.n * (0.9 + 0.2 * torch.rand((), generator=g)))
        x = torch.randn(self.n, 6, generator=g).double()
        hidden = torch.randn(6, m, generator=g).double()
        self.h = tp.softplus(x @ hidden / 2 + torch.randn(m, generator=g).double(), 10.0)
        self.h /= self.h.square().mean().sqrt()
        labels = (x[:, :3] + 0.5 * torch.randn(self.n, 3, generator=g).double()).argmax(1)
        self.loss, self.ones, self.l2 = resolve_loss(loss), ones, l2
        self.y = labels if loss == "cross_entropy" else F.one_hot(labels, 3).double()
        self.weight = 0.1 * torch.randn(3, m, generator=g).double() / math.sqrt(m)
        self.bias = torch.zeros(3).double()

    def blocks(self):
        return zip(self.h.split(64), self.y.split(64), strict=True)

    def objective(self, weight, bias):
        squares = weight.square().sum() + (bias.square().sum() if self.ones else 0)
        return self.loss(F.linear(self.h, weight, bias), self.y) + self.l2 / 2 * squares

    def descend(self, step, steps):
        """Plain gradient descent: the objective after 0, 1, ... steps, and the last weights."""
        weight, bias = self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()
        losses = []
        for _ in range(steps + 1):
            value = self.objective(weight, bias)
            losses.append(float(value.detach()))
            gradients = torch.autograd.grad(value, (weight, bias))
            with torch.no_grad():
                weight -= step * gradients[0]
                if self.ones:
                    bias -= step * gradients[1]
        return losses, weight.detach(), bias.detach()

    def matrix(self):
        return torch.cat([self.h, torch.ones(self.n, 1).double()], 1) if self.ones else self.h

    def bound(self, **settings):
        return guarantee(
            self.blocks,
            self.weight,
            self.bias,
            loss=self.loss,
            ones=self.ones,
            **{"l2": self.l2, **settings},
        )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_the_bound_is_above_the_loss_and_near_it(loss, seed):
    problem = Problem(seed, loss, ones=seed % 3 > 0, l2=0.05 * (seed % 4 == 3))
    form = ("tight", "paper")[seed % 2]
    largest = smoothness(problem.blocks, loss=loss, form=form, ones=problem.ones, l2=problem.l2)
    losses, weight, bias = problem.descend(1 / largest, STEPS[-1])
    known = problem.bound(steps=STEPS, losses=[losses[t] for t in STEPS], smoothness=form)
    assert known.constants["L_H"] == largest and known.rigorous and not known.in_expectation
    bounds = [point["bound"] for point in known.curve]
    for t, bound in zip(STEPS, bounds, strict=True):
        assert losses[t] <= bound < math.inf
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(bounds[1:]))
    assert known.closest["bound"] < 10 * known.closest["loss"]
    assert bounds[0] == pytest.approx(losses[0], rel=1e-9)
    # the last weights as one more comparator never make it worse
    more = problem.bound(steps=STEPS, smoothness=largest, candidates=[("last", weight, bias)])
    assert all(
        b["bound"] <= a["bound"] * (1 + 1e-9) for a, b in zip(known.curve, more.curve, strict=True)
    )


def test_a_smaller_constant_would_not_hold():
    """With steps of 1 / L_H for half of the true L_H the loss rises: L_H is what it has to be."""
    problem = Problem(1, "squared_error")
    largest = smoothness(problem.blocks, loss="squared_error")
    losses, _, _ = problem.descend(2.05 / largest, 200)
    assert not all(b <= a for a, b in pairwise(losses))
    good, _, _ = problem.descend(1 / largest, 200)
    assert all(b <= a * (1 + 1e-13) for a, b in pairwise(good))


@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("loss", [CROSS_ENTROPY, SQUARED_ERROR])
def test_smoothness_is_an_upper_bound_and_close(loss, ones):
    for seed in range(4):
        problem = Problem(seed, loss.name, ones=ones)
        m = problem.matrix()
        eigenvalues = torch.linalg.eigvalsh(m.T @ m)
        true = loss.smoothness / problem.n * float(eigenvalues[-1])
        tight = smoothness(problem.blocks, loss=loss, ones=ones)
        assert true * (1 - 1e-13) <= tight <= 1.011 * true
        paper = smoothness(problem.blocks, loss=loss, form="paper", ones=ones, l2=0.5)
        own = loss.smoothness / problem.n * float(m.square().sum())
        assert own + 0.5 <= paper <= (own + 0.5) * (1 + 1e-9)
        assert tight <= paper
        norms = m.square().sum(1).sqrt()
        assert own <= trace_form(norms, problem.y, loss) <= own * SLACK**2
    with pytest.raises(ValueError, match="finite"):
        trace_form(norms * float("inf"), problem.y, loss)


def test_smoothness_of_features_of_any_sign():
    h = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).double()
    blocks = lambda: [(h.float(), torch.zeros(40))]  # noqa: E731
    true = 0.5 / 40 * float(torch.linalg.matrix_norm(h.float().double(), 2) ** 2)
    found = smoothness(blocks, loss="cross_entropy", ones=False)
    assert true <= found <= smoothness(blocks, loss="cross_entropy", form="paper", ones=False)
    zero = lambda: [(torch.zeros(5, 3), torch.zeros(5))]  # noqa: E731
    assert smoothness(zero, loss="squared_error", ones=False) == 0


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_comparators_are_what_they_say(loss, monkeypatch):
    problem, seen = Problem(3, loss, n=90, l2=0.01), []
    own = last_layer_objective

    def remembered(blocks, weight, bias, *arguments):
        seen.append((weight, bias))
        return own(blocks, weight, bias, *arguments)

    monkeypatch.setattr(family, "last_layer_objective", remembered)
    found = comparators(
        problem.blocks,
        problem.weight,
        problem.bias,
        loss=problem.loss,
        l2=problem.l2,
        candidates=[("other", problem.weight + 1, problem.bias - 1)],
        distances=[10.0**k for k in range(-6, 3)],
    )
    assert len(found) == len(seen) > 8
    for comparator, (weight, bias) in zip(found, seen, strict=True):
        true = float(problem.objective(weight, bias))
        moved = (weight - problem.weight).square().sum() + (bias - problem.bias).square().sum()
        assert true <= comparator.loss <= true * (1 + 1e-8) + 1e-12
        assert float(moved) <= comparator.distance2 <= float(moved) * (1 + 1e-9)
    # far comparators all but reach the infimum, near ones all but stay
    assert min(c.loss for c in found) < 0.5 * max(c.loss for c in found)


def test_the_ridge_parameter_0_is_the_theorem_s_r():
    """Squared error at full rank: R is the displacement of least norm, M^+ (Y - M w^tau)."""
    drawn = (Problem(seed, "squared_error", n=40) for seed in range(20))
    problem = next(p for p in drawn if p.matrix().shape[1] > 42)
    m = problem.matrix()
    assert torch.linalg.matrix_rank(m) == 40
    w = torch.cat([problem.weight, problem.bias[:, None]], 1)
    r2 = float((torch.linalg.pinv(m) @ (problem.y - m @ w.T)).square().sum())
    found = comparators(
        problem.blocks, problem.weight, problem.bias, loss=problem.loss, distances=[1e-12]
    )
    assert found[-1].distance2 == pytest.approx(r2, rel=1e-2) and found[-1].loss < 1e-8


def test_the_bound_is_the_theorem_s_formula(monkeypatch):
    """By hand, over comparators that are given."""
    module = __import__("sys").modules["twophase_ext.theory.guarantee"]
    known = [module.Comparator("near", 0.5, 4.0), module.Comparator("far", 0.1, 900.0)]
    monkeypatch.setattr(module, "comparators", lambda *a, **k: known)
    problem = Problem(5, "cross_entropy", n=40)
    steps = [1, 7, 5000]
    curve = problem.bound(steps=steps, smoothness=3.0).curve
    for t, point in zip(steps, curve, strict=True):
        by_hand = min(0.5 + 3.0 * 4.0 / (2 * t), 0.1 + 3.0 * 900.0 / (2 * t))
        assert by_hand <= point["bound"] <= by_hand * (1 + 1e-12)
    assert [point["comparator"] for point in curve] == ["near", "near", "far"]
    rates = [0.5 / t**0.6 for t in range(1, 21)]
    known_g = problem.bound(mode="sgd", steps=[0, 1, 9, 20], rates=rates)
    g2 = 2 * float((problem.h.square().sum(1) + 1).max())
    assert g2 <= known_g.constants["G^2"] <= g2 * (1 + 1e-5)
    for point in known_g.curve[1:]:
        used = rates[: point["steps"]]
        rest = known_g.constants["G^2"] * sum(eta**2 for eta in used)
        by_hand = min(v.loss + (v.distance2 + rest) / (2 * sum(used)) for v in known)
        assert by_hand <= point["bound"] <= by_hand * (1 + 1e-12)


def test_candidates_are_stretched():
    problem = Problem(5, "cross_entropy", n=40)
    other = problem.weight + 0.01
    found = comparators(
        problem.blocks,
        problem.weight,
        problem.bias,
        loss=problem.loss,
        candidates=[("other", other, problem.bias)],
    )
    once = float((other - problem.weight).square().sum())
    own = [v.distance2 / once for v in found if v.name.startswith("other")]
    assert own == pytest.approx([s**2 for s in family.STRETCHES], rel=1e-9)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_stochastic_bound_holds_on_average(loss):
    problem = Problem(7, loss, n=60)
    largest = smoothness(problem.blocks, loss=loss, form="paper")
    rates = [0.5 / largest / t**0.6 for t in range(1, 401)]
    steps = [0, 1, 4, 20, 100, 400]
    least, gradient = torch.zeros(len(steps), 12).double(), 0.0
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        weight, bias, best = problem.weight.clone(), problem.bias.clone(), math.inf
        for t in range(401):
            with torch.no_grad():
                best = min(best, float(problem.objective(weight, bias)))
            if t in steps:
                least[steps.index(t), seed] = best
            if t == 400:
                break
            index = torch.randint(problem.n, (8,), generator=g)
            weight.requires_grad_()
            bias.requires_grad_()
            outputs = F.linear(problem.h[index], weight, bias)
            by = torch.autograd.grad(problem.loss(outputs, problem.y[index]), (weight, bias))
            gradient = max(gradient, sum(float(p.square().sum()) for p in by))
            weight = (weight - rates[t] * by[0]).detach()
            bias = (bias - rates[t] * by[1]).detach()
    given = None if loss == "cross_entropy" else gradient
    known = problem.bound(mode="sgd", steps=steps, rates=rates, gradient_bound=given)
    assert known.in_expectation and known.rigorous == (loss == "cross_entropy")
    assert given is not None or gradient <= known.constants["G^2"]
    for point, mean in zip(known.curve, least.mean(1).tolist(), strict=True):
        assert mean <= point["bound"]
    assert "on average" in str(known)
    # by hand, for one comparator
    total, squares = sum(rates[:20]), sum(r * r for r in rates[:20])
    start = float(problem.objective(problem.weight, problem.bias))
    by_hand = start + known.constants["G^2"] * squares / (2 * total)
    assert known.curve[3]["bound"] <= by_hand * (1 + 1e-9)


def test_gradient_descent_reaches_logistic_regression_from_above():
    problem = Problem(2, "cross_entropy", n=120, l2=0.2)
    # scikit-learn's penalty leaves the bias out: here too
    problem.ones = False
    c = 1 / (problem.l2 * problem.n)
    judge = LogisticRegression(C=c, tol=1e-10, max_iter=20_000, fit_intercept=False)
    judge.fit(problem.h.numpy(), problem.y.numpy())
    weight = torch.from_numpy(np.ascontiguousarray(judge.coef_))
    best = float(problem.objective(weight, problem.bias))
    largest = smoothness(problem.blocks, loss="cross_entropy", ones=False, l2=problem.l2)
    losses, _, _ = problem.descend(1 / largest, 4000)
    assert all(value >= best - 1e-9 for value in losses)
    assert losses[-1] <= best + 1e-6
    steps = [1, 10, 100, 1000, 4000]
    known = problem.bound(steps=steps, candidates=[("scikit-learn", weight, None)])
    assert all(p["bound"] >= losses[p["steps"]] for p in known.curve)


def test_many_samples_have_the_candidates_alone(monkeypatch):
    monkeypatch.setattr(family, "ROWS", 10)
    problem = Problem(4, "cross_entropy", n=50)
    _, weight, bias = problem.descend(0.1, 50)
    known = problem.bound(steps=[50], candidates=[("last", weight, bias)])
    assert "last" in known.curve[0]["comparator"]
    assert known.curve[0]["bound"] < problem.bound(steps=[50]).curve[0]["bound"]


def test_a_loss_of_one_s_own():
    smooth = tp.ConvexLoss(lambda q, y: torch.sqrt(1 + (q - y).square()).sum(1).mean(), 1.0)
    problem = Problem(6, "squared_error", n=40)
    problem.loss = smooth
    largest = smoothness(problem.blocks, loss=smooth)
    losses, weight, bias = problem.descend(1 / largest, 60)
    known = problem.bound(steps=[1, 60], candidates=[("last", weight, bias)])
    assert all(point["bound"] >= losses[point["steps"]] for point in known.curve)


def test_wrong_features():
    problem = Problem(0, "squared_error", n=30)
    h, y, weight, bias = problem.h, problem.y, problem.weight, problem.bias
    bad = h.clone()
    bad[3, 4] = math.nan
    for message, arguments in (
        ("features: expected finite numbers", ((bad, y), weight, bias)),
        ("features: expected at least one sample", ((h[:0], y[:0]), weight, bias)),
        ("weight: expected", ((h, y), weight[:, 1:], bias)),
        ("weight: expected", ((h, y), weight[0], bias)),
        ("bias: expected shape", ((h, y), weight, bias[:2])),
    ):
        with pytest.raises(ValueError, match=message):
            guarantee(*arguments, loss="squared_error", steps=[2])
    labels = torch.arange(30) % 3
    for error, target in ((TypeError, labels + 0.5), (ValueError, labels + 1)):
        with pytest.raises(error, match=r"features\[1\]: expected"):
            guarantee((h, target), weight, bias, steps=[2])
    arrays = guarantee((h.numpy(), y.numpy()), weight, bias, loss="squared_error", steps=[2])
    assert arrays == guarantee((h, y), weight, bias, loss="squared_error", steps=[2])
    zero = guarantee((0 * h, y), weight, bias, loss="squared_error", steps=[0, 3])
    assert zero.curve[1]["bound"] <= zero.curve[0]["bound"] < math.inf


def test_tensors_and_text():
    problem = Problem(0, "squared_error", n=30)
    pair = (problem.h.float(), problem.y.float())
    known = tp.guarantee(pair, problem.weight, problem.bias, loss="squared_error", steps=[0, 4])
    assert known.curve[1]["steps"] == 4 and "guaranteed at every step" in str(known)
    assert "no bound is claimed" in str(Guarantee(mode="base", premises=[("a", "failed", "b")]))
    assert Guarantee(**known.as_dict()) == known
    assert squared_error(pair[0] @ problem.weight.float().T, pair[1]) > 0


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("steps: expected integers >= 0", {"steps": [1.5]}),
        ("l2: expected a number >= 0", {"l2": -0.5}),
        ("l2: expected .* and 0 for mode 'sgd'", {"mode": "sgd", "rates": [1] * 3, "l2": 1.0}),
        ("rates: expected finite numbers > 0", {"mode": "sgd", "rates": [1, 0, -1]}),
        ("rates: expected finite numbers > 0", {"mode": "sgd", "rates": [1, math.nan, 1]}),
        ("got -1.0", {"mode": "sgd", "rates": [1] * 3, "gradient_bound": -1.0}),
        ("mode: expected 'gd' or 'sgd', got 'base'", {"mode": "base"}),
        ("steps: expected integers >= 0", {"steps": []}),
        ("losses: expected 1, as many as steps, got 2", {"losses": [1, 2]}),
        ("rates: expected one for each of 3 steps, got none", {"mode": "sgd"}),
        ("rates: expected one for each of 3 steps, got 1", {"mode": "sgd", "rates": [1]}),
        ("gradient_bound: expected", {"mode": "sgd", "rates": [1] * 3}),
        ("smoothness: expected a form or a number > 0", {"smoothness": -1.0}),
        ("form: expected 'tight' or 'paper'", {"smoothness": "L"}),
    ],
)
def test_wrong_arguments(message, settings):
    with pytest.raises(ValueError, match=message):
        Problem(0, "squared_error", n=20).bound(**{"steps": [3], **settings})
