"""Weights of samples: the mean sum w_i l_i / sum w_i, in every phase, bound and floor."""

import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_data, toy_mlp
from twophase_ext.model.losses import counting, objective, resolve_loss, weighted
from twophase_ext.model.weighted import packed
from twophase_ext.theory.accelerated import distance2
from twophase_ext.training.steps import metric as rows_of_m
from twophase_ext.training.steps import sides
from twophase_ext.training.steps.metric import Problem
from twophase_ext.training.steps.sides import made

X, Y = toy_data(48)
REAL = torch.randn(48, 3, generator=torch.Generator().manual_seed(1))
TIMES = torch.arange(48) % 4  # every fourth sample counts nowhere
INDEX = torch.arange(48).repeat_interleave(TIMES)
W = torch.tensor([2.0, 0.5, 3.0])

LOSSES = {
    "cross_entropy": Y,
    nn.CrossEntropyLoss(W, label_smoothing=0.1): Y,
    nn.CrossEntropyLoss(ignore_index=1): Y,
    nn.CrossEntropyLoss(label_smoothing=0.2): REAL.softmax(1),
    "squared_error": REAL,
    nn.MSELoss(): REAL,
    nn.HuberLoss(delta=0.3): REAL,
    nn.SmoothL1Loss(beta=0.5): REAL,
    nn.BCEWithLogitsLoss(W, pos_weight=2 * W): (REAL > 0).float(),
    nn.MultiLabelSoftMarginLoss(W): (REAL > 0).float(),
    nn.SoftMarginLoss(): REAL.sign(),
}


class Triples(Dataset):
    """(x, y, weight), or the weight by name; counts how often a sample is fetched."""

    def __init__(self, weights, *, named=False):
        self.weights, self.named, self.count = weights, named, Counter()

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        self.count[i] += 1
        if self.named:
            return {"x": X[i], "label": Y[i], "sample_weight": self.weights[i]}
        return X[i], Y[i], self.weights[i]


@pytest.mark.parametrize("given", LOSSES, ids=str)
def test_whole_weights_are_repetitions_and_constants_bound_the_hessians(given):
    y, loss = LOSSES[given], resolve_loss(given)
    y = y.double() if y.is_floating_point() else y
    y = torch.where(y == 1, -100, y) if "ignore_index=1" in loss.name else y
    q = torch.randn(48, 3, generator=torch.Generator().manual_seed(2)).double()
    rows = packed(y, TIMES.double())
    counts = counting(weighted(loss), rows)
    own = objective(weighted(loss), rows[counts], 3)
    truth = resolve_loss("cross_entropy") if "ignore_index" in loss.name else loss
    assert float(own(q[counts], rows[counts])) == pytest.approx(float(truth(q[INDEX], y[INDEX])))
    q, rows = q[counts], rows[counts]
    parts = zip(q.split(7), rows.split(7), strict=True)
    mean = sum(float(own(*part)) * len(part[0]) for part in parts) / len(q)
    assert mean == pytest.approx(float(own(q, rows)))
    # each sample's own Hessian at several outputs, the flat ones among them
    scale, steepest = own.row_scale(rows), 0.0
    for i, row in enumerate(rows):
        for at in (torch.zeros(3).double(), q[i], row[:3] if len(row) > 2 else 2 * q[i]):
            hessian = torch.autograd.functional.hessian(lambda p, r=row: own(p[None], r[None]), at)
            largest = float(torch.linalg.eigvalsh(hessian)[-1])
            assert largest <= own.smoothness * float(scale[i]) ** 2 * (1 + 1e-12)
            steepest = max(steepest, largest / own.smoothness)
    assert steepest > 0.6  # L_ell is no loose constant


@pytest.mark.parametrize("form", ["arrays", "names", "sampler"])
def test_equal_weights_give_the_bits_of_none(form):
    model, other = toy_mlp(), toy_mlp()
    y = torch.where(torch.arange(48) % 7 == 0, -100, Y)
    half = torch.full((48,), 0.5)
    labels = Y if form == "names" else y
    data = {
        "arrays": (X, y, half.numpy()),
        "names": Triples(half, named=True),
        "sampler": DataLoader(
            TensorDataset(X, y), batch_size=8, sampler=WeightedRandomSampler([2.0] * 48, 9)
        ),
    }[form]
    a, b = quiet(model).fit((X, labels)), quiet(other).fit(data)
    assert same_bits(bits(model), bits(other))
    assert a.final == b.final and a.minimum.floor == b.minimum.floor


