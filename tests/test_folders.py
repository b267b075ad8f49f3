"""folder= keeps a computation, never another one's: the claims are those made without it."""

import pytest
import torch

import twophase_ext as tp
from helpers import toy_mlp
from lying_models import Net

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.rand(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GRAM = {"method": "certificate", "factorization": "gram"}


class Settings:
    """Of a model, as users keep them."""

    def __init__(self):
        self.scale = 1.0


def sharp():
    """Well conditioned, 34 units for 30 samples."""
    torch.manual_seed(0)
    model = Net(before=lambda m, z: z * (m._scale * m.settings.scale))
    model.wide, model.last = torch.nn.Linear(4, 34), torch.nn.Linear(34, 2)
    model._scale, model.settings = 1.0, Settings()
    with torch.no_grad():
        model.wide.weight.mul_(10)
        model.wide.bias.mul_(5)
    return model.double().eval()


def train_on(model):
    with torch.no_grad():
        model.last.weight.add_(1)


def private(model):
    model._scale = 0.3
    train_on(model)


def content(model):
    model.settings.scale = 0.3
    train_on(model)


def bounds(verdict):
    return verdict.status, verdict.sigma_min_lower, verdict.logabsdet_lower


@pytest.mark.parametrize("change", [private, content, train_on])
@pytest.mark.parametrize("way", [GRAM, {"method": "certificate"}])
def test_what_no_hash_of_a_model_sees(tmp_path, change, way):
    model = sharp()
    tp.verify_expressivity(model, X, folder=tmp_path, **way)
    change(model)
    verdict = tp.verify_expressivity(model, X, folder=tmp_path, **way)
    assert bounds(verdict) == bounds(tp.verify_expressivity(model, X, **way))
    assert verdict.status == "undecided" or verdict.recheck(model, X, say=lambda _: None)


def test_frozen_weights_are_not_drawn_anew(tmp_path):
    model = sharp()
    way = {"w": "init", **GRAM}
    tp.verify_expressivity(model, X, folder=tmp_path, **way)
    model.stem.requires_grad_(False)
    verdict = tp.verify_expressivity(model, X, folder=tmp_path, **way)
    assert bounds(verdict) == bounds(tp.verify_expressivity(model, X, **way))


def test_another_problem_is_computed_anew(tmp_path):
    tp.verify_expressivity(sharp(), X, folder=tmp_path, **GRAM)
    x = torch.randn(40, 5, dtype=torch.float64)
    model = toy_mlp().double()
    again = tp.verify_expressivity(model, x, folder=tmp_path, **GRAM)
    assert bounds(again) == bounds(tp.verify_expressivity(model, x, **GRAM))


def test_the_same_problem_goes_on(tmp_path):
    first = tp.verify_expressivity(sharp(), X, folder=tmp_path, **GRAM)
    again = tp.verify_expressivity(sharp(), X, folder=tmp_path, **GRAM)
    assert bounds(again) == bounds(first)
    passes = [verdict.constants["gram"]["passes"] for verdict in (first, again)]
    assert passes == [1, 0]  # over the columns
    names = [path.name for path in tmp_path.iterdir()]
    assert sum(name.startswith("features-") for name in names) == 1
