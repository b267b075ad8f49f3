"""Faults in the numbers and on the disk: what is named, what is kept, what goes on."""

import json
import os
import resource

import pytest
import torch
from torch.utils.data import Dataset

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_data, toy_mlp
from twophase_ext.core.seeds import epoch_order
from twophase_ext.training import faults
from twophase_ext.training.features.cache import Features
from twophase_ext.training.persistence import checkpoint

SGD = dict(optimizer=lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9))


class At:
    """Does something at the end of an epoch."""

    def __init__(self, epoch: int, act) -> None:
        self.epoch, self.act = epoch, act

    def on_epoch_end(self, run, record) -> None:
        if record["epoch"] == self.epoch:
            self.act(run)


def rate(value: float):
    def act(run) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = value

    return act


def batch_of(epoch: int, step: int, n: int = 60, size: int = 8) -> list[int]:
    return epoch_order(1, epoch, n)[step * size : (step + 1) * size].tolist()


# --- a loss that is not finite ---------------------------------------------------------------


@pytest.mark.parametrize("phase", [1, 2])
def test_a_divergence_names_its_step_and_samples(tmp_path, phase):
    """The weights break at the first step of the epoch; the next loss shows it."""
    said = []
    settings = {"epochs": 6, "tau": 1 if phase == 2 else 5, **SGD}
    trainer = quiet(toy_mlp(), tmp_path, callbacks=[At(2, rate(1e38))], **settings)
    trainer.callbacks += (
        At(2, lambda run: setattr(run._run.context.progress, "say", said.append)),
    )
    result = trainer.fit(toy_data())
    assert result.status == "diverged" and result.final == {}
    found = result.divergence
    assert found["epoch"] == 3 and found["step"] >= 1 and found["loss"] in ("nan", "inf")
    assert found["samples"] == batch_of(3, found["step"]) and found["inputs_not_finite"] == []
    assert len(result.history) == 4 and not result.history[-1]["train_loss"] < 1e30
    assert f"epoch 3, step {found['step']} (samples [{found['samples'][0]}, " in said[-1]
    assert json.loads((tmp_path / "result.json").read_text())["divergence"] == found
    kept = checkpoint.load(tmp_path)[0]
    assert kept["epoch"] == 3 and all(t.isfinite().all() for t in kept["model"].values())


def test_no_checkpoint_is_promised_where_there_is_none(tmp_path):
    said = []

    class Listen:
        def on_fit_start(self, run) -> None:
            run._run.context.progress.say = said.append

    x, y = toy_data()
    settings = {"optimizer": lambda ps: torch.optim.SGD(ps, lr=1e38), "callbacks": [Listen()]}
    result = quiet(toy_mlp(), tmp_path, **settings).fit((x * 1e15, y))
    assert result.status == "diverged" and result.divergence["epoch"] == 0
    assert "stopped. Lower" in said[-1] and not checkpoint.exists(tmp_path)


def test_on_an_accelerator_the_first_bad_step_is_found_later(monkeypatch):
    own = faults.LossWatch.__init__

    def late(self, device) -> None:
        own(self, device)
        self.every = 64

    monkeypatch.setattr(faults.LossWatch, "__init__", late)
    callbacks = [At(1, rate(1e38))]
    found = quiet(toy_mlp(), epochs=6, tau=5, callbacks=callbacks, **SGD).fit(toy_data()).divergence
    monkeypatch.undo()
    now = quiet(toy_mlp(), epochs=6, tau=5, callbacks=callbacks, **SGD).fit(toy_data()).divergence
    assert found == now and found["samples"] == batch_of(2, found["step"])


def test_no_broken_weights_are_saved_within_an_epoch(tmp_path):
    callbacks = [At(1, rate(1e38))]
    settings = {"epochs": 6, "tau": 5, "checkpoint_every": "1 step", **SGD}
    result = quiet(toy_mlp(), tmp_path, callbacks=callbacks, **settings).fit(toy_data())
    assert result.status == "diverged"
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        kept = checkpoint._read(tmp_path / name)
        assert all(t.isfinite().all() for t in kept["model"].values())


class Spoils:
    """A transform that makes one sample NaN from an epoch on."""

    def __init__(self, x, sample: int) -> None:
        self.row, self.calls = x[sample], 0

    def __call__(self, x, generator):
        self.calls += 1
        x = x.clone()
        if self.calls > 12:  # within the second epoch of 8 batches
            x[(x == self.row).all(1)] = float("nan")
        return x

    def __repr__(self) -> str:
        return "Spoils"


