"""What TwoPhaseCallback takes from Lightning's loader, and refuses before the first step."""

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from helpers import bits, same_bits, toy_convnet, toy_data, toy_images, toy_mlp

pytest.importorskip("lightning.pytorch")

from test_lightning import Module, callback, fit

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice on workers and loggers
]


@pytest.mark.parametrize("cache", [True, False])
def test_the_samplers_samples_are_those_of_statistics_verdict_and_cache(cache):
    x, y = toy_images(40)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, sampler=SubsetRandomSampler(range(24)))
    module, plugin = Module(toy_convnet(dropout=0.0)), callback(verify="auto", cache=cache)
    fit(module, loader, plugin)
    assert plugin.verdict.n == 24
    twin = toy_convnet(dropout=0.0)
    twin.load_state_dict(bits(module.net))
    twin.eval()
    stats = twin.stem(x[:24])
    assert torch.allclose(module.net.bn.running_mean, stats.mean((0, 2, 3)), atol=1e-6)
    if cache:
        assert len(plugin.losses) == 2


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("settings", "sampler", "message"),
    [
        ({"limit_train_batches": 2}, None, "limit_train_batches, overfit_batches: expected all 5"),
        ({"limit_train_batches": 0.5}, None, "pass data, the samples that are trained on"),
        ({"overfit_batches": 2}, None, "limit_train_batches, overfit_batches"),
        ({}, WeightedRandomSampler([1.0] * 40, 40, False), "without replacement"),
        ({}, RandomSampler(range(40), num_samples=16), "num_samples"),
        ({"precision": "bf16-true"}, None, "bfloat16"),
    ],
)
def test_other_samples_and_weights_are_refused_before_the_first_step(
    settings, sampler, message, cache
):
    data = TensorDataset(*toy_data(40))
    loader = DataLoader(data, batch_size=8, sampler=sampler, shuffle=sampler is None)
    module = Module(toy_mlp())
    before = bits(module.net)
    with pytest.raises((ValueError, TypeError), match=message):
        fit(module, loader, callback(cache=cache), **settings)
    after = {name: value.float() for name, value in bits(module.net).items()}
    if "precision" not in settings:
        assert same_bits(after, before)
    assert module.training


def test_limited_batches_with_the_data_named():
    x, y = toy_data(40)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    plugin = callback(verify="auto", data=(x[:16], y[:16]))
    fit(Module(toy_mlp()), loader, plugin, limit_train_batches=2)
    assert plugin.verdict.n == 16


def test_a_noise_that_names_other_parameters_is_refused_at_the_start():
    with pytest.raises(ValueError, match="noise_std: expected one sigma per hidden parameter"):
        fit(Module(toy_mlp()), toy_data(40), callback(noise_std={"head": 1e-3}))
