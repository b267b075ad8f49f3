"""The estimators: scikit-learn's own checks, and what the checks do not ask."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_diabetes, load_wine
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import twophase_ext as tp
from helpers import bits, same_bits, toy_data
from twophase_ext.integrations.scikit import (
    adam,
)
from twophase_ext.sklearn import TwoPhaseClassifier, TwoPhaseRegressor

EXCUSED = {
    "check_sample_weight_equivalence_on_dense_data": "mini-batches of repeated samples are others "
    "than those of weighted ones, as with SGDClassifier, and so is the width, 1.1 n: see "
    "test_weights_are_repetitions_where_batches_are_whole",
}


class Fast:
    """Adam; its repr, which names tests, holds no address: every process has the same names."""

    def __call__(self, parameters):
        return torch.optim.Adam(parameters, lr=2e-2)

    def __repr__(self):
        return "fast"


fast = Fast()


def quick(kind, **settings):
    given = {"epochs": 4, "hidden": (16,), "optimizer": fast, "verify": False, "random_state": 0}
    return kind(**{**given, **settings})


@parametrize_with_checks(
    [quick(TwoPhaseClassifier), quick(TwoPhaseRegressor)],
    expected_failed_checks=lambda _: EXCUSED,
)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def wine():
    x, y = load_wine(return_X_y=True)
    return StandardScaler().fit_transform(x), np.array(["ruby", "amber", "gold"])[y]


def test_the_defaults_learn_and_prove_the_condition(wine):
    x, y = wine
    model = TwoPhaseClassifier(random_state=0).fit(x[::2], y[::2])
    assert model.score(x[1::2], y[1::2]) > 0.95
    assert model.result_.verdict.status == "proved"
    assert model.model_ is model.result_.model
    assert model.result_.verdict.width == 98  # ceil(1.1 * 89)


def test_the_default_regressor_learns():
    x, y = load_diabetes(return_X_y=True)
    own = TwoPhaseRegressor(epochs=20, random_state=0)
    model = make_pipeline(
        StandardScaler(), TransformedTargetRegressor(own, transformer=StandardScaler())
    ).fit(x, y)
    assert model.score(x, y) > 0.5 and model.predict(x).shape == y.shape
    two = quick(TwoPhaseRegressor, epochs=2).fit(x, np.column_stack([y, -y]))
    assert two.predict(x).shape == (len(x), 2)


def test_probabilities_are_the_softmax_of_the_networks_logits(wine):
    x, y = wine
    model = quick(TwoPhaseClassifier).fit(x, y)
    assert model.classes_.tolist() == ["amber", "gold", "ruby"]
    with torch.no_grad():
        logits = model.model_(torch.from_numpy(x).float())
    truth = logits.double().softmax(1).numpy()
    assert np.array_equal(model.predict_proba(x), truth)
    assert np.allclose(model.predict_log_proba(x), np.log(truth), rtol=1e-12)
    assert (model.predict(x) == model.classes_[truth.argmax(1)]).all()


@pytest.mark.parametrize("kind", [TwoPhaseClassifier, TwoPhaseRegressor])
def test_equal_weights_are_none_and_zero_is_absent_bit_for_bit(kind):
    x, y = (part.numpy() for part in toy_data())
    plain = quick(kind).fit(x, y)
    for weight in (np.ones(60), 3 * np.ones(60, np.float32)):
        assert same_bits(bits(plain.model_), bits(quick(kind).fit(x, y, weight).model_))
    kept = np.arange(60) % 3 > 0
    part = quick(kind).fit(x[kept], y[kept])
    zeros = quick(kind).fit(x, y, kept.astype(float))
    assert same_bits(bits(part.model_), bits(zeros.model_))
    other = quick(kind).fit(x, y, np.linspace(0.5, 2, 60))
    assert not same_bits(bits(plain.model_), bits(other.model_))


@pytest.mark.filterwarnings("ignore:the last hidden layer has")
@pytest.mark.parametrize("kind", [TwoPhaseClassifier, TwoPhaseRegressor])
def test_weights_are_repetitions_where_batches_are_whole(kind):
    def network(n, features, outputs):
        return nn.Sequential(nn.Linear(features, 80), tp.nn.Softplus(10.0), nn.Linear(80, outputs))

    x, y = (part.numpy() for part in toy_data())
    weight = np.arange(60) % 4
    settings = {"module": network, "batch_size": 500, "settings": {"precision": "float64"}}
    a = quick(kind, **settings).fit(x, y, weight)
    b = quick(kind, **settings).fit(np.repeat(x, weight, 0), np.repeat(y, weight))
    found, truth = a._outputs(x), b._outputs(x)
    assert np.abs(found - truth).max() < 1e-6 * np.abs(truth).max()


def test_a_bound_is_given_for_weighted_losses():
    x, y = (part.numpy() for part in toy_data())
    for kind in (TwoPhaseClassifier, TwoPhaseRegressor):
        given = {"verify": "separation", "second_phase": "gd", "epochs": 4}
        result = quick(kind, **given).fit(x, y, np.linspace(0.5, 2, 60)).result_
        (row,) = (row for row in result.guarantee.premises if row[0] == "convex, smooth loss")
        assert row[1] == "held"
        assert result.guarantee.curve and not result.guarantee.refuted


def test_class_weight_is_a_sample_weight():
    x, y = (part.numpy() for part in toy_data())
    y = np.where(y == 2, "rare", "common")
    counts = {name: (y == name).sum() for name in ("rare", "common")}
    weight = np.array([60 / (2 * counts[name]) for name in y])
    a = quick(TwoPhaseClassifier, class_weight="balanced").fit(x, y)
    b = quick(TwoPhaseClassifier).fit(x, y, weight)
    assert np.allclose(a._outputs(x), b._outputs(x), atol=1e-5)
    c = quick(TwoPhaseClassifier, class_weight={"rare": 5.0}).fit(x, y)
    assert (
        c.predict_proba(x)[:, 1].mean()
        > 1.2 * quick(TwoPhaseClassifier).fit(x, y).predict_proba(x)[:, 1].mean()
    )
    with pytest.raises(ValueError, match="sample_weight: expected a weight above zero"):
        quick(TwoPhaseClassifier, class_weight={"rare": 0, "common": 0}).fit(x, y)


def test_search_pipeline_and_pickle(wine):
    x, y = wine
    search = GridSearchCV(
        make_pipeline(StandardScaler(), quick(TwoPhaseClassifier)),
        {"twophaseclassifier__hidden": [(4,), (16,)], "twophaseclassifier__tau": [1, 3]},
        cv=2,
    ).fit(x, y)
    assert search.best_score_ > 0.8
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    assert np.array_equal(again.predict_proba(x), search.predict_proba(x))
    assert str(again[-1].result_) == str(search.best_estimator_[-1].result_)


@pytest.mark.filterwarnings("ignore:the last hidden layer has")
def test_a_network_of_ones_own_is_copied_and_images_are_taken():
    x, y = toy_data(d=16)
    images = x.view(-1, 1, 4, 4).numpy()
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(1, 8, 3), tp.nn.Softplus(), nn.Flatten(), nn.Linear(32, 3))
    before = bits(own)
    model = quick(TwoPhaseClassifier, module=own)
    twin = clone(model).fit(images, y)
    model.fit(images, y)
    assert same_bits(before, bits(own)) and model.module is own
    assert same_bits(bits(model.model_), bits(twin.model_))
    assert not same_bits(before, bits(model.model_))
    assert cross_val_score(model, images, y, cv=2).shape == (2,)
    made = []

    def network(n, features, outputs):
        made.append((n, features, outputs))
        return nn.Sequential(nn.Flatten(), nn.Linear(features, 20), nn.Tanh(), nn.Linear(20, 3))

    quick(TwoPhaseClassifier, module=network).fit(images, y)
    assert made == [(60, 16, 3)]


def test_random_state_and_what_else_is_global():
    x, y = (part.numpy() for part in toy_data())
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    a, b = quick(TwoPhaseClassifier).fit(x, y), quick(TwoPhaseClassifier).fit(x, y)
    other = quick(TwoPhaseClassifier, random_state=1).fit(x, y)
    assert same_bits(bits(a.model_), bits(b.model_))
    assert not same_bits(bits(a.model_), bits(other.model_))
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_rate_falls_with_the_number_of_inputs():
    layers = nn.Sequential(nn.Linear(10, 8), nn.Conv2d(32, 8, 2), nn.Linear(640, 3))
    groups = adam(list(layers.parameters())).param_groups
    found = {tuple(p.shape): group["lr"] for group in groups for p in group["params"]}
    assert (found[8, 10], found[8, 32, 2, 2]) == (1e-3, 5e-4)
    assert found[3, 640] == pytest.approx(1e-4) and found[8,] == found[3,] == 1e-3


def test_what_cannot_be_trained_on_is_said(monkeypatch):
    x, y = (part.numpy() for part in toy_data())
    for settings, message in [
        ({"hidden": ()}, "hidden: expected one layer or more"),
        ({"hidden": (0,)}, "hidden: expected"),
        ({"tau": 2.5}, "tau: expected a fraction"),
        ({"settings": {"precision": "half"}}, "precision: expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            quick(TwoPhaseClassifier, **settings).fit(x, y)
    with pytest.raises(ValueError, match="y: expected 2 classes or more, got 1 class, 0"):
        quick(TwoPhaseClassifier).fit(x, np.zeros(60))
    with pytest.raises(RuntimeError, match=r"the training diverged.*smaller learning rate"):
        quick(TwoPhaseRegressor, optimizer=lambda p: torch.optim.SGD(p, lr=1e9)).fit(x, y)

    def stopped(self, train):
        return tp.Result(nn.Linear(1, 1), [], "interrupted", None)

    monkeypatch.setattr(tp.Trainer, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        quick(TwoPhaseClassifier).fit(x, y)