@pytest.mark.filterwarnings("ignore:the last hidden layer has")
@pytest.mark.parametrize(
    ("phase", "loss"),
    [
        ("base", "huber"),
        ("gd", "cross_entropy"),
        ("agd", "cross_entropy"),
        ("agd", "squared_error"),
        ("exact", "squared_error"),
    ],
)
def test_a_run_is_that_of_repeated_samples(phase, loss):
    """Whole batches in float64: every step is the same, but for rounding; so is what is claimed."""
    y = Y if loss == "cross_entropy" else REAL
    given = {"loss": loss, "batch_size": 500, "precision": "float64", "epochs": 4, "tau": 2}
    # mean eigenvalues are of the smaller side; tall least squares have one solution
    width = {"agd": 30, "exact": 12}.get(phase, 80)
    found = []
    for data in ((X, y, TIMES), (X[INDEX], y[INDEX])):
        result = quiet(toy_mlp(width=width), second_phase=phase, verify="separation", **given).fit(
            data
        )
        assert result.verdict.distinct == 36
        assert result.verdict.status == ("proved" if width == 80 else "deficient")
        found.append(result)
    a, b = found
    assert a.final["train_loss"] == pytest.approx(b.final["train_loss"], rel=1e-7)
    assert float((a.predict(X) - b.predict(X)).abs().max()) < 1e-3
    assert a.minimum.floor.lower == pytest.approx(b.minimum.floor.lower, abs=1e-12)
    assert a.minimum.floor.distinct == b.minimum.floor.distinct == 36
    if phase in ("gd", "agd"):
        for result in found:
            assert result.guarantee.curve and not result.guarantee.refuted
    if phase == "gd":
        assert a.guarantee.constants["L_H"] == pytest.approx(b.guarantee.constants["L_H"], rel=0.02)


@pytest.mark.filterwarnings("ignore:the last hidden layer has")
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("width", [12, 80])  # of both sides of M
def test_exact_against_scikit_learn(loss, width):
    c = torch.rand(48, generator=torch.Generator().manual_seed(3)).double() * 5
    l2, y = 0.05, Y if loss == "cross_entropy" else REAL
    result = quiet(
        toy_mlp(width=width),
        loss=loss,
        second_phase="exact",
        exact={"l2": l2, "gap": 1e-13, "steps": 60},
        precision="float64",
        epochs=8,
        tau=1,
    ).fit((X, y, c))
    hidden = result.model[:-1](X.double()).detach().numpy()
    m, whole = np.hstack([hidden, np.ones((48, 1))]), float(c.sum())
    if loss == "cross_entropy":
        judge = LogisticRegression(
            C=1 / (l2 * whole), fit_intercept=False, tol=1e-12, max_iter=10**4, solver="newton-cg"
        ).fit(m, y, sample_weight=c.numpy())
    else:
        judge = Ridge(alpha=l2 * whole / 2, fit_intercept=False, solver="svd")
        judge.fit(m, y.double().numpy(), sample_weight=c.numpy())
    last = result.model[-1]
    own = torch.cat([last.weight, last.bias[:, None]], 1).detach().numpy()
    assert np.abs(own - judge.coef_).max() < 1e-5 * np.abs(judge.coef_).max()
    gap = result.guarantee.constants["gap"]
    assert 0 <= gap < 1e-11


