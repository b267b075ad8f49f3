"""Trainer(augment=...): what the transform sees, and what stays as the data are."""

import pytest
import torch

from helpers import bits, quiet, same_bits, toy_convnet, toy_images, toy_mlp
from interrupts import End
from twophase.augment import Compose, RandomCrop, RandomHorizontalFlip

SETTINGS = {"epochs": 6, "tau": 3}


class Spy:
    """Adds noise and keeps what it was given."""

    def __init__(self, scale=0.1):
        self.scale, self.seen = scale, []

    def __repr__(self):
        return f"Spy({self.scale})"

    def __call__(self, x, generator):
        noise = torch.randn(x.shape, generator=generator) * self.scale
        self.seen.append((x.clone(), noise))
        return x + noise


def test_training_batches_are_transformed_and_nothing_else():
    x, y = toy_images(33)
    spy = Spy()
    result = quiet(toy_convnet(), augment=spy, verify="svd", batch_size=8, **SETTINGS).fit(
        (x, y), (x, y)
    )
    # 33 samples, batches of 8, the last one of one joined: 4 steps in each of 6 epochs, in the
    # second phase too; neither BatchNorm's statistics, the verification nor a measurement
    assert result.feature_cache == "none"
    assert len(spy.seen) == 6 * 4 and sum(len(given) for given, _ in spy.seen) == 6 * 33
    rows = torch.cat([given for given, _ in spy.seen[:4]]).flatten(1)
    assert torch.equal(rows.sort(0).values, x.flatten(1).sort(0).values)  # each sample once
    noises = [noise for given, noise in spy.seen if len(given) == 8]
    assert all(not torch.equal(noises[0], other) for other in noises[1:])
    final = result.final
    assert final["train_loss"] == final["val_loss"]  # both of the data as given


def test_the_transform_is_that_of_the_seed_epoch_and_batch(tmp_path):
    data = toy_images(33)
    transform = Compose(RandomCrop(2), RandomHorizontalFlip())

    def trained(*arguments, seed=1, resume=None, **settings):
        model = toy_convnet()
        quiet(model, *arguments, augment=transform, seed=seed, **SETTINGS, **settings).fit(
            data, resume=resume
        )
        return bits(model)

    whole = trained()
    assert same_bits(whole, trained())
    assert not same_bits(whole, trained(seed=2))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, callbacks=[End(1, by=KeyboardInterrupt)])
    assert same_bits(whole, trained(tmp_path, resume=True))
    with pytest.raises(ValueError, match="augment"):
        quiet(toy_convnet(), tmp_path, augment=Compose(RandomCrop(1)), **SETTINGS).fit(
            data, resume=True
        )


def test_copies_are_transformed():
    spy = Spy()
    result = quiet(
        toy_mlp(width=130), augment=spy, augment_copies=2, second_phase="gd", **SETTINGS
    ).fit((torch.randn(40, 5), torch.randint(3, (40,))))
    assert result.feature_cache == "hidden"
    assert sum(len(given) for given, _ in spy.seen) == 3 * 40 + 2 * 40


def test_wrong_transforms_are_named():
    data = toy_images(33)
    with pytest.raises(TypeError, match="augment: expected a callable"):
        quiet(toy_convnet(), augment="flip and crop", **SETTINGS)
    wrong = (
        (lambda x, g: x[1:], r"\[32, 1, 6, 6\] torch.float32"),
        (lambda x, g: None, "NoneType"),
    )
    for transform, found in wrong:
        expected = rf"augment: expected \[33, 1, 6, 6\] torch.float32, got {found}"
        with pytest.raises(ValueError, match=expected):
            quiet(toy_convnet(), augment=transform, batch_size=64, **SETTINGS).fit(data)
    with pytest.raises(ValueError, match="needs fixed features"):
        quiet(toy_convnet(), augment=Spy(), second_phase="gd", **SETTINGS).fit(data)