def test_a_sample_that_augmentation_breaks_is_named():
    x, y = toy_data()
    order = epoch_order(1, 1, 60).tolist()
    sample = order[50]  # in the seventh batch of the second epoch
    result = quiet(toy_mlp(), augment=Spoils(x, sample), **SGD).fit((x, y))
    assert result.status == "diverged"
    assert result.divergence["inputs_not_finite"] == [sample]
    assert (result.divergence["epoch"], result.divergence["step"]) == (1, 6)


class Transformed(Dataset):
    """A dataset whose transform breaks a sample at its third visit or later."""

    def __init__(self, x, y, sample: int) -> None:
        self.x, self.y, self.sample, self.visits = x, y, sample, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i):
        x = self.x[i] + 0.01 * torch.randn(5)
        if i == self.sample:
            self.visits += 1
            if self.visits > 4:
                x[0] = float("inf")
        return x, self.y[i]


def test_a_dataset_that_breaks_a_sample_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"train: .*17"):
        quiet(toy_mlp(), tmp_path, **SGD).fit(Transformed(*toy_data(), sample=17))
    assert all(t.isfinite().all() for t in checkpoint.load(tmp_path)[0]["model"].values())


# --- a condition that fails at tau -----------------------------------------------------------


def test_a_deficient_condition_ends_the_claim_and_not_the_run():
    x, y = toy_data()
    model = toy_mlp(width=len(x) - 2)
    with pytest.warns(UserWarning, match="m_H >= N - 1 fails"):
        result = quiet(model, verify="auto", second_phase="gd", **SGD).fit((x, y))
    assert result.status == "completed" and result.verdict.status == "deficient"
    audit = {name: status for name, status, _ in result.guarantee.premises}
    assert audit["expressivity (Assumption 1)"] == "failed"


# --- memory that runs out --------------------------------------------------------------------

REFERENCE: dict[str, torch.Tensor] = {}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("m")])
@pytest.mark.parametrize(
    ("start", "failing", "mode"),
    [
        ("auto", ("hidden",), "backbone"),
        ("hidden", ("hidden", "backbone"), "disk"),
        ("backbone", ("hidden", "backbone", "disk"), "none"),
        ("hidden-bfloat16", ("hidden-bfloat16",), "backbone"),
    ],
)
def test_a_cache_without_memory_falls_back(monkeypatch, start, failing, mode, error):
    own = Features._empty

    def empty(self, rows):
        if self.mode in failing:
            raise error
        return own(self, rows)

    monkeypatch.setattr(Features, "_empty", empty)
    model, whole = toy_mlp(dtype=torch.float64), toy_mlp(dtype=torch.float64)
    settings = {"precision": "float64", **SGD}
    if start == "hidden-bfloat16":
        settings, model = SGD, toy_mlp()
    with pytest.warns(UserWarning, match=f"going on with '{mode}'"):
        result = quiet(model, feature_cache=start, **settings).fit(toy_data())
    assert result.status == "completed" and result.feature_cache == mode
    if start != "hidden-bfloat16":
        monkeypatch.undo()
        quiet(whole, feature_cache="hidden", **settings).fit(toy_data())
        for name, value in bits(whole).items():
            torch.testing.assert_close(bits(model)[name], value, rtol=1e-12, atol=1e-12)


def test_other_errors_while_caching_are_raised(monkeypatch):
    def empty(self, rows):
        raise RuntimeError("something else")

    monkeypatch.setattr(Features, "_empty", empty)
    with pytest.raises(RuntimeError, match="something else"):
        quiet(toy_mlp()).fit(toy_data())


# --- the disk --------------------------------------------------------------------------------


