"""Worker processes of a DataLoader: the bits of a run without them, whatever becomes of them."""

import multiprocessing
import os
import signal
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler, get_worker_info

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_data, toy_mlp

X, Y = toy_data(64)


class Noisy(Dataset):
    """Transforms at random; counts the fetches of this process."""

    def __init__(self, noise=0.1):
        self.noise, self.count = noise, Counter()

    def __len__(self):
        return 64

    def __getitem__(self, i):
        self.count[i] += 1
        return X[i] + self.noise * torch.randn(5), Y[i]


class Dies(Noisy):
    """Kills the worker that is asked for its last sample but one."""

    def __getitem__(self, i):
        if i == 62 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


class SignalsWorkers(tp.Callback):
    """What Ctrl-C and a batch system send to the whole group, here to the workers alone."""

    def __init__(self):
        self.told = 0

    def on_epoch_end(self, run, record):
        for worker in multiprocessing.active_children() if record["epoch"] == 0 else ():
            self.told += 1
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)


def finds_its_dataset(worker):
    if type(get_worker_info().dataset) is not Noisy:
        raise TypeError("the dataset is another one")


def trained(data, workers=0, callbacks=(), **settings):
    model = nn.Sequential(*toy_mlp(), nn.Identity())
    model[1] = nn.Sequential(model[1], nn.Dropout(0.1))
    loader = DataLoader(data, batch_size=8, num_workers=workers, **settings)
    return quiet(model, epochs=3, tau=2, callbacks=callbacks).fit(loader, loader)


@pytest.mark.parametrize("noise", [0.1, 0.0])
def test_workers_fetch_and_change_no_bit(noise):
    alone, data, told = trained(Noisy(noise)), Noisy(noise), SignalsWorkers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = {"workers": 2, "worker_init_fn": finds_its_dataset, "callbacks": [told]}
        found = trained(data, **settings)
    assert same_bits(bits(found.model), bits(alone.model)) and found.final == alone.final
    assert told.told == 4  # two of training, two of validation
    # a few are looked at before: of both sets 8, and the first 2 for the shapes
    assert sum(data.count.values()) <= 32 and not multiprocessing.active_children()


def test_a_weighted_sampler_over_text_labels_by_workers():
    """The bits of (x, text, weights) in memory: weights of the samples times the sampler's."""
    drawn = torch.rand(64, generator=torch.Generator().manual_seed(1)).double() + 0.1
    own = 2.0 ** (torch.arange(64) % 3)  # exact products
    names = np.array(["ash", "elm", "oak"])

    def loader(labels):
        samples = [(X[i], labels[i], own[i]) for i in range(64)]
        return DataLoader(samples, 8, sampler=WeightedRandomSampler(drawn, 9), num_workers=2)

    rows, model, other = [], toy_mlp(), toy_mlp()
    settings = {"metrics": {"share": lambda q, y: (q.argmax(1) == y).float().mean()}}

    def log(values, step):
        rows.append({**values, "workers": len(multiprocessing.active_children())})

    arrays = (X, names[Y], drawn * own)
    truth = quiet(other, **settings).fit(arrays, arrays)
    found = quiet(model, logger=SimpleNamespace(log=log), **settings).fit(loader(Y), loader(Y))
    assert same_bits(bits(model), bits(other)) and found.final == truth.final
    assert found.minimum.floor == truth.minimum.floor and truth.classes == tuple(names)
    assert rows[0]["workers"] == 4  # two of training, two of validation
    assert [row["val_share"] for row in rows if "seconds" in row] == [
        row["val_share"] for row in truth.history
    ]
    # a proof asks for no label; a fit has to know the classes before the last sample
    verdict = tp.verify_expressivity(toy_mlp(), loader(names[Y]))
    assert verdict.hashes == tp.verify_expressivity(toy_mlp(), X).hashes
    with pytest.raises(TypeError, match=r"^train: labels that are text .* let the dataset give"):
        quiet(toy_mlp()).fit(loader(names[Y]))
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_costs_no_run():
    alone = trained(Noisy())
    with pytest.warns(UserWarning, match=r"train: a worker .* failed.*exited unexpectedly"):
        found = trained(Dies(), workers=1)
    assert same_bits(bits(found.model), bits(alone.model))
    assert not multiprocessing.active_children()


def test_an_error_of_the_dataset_is_its_own():
    class Damaged(Noisy):
        def __getitem__(self, i):
            if i == 3:
                raise OSError("sample 3 is damaged")
            return super().__getitem__(i)

    with (
        pytest.warns(UserWarning, match="in this process: OSError: sample 3 is damaged"),
        pytest.raises(OSError, match=r"^sample 3 is damaged$"),
    ):
        trained(Damaged(), workers=1)
    assert not multiprocessing.active_children()


def test_arguments_that_change_nothing_are_said(capsys):
    trainer = tp.Trainer(toy_mlp(), epochs=2, tau=1, verify=False, run_dir=False)
    tensors = torch.utils.data.TensorDataset(X, Y)
    trainer.fit(
        DataLoader(tensors, 8, drop_last=True, num_workers=2), DataLoader(tensors, 8, shuffle=True)
    )
    said = [line for line in capsys.readouterr().out.splitlines() if "not used" in line]
    assert said == [
        "train: not used of the DataLoader: shuffle=False (training shuffles, by the Trainer's "
        "seed); drop_last=True (no sample is dropped); num_workers=2 (its tensors are in memory "
        "already)"
    ]
