"""What a run must not be resumed with: other data, another model."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import twophase_ext as tp
from helpers import Given, bits, quiet, same_bits, toy_data, toy_mlp
from twophase_ext.training.persistence import checkpoint


def half(folder, data, model=None, **settings):
    """A run that ended in epoch 3, the second one after tau."""

    class End(tp.Callback):
        def on_epoch_end(self, run, record):
            if record["epoch"] == 3:
                raise KeyboardInterrupt

    trainer = quiet(model or toy_mlp(), folder, callbacks=[End()], **{**SETTINGS, **settings})
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(data)


SETTINGS = {"epochs": 5, "tau": 2, "second_phase": "gd"}


class Rows(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


@pytest.mark.parametrize("kind", [lambda x, y: (x, y), Rows], ids=["arrays", "dataset"])
def test_other_training_data_are_refused_before_the_model_changes(tmp_path, kind):
    x, y = toy_data()
    half(tmp_path, kind(x, y))
    other, labels = x.clone(), y.clone()
    other[3], labels[5] = x[0], (y[5] + 1) % 3
    for data in ((other, y), (x, labels)):
        model = toy_mlp(seed=7)
        before = bits(model)
        with pytest.raises(ValueError, match="resume: the training data are not the checkpoint's"):
            quiet(model, tmp_path, **SETTINGS).fit(kind(*data), resume=True)
        assert same_bits(bits(model), before)
    for again in ((x, y), Rows(x, y)):  # however they are given
        result = quiet(toy_mlp(), tmp_path, **SETTINGS).fit(again, resume=True)
        assert result.status == "completed" and result.guarantee.curve


def test_random_data_are_not_compared(tmp_path):
    class Noisy(Rows):
        def __getitem__(self, i):
            return self.x[i] + 0.01 * torch.randn(5), self.y[i]

    half(tmp_path, Noisy(*toy_data()), second_phase="base")
    settings = SETTINGS | {"second_phase": "base"}
    result = quiet(toy_mlp(), tmp_path, **settings).fit(Noisy(*toy_data()), resume=True)
    assert result.status == "completed"


def test_another_setting_of_a_layer_is_refused(tmp_path):
    def model(beta=10.0, p=0.1):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Linear(5, 80), tp.nn.Softplus(beta), nn.Dropout(p), nn.Linear(80, 3)
            )

    half(tmp_path, toy_data(), model())
    for other, message in (
        (model(beta=0.01), "1 has beta = 10.0 there, 0.01 here"),
        (model(p=0.5), "2 has p = 0.1 there, 0.5 here"),
    ):
        with pytest.raises(ValueError, match=f"resume: .* is another one: {message}"):
            quiet(other, tmp_path, **SETTINGS).fit(toy_data(), resume=True)
    assert quiet(model(), tmp_path, **SETTINGS).fit(toy_data(), resume=True).guarantee.curve


def test_a_forward_that_computes_something_else_ends_the_claim(tmp_path):
    def model(scale):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = {"a": nn.Linear(5, 80), "b": nn.Linear(80, 3)}
            return Given(lambda m, x: m.b(torch.tanh(scale * m.a(x))), **layers)

    half(tmp_path, toy_data(), model(1.0))
    with pytest.warns(UserWarning, match="the features of the resumed run are not"):
        result = quiet(model(3.0), tmp_path, **SETTINGS).fit(toy_data(), resume=True)
    assert result.status == "completed" and not result.guarantee.curve


def test_a_checkpoint_without_what_was_noted_later_is_read(tmp_path):
    half(tmp_path, toy_data())
    state, _ = checkpoint.load(tmp_path)
    for name in ("data", "layers"):
        del state[name]
    checkpoint.save(tmp_path, state)
    result = quiet(toy_mlp(), tmp_path, **SETTINGS).fit(toy_data(), resume=True)
    assert result.status == "completed"