@pytest.mark.parametrize("width", [12, 80])
@pytest.mark.parametrize("bias", ["moves", "none", "fixed"])
def test_the_metric_bounds_the_hessian_of_the_weighted_loss(width, bias, monkeypatch):
    """L_ell H - Hessian >= 0, tightly; ||.||_H as it is defined; M in parts."""
    monkeypatch.setattr(rows_of_m, "PANEL", 0)
    for module in (rows_of_m, sides):
        monkeypatch.setattr(module, "BATCH", 7)
    model = toy_mlp(width=width, dtype=torch.float64)
    model[-1] = nn.Linear(width, 3, bias=bias != "none").double()
    ones, fixed = bias == "moves", model[-1].bias.detach() if bias == "fixed" else 0.0
    c = torch.logspace(-3, 1, 48, dtype=torch.float64)
    cache = tp.FeatureCache(model.eval(), (X, Y, c))
    start = [p.detach() for p in model[-1].parameters()][: 1 + ones]
    h, y = next(cache.in_order(48))
    m = torch.cat([h, torch.ones(48, 1)], 1) if ones else h
    problem = Problem(cache, start, model[-1], cache.loss, m.norm(dim=1), 1.0, 0.1)
    side = made(problem)
    scale = (c / c.max()).sqrt()[:, None]
    scaled = m * scale
    metric = scaled.T @ scaled / 48 + side.damping * torch.eye(m.shape[1])

    def value(w):
        outputs = m @ w.view(3, -1).T + fixed
        return (c * nn.functional.cross_entropy(outputs, Y, reduction="none")).sum()

    at = torch.zeros(3 * m.shape[1], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda w: value(w) / c.sum(), at)
    left = cache.loss.smoothness * torch.kron(torch.eye(3).double(), metric) - hessian
    assert float(torch.linalg.eigvalsh(left)[0]) > 0
    moved = torch.randn(3, m.shape[1], dtype=torch.float64)
    found = distance2(lambda: cache.in_order(48), moved, side.damping, ones, cache.loss)
    true = float(((moved @ metric) * moved).sum())
    assert true <= found <= true * (1 + 1e-5)
    # a displacement towards outputs: its coordinates, its image and its size agree
    wish = side.towards(torch.randn(48, 3, dtype=torch.float64))
    d, image = side.displacement(wish)[0], side.image(wish)
    assert torch.allclose(image[:48], scaled @ d.T)
    outputs = side.outputs_at(image)
    there = torch.cat([p.view(3, -1) for p in start], 1) + d
    assert torch.allclose(outputs, scaled @ there.T + scale * fixed)
    assert float(side.loss(outputs, y)) == pytest.approx(float(value(there) / c.sum()))


def test_the_floor_of_a_run_is_the_rational_one():
    x = X.clone()
    x[24:] = x[:24]
    c = torch.rand(48, generator=torch.Generator().manual_seed(5)).double()
    y = REAL.double()
    y[24:30] = y[:6]
    given = {"loss": "squared_error", "precision": "float64", "verify": "separation"}
    result = quiet(toy_mlp(), **given).fit((x, y, c))
    weights = [Fraction(v) for v in c.tolist()]
    exact = Fraction(0)
    for i in range(24):
        pair = [weights[i], weights[i + 24]]
        for values in zip(y[i].tolist(), y[i + 24].tolist(), strict=True):
            a, b = map(Fraction, values)
            exact += pair[0] * pair[1] / sum(pair) * (a - b) ** 2
    exact /= sum(weights)
    for floor in (result.minimum.floor, tp.loss_floor(x, y, "squared_error", weights=c)):
        assert Fraction(floor.lower) <= exact <= Fraction(floor.upper)
        assert floor.upper - floor.lower < 1e-12 and floor.disagreeing == 18
    assert result.verdict.disagreeing == 18
    assert f"all weights of this network is {float(exact):.5}" in str(result.minimum)
    score = result.score((x, y, 3 * c))["loss"]
    assert score == pytest.approx(result.final["train_loss"], rel=1e-12)


def test_a_weighted_sampler_is_the_weights_of_samples(capsys):
    c = torch.rand(48, generator=torch.Generator().manual_seed(6)).double() + 0.1
    dataset = Triples(torch.ones(48))
    sampler = WeightedRandomSampler(c, 1000)
    state = torch.random.get_rng_state()
    model, other, product = toy_mlp(), toy_mlp(), toy_mlp()
    trainer = tp.Trainer(model, run_dir=False, epochs=4, tau=2, batch_size=8, verify=False)
    trainer.fit(DataLoader(dataset, batch_size=8, sampler=sampler))
    assert "the training loss is the expected loss of what it draws" in capsys.readouterr().out
    # once to be checked, in each of two epochs and for the cache; a few are looked at before
    assert min(dataset.count.values()) == 4 and sum(dataset.count.values()) < 48 * 5
    assert torch.equal(torch.random.get_rng_state(), state)
    quiet(other).fit((X, Y, c))
    assert same_bits(bits(model), bits(other))
    halves = DataLoader(
        TensorDataset(X, Y, c.sqrt()), batch_size=8, sampler=WeightedRandomSampler(c.sqrt(), 5)
    )
    quiet(product).fit(halves)
    assert all(torch.allclose(p, bits(product)[name]) for name, p in bits(model).items())
    # that many draws have about this mean loss
    drawn = torch.tensor(list(WeightedRandomSampler(c, 200_000)))
    with torch.no_grad():
        each = nn.functional.cross_entropy(model(X), Y, reduction="none")
        mean = float((c * each).sum() / c.sum())
    error = float(each.std()) / 200_000**0.5
    assert float(each[drawn].mean()) == pytest.approx(mean, abs=5 * error)


