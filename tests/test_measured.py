"""What a run writes down is what the user's own model gives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import quiet, toy_data, toy_mlp

pytestmark = pytest.mark.filterwarnings("ignore:the last hidden layer has")


@torch.no_grad()
def own(model, x, y):
    """Loss and accuracy of the model as its owner calls it."""
    outputs = model(x)
    return float(F.cross_entropy(outputs, y)), float((outputs.argmax(1) == y).float().mean())


@pytest.mark.parametrize("cache", ["hidden", "hidden-bfloat16", "backbone", "none"])
def test_validation_is_of_the_network_not_of_rounded_features(cache):
    x, y = toy_data(80)
    model = toy_mlp()
    settings = {"epochs": 4, "tau": 2, "feature_cache": cache}
    result = quiet(model, **settings).fit((x[:60], y[:60]), (x[60:], y[60:]))
    loss, accuracy = own(model, x[60:], y[60:])
    row = result.history[-1]
    assert row["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert row["val_accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        ({"batch_size": 16}, 64),
        ({"batch_size": 100}, 100),
        ({"batch_size": 300, "accumulate": 3}, 100),
        ({"batch_size": 300}, 256),
    ],
)
def test_evaluation_takes_no_more_at_once_than_a_step(settings, largest):
    model, sizes = toy_mlp(), []
    model.register_forward_pre_hook(
        lambda model, args: None if model.training else sizes.append(len(args[0]))
    )

    class Forget:
        def on_epoch_end(self, run, record):
            sizes.clear()

    settings = {"second_phase": "none", "epochs": 2, "verify": False, **settings}
    result = quiet(model, callbacks=[Forget()], **settings).fit(toy_data(300))
    assert max(sizes) == largest and sum(sizes[: -(-300 // largest)]) == 300
    assert result.final["train_loss"] == pytest.approx(own(model, *toy_data(300))[0], rel=1e-6)


@pytest.mark.parametrize("phase", ["base", "gd", "sgd"])
def test_training_accuracy_in_the_second_phase_is_of_the_epoch_s_end(phase):
    """With so long a rate that the accuracy changes from step to step."""
    x, y = toy_data()
    seen = []

    class Look:
        def on_epoch_end(self, run, record):
            if record["phase"] == 2:
                seen.append((record["train_accuracy"], own(run.network.model, x, y)[1]))

    def fast(parameters):
        return torch.optim.SGD(parameters, lr=3.0)

    settings = {"epochs": 6, "tau": 1, "second_phase": phase, "callbacks": [Look()]}
    quiet(toy_mlp(), optimizer=fast, **settings).fit((x, y))
    assert len(seen) == 5
    for measured, truth in seen:
        assert measured == pytest.approx(truth)


def test_the_training_loss_of_sgd_is_a_mean_over_its_draws():
    """64 draws of 60 samples: the mean is over 64."""
    model = toy_mlp()
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    frozen = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "sgd": {"c": 1e-12}}
    settings = {"epochs": 3, "tau": 1, "second_phase": "sgd", "batch_size": 16}
    result = quiet(model, **settings, **frozen).fit(toy_data())
    assert [row["train_loss"] for row in result.history] == pytest.approx([math.log(3)] * 3)


def test_branches_with_another_verification_have_their_own_verdict():
    branches = {name: {"verify": name} for name in ("separation", "svd")} | {
        "none": {"verify": False}
    }
    results = quiet(toy_mlp(), epochs=3, tau=1).branch(branches, toy_data())
    assert results["separation"].verdict.asked == "separation"
    assert results["svd"].verdict.asked == "svd"
    assert results["none"].verdict is None
