"""What callbacks are told, and what they can and cannot do."""

import pytest
import torch

import twophase_ext as tp
from helpers import quiet, toy_data, toy_mlp


class Recorder(tp.Callback):
    def __init__(self):
        self.told = []

    def on_fit_start(self, run):
        self.told.append(("on_fit_start", run.epoch, run.phase, run.hidden_hash))

    def on_perturb(self, run):
        self.told.append(("on_perturb", run.epoch, run.phase, run.verdict))
        assert run.hidden_hash is not None

    def on_epoch_end(self, run, record):
        self.told.append(("on_epoch_end", run.epoch, record["phase"], record["epoch"]))
        assert run.history[-1] == record


def test_events_in_their_order():
    recorder = Recorder()
    quiet(toy_mlp(), epochs=3, tau=1, callbacks=[recorder]).fit(toy_data())
    assert recorder.told == [
        ("on_fit_start", 0, 1, None),
        ("on_epoch_end", 1, 1, 0),
        ("on_perturb", 1, 2, None),
        ("on_epoch_end", 2, 2, 1),
        ("on_epoch_end", 3, 2, 2),
    ]


def test_nothing_of_a_run_can_be_replaced():
    refused = []

    class Replace(tp.Callback):
        def on_epoch_end(self, run, record):
            for name in ("epoch", "optimizer", "history", "anything"):
                with pytest.raises(AttributeError, match=f"run.{name}: a callback sees the run"):
                    setattr(run, name, 7)
                refused.append(name)
            run.history.clear()  # a copy

    result = quiet(toy_mlp(), epochs=2, tau=1, callbacks=[Replace()]).fit(toy_data())
    assert len(refused) == 8 and len(result.history) == 2


def test_the_view_shows_the_run():
    seen = {}

    class Look(tp.Callback):
        def on_perturb(self, run):
            seen.update({name: getattr(run, name) for name in dir(run) if name[0] != "_"})

    model, (x, y) = toy_mlp(), toy_data()
    quiet(model, epochs=2, tau=1, callbacks=[Look()]).fit((x, y), (x[:5], y[:5]))
    assert seen["network"].model is model and seen["config"].epochs == 2
    assert seen["device"] == torch.device("cpu") and seen["ranks"].size == 1
    assert (seen["train"].n, seen["val"].n, seen["batch"], seen["folder"]) == (60, 5, 0, None)
    assert seen["identity"]()["n"] == 60


def test_a_misspelt_event_is_warned_of():
    class Misspelt(tp.Callback):
        def on_epoch_ends(self, run, record):
            raise AssertionError

    with pytest.warns(UserWarning, match=r"callbacks: no event calls Misspelt\.on_epoch_ends"):
        trainer = quiet(toy_mlp(), callbacks=[Misspelt()])
    trainer.fit(toy_data())


def test_any_object_serves():
    class Plain:
        ended = 0

        def on_epoch_end(self, run, record):
            self.ended += 1

    plain = Plain()
    quiet(toy_mlp(), epochs=3, tau=1, callbacks=[plain]).fit(toy_data())
    assert plain.ended == 3
