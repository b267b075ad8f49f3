"""Runs of the Trainer have the same bits: again, resumed, in every second phase and cache."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from determinism_cases import PHASES, SETTINGS, reference, trained
from helpers import bits, quiet, same_bits, toy_convnet, toy_images
from interrupts import End
from twophase_ext.expressivity import methods
from twophase_ext.training.phases import Phase, SecondPhase

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["none", "lazy", "base hidden", "gd backbone", "sgd none"])
def test_the_same_run_again(name):
    weights, history, result = reference(name)
    with torch.random.fork_rng():
        torch.manual_seed(5)  # what the caller's generator holds must not enter
        again = trained(name)
    assert same_bits(weights, again[0])
    assert (history, result.final) == (again[1], again[2].final)
    assert getattr(result.guarantee, "curve", None) == getattr(again[2].guarantee, "curve", None)


@pytest.mark.parametrize("name", PHASES)
def test_resumed_in_every_phase_and_cache(tmp_path, name):
    weights, history, result = reference(name)
    trained(name, tmp_path, callbacks=[End(1)])
    resumed = trained(name, tmp_path, seed=7, resume=True)
    assert same_bits(weights, resumed[0]) and history == resumed[1]
    curves = [getattr(r.guarantee, "curve", None) for r in (result, resumed[2])]
    assert curves[0] == curves[1]


class Jitter(TensorDataset):
    """Inputs with new noise at every visit, of all three generators."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + 0.01 * torch.randn(x.shape) + 0.01 * float(np.random.randn()), y


# (epoch that ends with Ctrl-C: 0 in the first phase, 1 in the second; settings)
KINDS = {
    "random data set": (0, {}),
    "random data set, second phase": (1, {}),
    "copies": (1, {"augment_copies": 2}),
    "augment": (0, {"augment": lambda x, g: x + 0.01 * torch.randn(x.shape, generator=g)}),
    "batch statistics": (1, {"batch_norm": "batch"}),
    "accumulate": (0, {"accumulate": 2}),
    "autocast": (0, {"precision": "bf16-mixed"}),
    "scheduler": (1, {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_with_every_other_setting(tmp_path, kind):
    (stop, settings), data = KINDS[kind], toy_images(33)
    if kind.startswith(("random", "copies")):
        data = Jitter(*data)
    whole, again = toy_convnet(), toy_convnet(seed=7)
    quiet(whole, **SETTINGS, **settings).fit(data)
    stopped = quiet(toy_convnet(), tmp_path, callbacks=[End(stop)], **SETTINGS, **settings)
    assert stopped.fit(data).status == "interrupted"
    state = np.random.get_state()
    np.random.seed(9)  # what the caller's generator holds must not enter
    quiet(again, tmp_path, **SETTINGS, **settings).fit(data, resume=True)
    np.random.set_state(state)
    assert same_bits(bits(whole), bits(again))


@pytest.mark.parametrize("cache", ["hidden", "disk", "hidden-bfloat16"])
@pytest.mark.parametrize("mode", ["base", "gd", "sgd"])
def test_threads_of_the_second_phase_over_cached_features(mode, cache, monkeypatch):
    """From the same features, made by one thread."""
    expected = reference(f"{mode} {cache}")[0]

    def three_threads(phase, interrupt):
        torch.set_num_threads(3)
        done = Phase.train_epoch(phase, interrupt)
        torch.set_num_threads(1)
        return done

    monkeypatch.setattr(SecondPhase, "train_epoch", three_threads)
    assert same_bits(expected, trained(f"{mode} {cache}")[0])


def test_phase_one_does_not_depend_on_what_comes_later():
    """Noise, second phase, cache, verification: the first epochs have the same bits."""
    first = reference("none")[1][:1]
    assert all(reference(name)[1][:1] == first for name in PHASES)
    assert trained("base hidden", verify="auto", noise_std=0.1)[1][:1] == first


def test_the_lazy_phase_verifies_by_size_alone(monkeypatch):
    """What it verifies decides about its steps: neither speed nor free memory may choose."""
    first = trained("lazy", verify="auto")
    monkeypatch.setattr(methods, "available_memory", lambda device: 0)
    monkeypatch.setattr(methods, "float64_rate", lambda device: 1.0)
    again = trained("lazy", verify="auto")
    assert same_bits(first[0], again[0]) and first[1] == again[1]
    assert first[2].verdict.method == again[2].verdict.method == "svd"
