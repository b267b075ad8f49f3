"""tp.Trainer against Algorithm 1 written out in plain PyTorch, epoch by epoch, in float64."""

import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import toy_convnet, toy_data, toy_images, toy_mlp
from twophase.reference import two_phase
from twophase_ext.core.seeds import epoch_order
from twophase_ext.model.losses import squared_error

EPOCHS, TAU, BATCH, SEED = 6, 3, 8, 5
LOSSES = {"cross_entropy": nn.functional.cross_entropy, "squared_error": squared_error}


class States:
    def __init__(self) -> None:
        self.states = []

    def on_epoch_end(self, run, record) -> None:
        self.states.append({k: v.clone() for k, v in run.network.model.state_dict().items()})


def train_both(build, last_layer, x, y, loss, optimizer, nu_by):
    """The states after each epoch of the Trainer and of the reference."""
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    states = States()
    trainer = tp.Trainer(
        build().double(),
        loss=loss,
        optimizer=lambda parameters: optimizer(parameters, **settings),
        epochs=EPOCHS,
        tau=TAU,
        noise_std=1e-4,
        batch_size=BATCH,
        seed=SEED,
        precision="float64",
        feature_cache=nu_by,
        verify=False,
        run_dir=False,
        callbacks=[states],
        progress=False,
    )
    result = trainer.fit((x, y))
    assert result.status == "completed"
    expected, model = [], build().double()
    two_phase(
        model,
        last_layer,
        x,
        y,
        loss=LOSSES[loss],
        batches=lambda epoch: epoch_order(SEED, epoch, len(x)).split(BATCH),
        epochs=EPOCHS,
        tau=TAU,
        noise_std=1e-4,
        noise_seed=tp.stream_seed(SEED, "noise"),
        after_epoch=lambda _: expected.append(
            {k: v.clone() for k, v in model.state_dict().items()}
        ),
        **settings,
    )
    return states.states, expected


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("cache", ["hidden", "backbone", "none"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, tp.optim.SGD])
def test_mlp_matches_the_reference_through_both_phases(loss, cache, optimizer):
    x, y = toy_data(45)  # a last partial batch of 5
    x = x.double()
    if loss == "squared_error":
        y = nn.functional.one_hot(y, 3).double()
    ours, expected = train_both(toy_mlp, "4", x, y, loss, optimizer, cache)
    assert len(ours) == EPOCHS
    for a, b in zip(ours, expected, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-10)
    # the noise is the only thing that moved the hidden layers after the first phase
    moved = (ours[TAU]["0.weight"] - ours[TAU - 1]["0.weight"]).std()
    assert 0.5e-4 < float(moved) < 2e-4


def test_batch_norm_network_matches_the_reference():
    x, y = toy_images(45)
    build = lambda: toy_convnet(dropout=0.0)  # noqa: E731
    ours, expected = train_both(
        build, "head.out", x.double(), y, "cross_entropy", torch.optim.SGD, "hidden"
    )
    for a, b in zip(ours, expected, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-10)


def test_a_wrong_second_phase_would_be_seen():
    """The comparison can fail: another noise seed gives other weights."""
    x, y = toy_data(45)
    model = toy_mlp().double()
    common = {
        "loss": nn.functional.cross_entropy,
        "batches": lambda epoch: epoch_order(SEED, epoch, 45).split(BATCH),
        "epochs": 2,
        "tau": 1,
        "lr": 0.05,
    }
    two_phase(model, "4", x.double(), y, noise_seed=1, **common)
    other = toy_mlp().double()
    two_phase(other, "4", x.double(), y, noise_seed=2, **common)
    assert float((model[4].weight - other[4].weight).detach().abs().max()) > 1e-6