@pytest.fixture
def full_disk():
    """From the call on, no file grows beyond 4 KiB: the error of a full disk comes likewise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(tmp_path, full_disk):
    with pytest.raises(OSError, match="File too large") as caught:
        quiet(toy_mlp(), tmp_path, callbacks=[At(2, full_disk)]).fit(toy_data())
    assert "step 0 was not written; the one before it is whole" in caught.value.__notes__[0]
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.new"))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    whole, again = toy_mlp(), toy_mlp(seed=3)
    quiet(whole).fit(toy_data())
    quiet(again, tmp_path).fit(toy_data(), resume=True)
    assert same_bits(bits(whole), bits(again))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir: .*cannot be made"):
        quiet(toy_mlp(), tmp_path / "file" / "run").fit(toy_data())
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ValueError, match=r"run_dir: .*cannot be written"):
        quiet(toy_mlp(), tmp_path / "run").fit(toy_data())


@pytest.mark.parametrize("place", ["model", "optimizer", "history"])
def test_a_flipped_bit_is_noticed(tmp_path, place):
    """torch.load reads a changed weight without a word."""
    quiet(toy_mlp(), tmp_path, **SGD).fit(toy_data())
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    if place == "history":
        state["history"][0]["train_loss"] += 1e-12
    elif place == "model":
        state["model"]["4.bias"].view(torch.int32)[1] ^= 1
    else:
        kept = state["optimizer"]["state_dict"]["state"]["0.weight"]
        kept["momentum_buffer"].view(torch.int32)[0, 0] ^= 1
    torch.save(state, path)
    with pytest.warns(UserWarning, match=r"do not match its checksum\. Using checkpoint.previous"):
        assert checkpoint.load(tmp_path)[0]["epoch"] == 3


def test_flipped_and_cut_bytes_never_load_another_state(tmp_path):
    quiet(toy_mlp(width=64), tmp_path, **SGD).fit(toy_data())
    path, truth = tmp_path / "checkpoint.pt", checkpoint.load(tmp_path)[0]
    whole = path.read_bytes()
    (tmp_path / "checkpoint.previous.pt").unlink()
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        at, bit = (
            int(torch.randint(len(whole), (), generator=g)),
            int(torch.randint(8, (), generator=g)),
        )
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        for content in (bytes(damaged), whole[:at]):
            path.write_bytes(content)
            try:
                found = checkpoint.load(tmp_path)[0]
            except ValueError:
                continue
            assert checkpoint.digest(found) == checkpoint.digest(truth)  # a byte without meaning


# --- two runs in one folder ------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    refused = []

    def second(run) -> None:
        for resume in (True, None):
            with pytest.raises(ValueError, match="run_dir") as caught:
                quiet(toy_mlp(), tmp_path).fit(toy_data(), resume=resume)
            refused.append(str(caught.value))

    whole, again = toy_mlp(), toy_mlp()
    quiet(whole).fit(toy_data())
    quiet(again, tmp_path, callbacks=[At(1, second)]).fit(toy_data())
    assert "another run is writing into" in refused[0] and len(refused) == 2
    assert same_bits(bits(whole), bits(again))
    quiet(toy_mlp(), tmp_path).fit(toy_data(), resume=True)  # it has ended: free again


def test_a_run_that_fails_to_start_leaves_the_folder_free(tmp_path):
    quiet(toy_mlp(), tmp_path).fit(toy_data())
    kept = []  # with its traceback, as a notebook keeps it
    for _ in range(2):
        with pytest.raises(ValueError, match="made with seed=1") as caught:
            quiet(toy_mlp(), tmp_path, seed=2).fit(toy_data(), resume=True)
        kept.append(caught.value)
    quiet(toy_mlp(), tmp_path).fit(toy_data(), resume=True)


# --- cadence ---------------------------------------------------------------------------------


LAST = [(3, 1), (3, 4), (3, 7), (4, 0)]


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (None, [(1, 0), (2, 0), (2, 0), (3, 0), (4, 0)]),  # one at tau
        (2, [(2, 0), (2, 0), (4, 0)]),
        ("2 epochs", [(2, 0), (2, 0), (4, 0)]),
        ("3 steps", [*(divmod(3 * k, 8) for k in range(1, 6)), (2, 0), (2, 3), (2, 6), *LAST]),
        ("1 hour", [(2, 0), (4, 0)]),
    ],
)
@pytest.mark.parametrize("mode", ["base", "sgd"])
def test_checkpoints_come_when_they_are_due(tmp_path, monkeypatch, every, expected, mode):
    saved, own = [], checkpoint.save

    def save(folder, state) -> None:
        saved.append((state["epoch"], state["batch"]))
        own(folder, state)

    monkeypatch.setattr(checkpoint, "save", save)
    quiet(toy_mlp(), tmp_path, checkpoint_every=every, second_phase=mode).fit(toy_data())
    assert saved == expected


@pytest.mark.parametrize("every", ["", "5", "0 steps", "1.5 epochs", "-1 seconds", "3 days"])
def test_unusable_cadences_are_refused(every):
    with pytest.raises(ValueError, match="checkpoint_every: expected"):
        tp.Trainer(toy_mlp(), checkpoint_every=every)
