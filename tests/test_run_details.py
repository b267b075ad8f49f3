"""Details of a run that a claim rests on; each test fails where the one it names is left out."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import twophase_ext as tp
from helpers import quiet, toy_data, toy_mlp
from twophase_ext.core.files import write_atomically
from twophase_ext.training.features.cache import plan_cache

N = 40


def test_no_gradient_of_a_hidden_layer_is_left_at_tau():
    class Look:
        def on_perturb(self, run):
            hidden = run.network.hidden_parameters()
            seen.append([name for name, p in hidden.items() if p.grad is not None])

    seen = []
    quiet(toy_mlp(), callbacks=[Look()]).fit(toy_data())
    assert seen == [[]]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def flushed(descriptor):
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        calls.append(kind)
        fsync(descriptor)

    def renamed(old, new):
        calls.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
    assert calls == ["file", "rename", "folder"]


def test_each_branch_is_verified_as_it_asks():
    trainer = tp.Trainer(toy_mlp(), epochs=3, tau=2, run_dir=False, progress=False)
    methods = {"count": {"verify": "svd"}, "separate": {"verify": "separation"}}
    found = trainer.branch(methods, toy_data())
    assert {name: r.verdict.method for name, r in found.items()} == {
        "count": "svd",
        "separate": "separation",
    }


class Shaken(Dataset):
    """Inputs that change from visit to visit."""

    def __init__(self):
        self.x, self.y = toy_data(N)

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.x[i] + 0.5 * torch.randn(5), self.y[i]


def test_each_epoch_reads_its_own_augmented_copy():
    class Look:
        def on_epoch_end(self, run, record):
            if record["phase"] == 2:
                held = run._run.train_features
                first = held.batch(torch.arange(N))[0]
                rows = slice(held.copy * N, (held.copy + 1) * N)
                seen.append((held.copy, torch.equal(first, held.stored.rows[rows])))
                copies.append(first)

    seen, copies = [], []
    quiet(toy_mlp(), epochs=4, tau=1, augment_copies=3, callbacks=[Look()]).fit(Shaken())
    assert seen == [(1, True), (2, True), (0, True)]
    assert not torch.equal(copies[0], copies[1]) and not torch.equal(copies[1], copies[2])


def test_the_loss_of_a_stochastic_epoch_is_a_mean_over_its_draws():
    """17 samples in batches of 16: two steps draw 32."""
    settings = {"second_phase": "sgd", "sgd": {"c": 1e-12}, "precision": "float64"}
    result = quiet(toy_mlp(), epochs=3, tau=2, batch_size=16, **settings).fit(toy_data(17))
    model, (x, y) = result.model.eval(), toy_data(17)
    each = F.cross_entropy(model(x.double()), y, reduction="none").detach()
    drawn = result.history[-1]["train_loss"]  # of weights that hardly move
    assert float(each.min()) < drawn < float(each.max())
    assert drawn == pytest.approx(result.final["train_loss"], rel=0.35)


def test_the_cache_takes_the_share_of_memory_that_is_said():
    sizes = {"n": 1000, "width": 1100, "backbone_width": 64, "itemsize": 4, "disk": 10**9}
    more = {"random": False, "moving": None}
    enough = int(1000 * 1100 * 4 / 0.6)
    backbone = int(1000 * 64 * 4 / 0.6)

    def mode(available, disk=10**9):
        return plan_cache("auto", available=available, **{**sizes, "disk": disk}, **more).mode

    assert mode(enough + 8) == "hidden" and mode(enough - 8) == "backbone"
    assert mode(backbone + 8) == "backbone" and mode(backbone - 8) == "disk"
    assert mode(1000, disk=enough - 8) == "none" and mode(1000, disk=0) == "none"


def test_accuracy_of_the_second_phase_is_that_of_the_epoch_s_end():
    result = quiet(toy_mlp(), epochs=6, tau=3).fit(toy_data())
    x, y = toy_data()
    right = (result.model.eval()(x).argmax(1) == y).double().mean()
    assert result.history[-1]["train_accuracy"] == result.final["train_accuracy"]
    assert result.final["train_accuracy"] == pytest.approx(float(right)) and right > 0.3


def test_validation_is_of_the_network_and_not_of_rounded_features():
    model, (x, y) = toy_mlp(), toy_data(23, seed=1)
    result = quiet(model, feature_cache="hidden-bfloat16").fit(toy_data(), (x, y))
    loss = float(F.cross_entropy(model.eval()(x), y).detach())
    assert result.history[-1]["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert result.final["val_loss"] == pytest.approx(loss, rel=1e-6)