def test_weights_of_tokens():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(5, 90), nn.Linear(90, 3)

        def forward(self, x):
            return self.last(tp.softplus(self.inner(x)))

    x, y = X.view(12, 4, 5), Y.view(12, 4)
    c = TIMES.double().view(12, 4)
    masked = torch.where(c > 0, y, -100)
    torch.manual_seed(0)
    model, other = Tagger(), Tagger()
    other.load_state_dict(model.state_dict())
    a = quiet(model, second_phase="gd").fit((x, y, (c > 0).double()))
    b = quiet(other, second_phase="gd").fit((x, masked))
    assert a.final["train_loss"] == pytest.approx(b.final["train_loss"], rel=1e-5)
    assert a.minimum.floor.distinct == b.minimum.floor.distinct == 36
    row = quiet(Tagger()).fit((x, y, c[:, 1] + torch.arange(12)))
    assert row.status == "completed"
    with pytest.raises(ValueError, match="a weight for each sample, or each of its 4 outputs"):
        quiet(Tagger()).fit((x, y, c[:, :3] + torch.rand(12, 3)))


def test_a_run_goes_on_with_the_same_weights_alone(tmp_path):
    c = torch.rand(48) + 0.1
    quiet(toy_mlp(), tmp_path / "a").fit((X, Y, c))
    assert quiet(toy_mlp(), tmp_path / "a").fit((X, Y, c), resume=True).status == "completed"
    with pytest.raises(ValueError, match="data"):
        quiet(toy_mlp(), tmp_path / "a").fit((X, Y, 1 / c), resume=True)


def test_own_loop_and_global_minimum_take_weights():
    c = torch.rand(48, generator=torch.Generator().manual_seed(7)) + 0.1
    model = toy_mlp()
    quiet(model).fit((X, Y, c))
    copy = toy_mlp()
    copy.load_state_dict(model.state_dict())
    losses = tp.fit_last_layer(copy, tp.FeatureCache(copy.eval(), (X, Y, c)), epochs=3, lr=0.1)
    with torch.no_grad():
        each = nn.functional.cross_entropy(copy(X), Y, reduction="none")
    assert losses[-1] < losses[0] and losses[-1] > float((c * each).sum() / c.sum()) * 0.9
    x = X.clone()
    x[24:] = x[:24]
    weights, model = torch.arange(48) % 5 * 0.5, toy_mlp(dtype=torch.float64)
    for loss, y in (("cross_entropy", Y), ("huber", 3 * REAL), ("squared_error", REAL)):
        found = tp.global_minimum(model, x.double(), y, loss=loss, weights=weights)
        assert found.reached and found.floor.lower > 0
        assert found.floor.lower == pytest.approx(
            tp.loss_floor(x, y, loss, weights=weights, outputs=3).lower, rel=1e-12
        )


def named(weights, **settings):
    model = toy_mlp()
    before = bits(model)
    with pytest.raises(ValueError) as caught:
        quiet(model, **settings).fit((X, Y, weights))
    assert same_bits(bits(model), before)
    return str(caught.value)


def test_unusable_weights_are_named():
    c = np.ones(48)
    assert re.search("train.*48 weights, one a sample, got .47.", named(c[1:]))
    assert "expected weights >= 0" in named(np.where(np.arange(48) == 5, -1, c))
    assert "got -1 at sample 5" in named(np.where(np.arange(48) == 5, -1, c))
    assert "NaN or infinity in the weight of sample 7" in named(
        np.where(np.arange(48) == 7, np.nan, c)
    )
    assert "within torch.float32's range, got 1e-60 at sample 0" in named(np.r_[1e-60, c[1:]])
    assert "or of weight 0" in named(0 * c)
    own = tp.ConvexLoss(lambda q, y: nn.functional.cross_entropy(q, y), 0.5, "mine")
    assert "mine is known as a mean over samples alone" in named(np.arange(48.0), loss=own)
