"""What callbacks are told, and what they can and cannot do."""

import pytest
import torch

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_data, toy_mlp


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


def at(event, epoch, change):
    """A callback that does this to the run at an event."""

    class Change(tp.Callback):
        pass

    def method(self, run, record=None):
        if record is None or record["epoch"] == epoch:
            change(run)

    setattr(Change, event, method)
    return Change()


def hook_on_the_last(run):
    run.network.last.module.register_forward_hook(lambda m, args, out: out * -20)


def hook_on_a_hidden(run):
    run.network.model[0].register_forward_hook(lambda m, args, out: out * 0 + 5)


@torch.no_grad()
def other_weights(run):
    run.network.last.module.weight.mul_(-20)


CHANGES = {
    "a hook on the last layer, at the start": ("on_fit_start", None, hook_on_the_last),
    "the same at tau": ("on_perturb", None, hook_on_the_last),
    "the same after the last epoch": ("on_epoch_end", 5, hook_on_the_last),
    "a hook on a hidden layer": ("on_epoch_end", 4, hook_on_a_hidden),
    "the same after the last epoch, hidden": ("on_epoch_end", 5, hook_on_a_hidden),
    "other weights": ("on_epoch_end", 4, other_weights),
    "other weights at the end": ("on_epoch_end", 5, other_weights),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("phase", ["gd", "sgd"])
def test_no_bound_of_another_model_than_the_one_left(kind, phase):
    x, y = toy_data()
    callback = at(*CHANGES[kind])
    settings = {"epochs": 6, "tau": 2, "second_phase": phase, "callbacks": [callback]}
    with pytest.warns(UserWarning, match="nothing is (cached and nothing )?claimed"):
        result = quiet(toy_mlp(), **settings).fit((x, y))
    assert result.status == "completed" and not result.guarantee.curve
    failed = [name for name, status, _ in result.guarantee.premises if status == "failed"]
    assert {"fixed features", "no other steps"} & set(failed)


def test_a_learning_rate_and_a_look_change_no_claim():
    class Look(tp.Callback):
        def on_epoch_end(self, run, record):
            for group in run.optimizer.param_groups:
                group["lr"] /= 2
            run.network.model(torch.randn(2, 5))

    for phase in ("gd", "sgd"):
        settings = {"epochs": 6, "tau": 2, "second_phase": phase, "callbacks": [Look()]}
        result = quiet(toy_mlp(), **settings).fit(toy_data())
        assert result.guarantee.curve and not result.guarantee.refuted


def test_lazy_hidden_layers_that_something_else_moves():
    @torch.no_grad()
    def zero(run):
        run.network.model[0].weight.zero_()

    for epoch in (3, 5):
        settings = {"epochs": 6, "tau": 2, "second_phase": "lazy", "verify": "svd"}
        callback = at("on_epoch_end", epoch, zero)
        with pytest.warns(UserWarning, match="nothing is claimed"):
            result = quiet(toy_mlp(), callbacks=[callback], **settings).fit(toy_data())
        premises = {name: status for name, status, _ in result.guarantee.premises}
        assert premises["rank preserved"] == "failed" and result.guarantee.bound is None


class Stop(tp.Callback):
    """Asks for the end in this epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_end(self, run, record):
        if record["epoch"] == self.epoch:
            run.stop("enough")


PHASES = ["base", "gd", "sgd", "agd", "lazy"]


@pytest.mark.parametrize(("phase", "epoch"), [("gd", 0), ("agd", 1), *((p, 3) for p in PHASES)])
def test_a_stopped_run_is_whole_and_goes_on(phase, epoch, tmp_path):
    settings = {"epochs": 5, "tau": 2, "second_phase": phase}
    settings["verify"] = "svd" if phase == "lazy" else False
    stopped = quiet(toy_mlp(), tmp_path, callbacks=[Stop(epoch)], **settings).fit(toy_data())
    assert (stopped.status, stopped.stopped) == ("stopped", "Stop: enough")
    assert len(stopped.history) == epoch + 1 and stopped.score(toy_data())["loss"] == (
        pytest.approx(stopped.final["train_loss"], rel=1e-6)
    )
    assert stopped.lead.count("Stopped (Stop: enough): ") == 1
    assert tp.load_run(tmp_path, toy_mlp()).stopped == "Stop: enough"
    rows = dict(row[:2] for row in getattr(stopped.guarantee, "premises", []))
    if epoch == 3 and phase != "lazy":
        assert rows["hidden layers frozen"] == "held"
    if epoch == 3 and phase in ("gd", "agd", "sgd"):
        curve = stopped.guarantee.curve
        assert curve and curve[-1]["loss"] <= curve[-1]["bound"]
        assert ("a number of steps that no draw decides" in rows) is (phase == "sgd")
    again = quiet(toy_mlp(), tmp_path, **settings).fit(toy_data(), resume=True)
    whole = quiet(toy_mlp(), **settings).fit(toy_data())
    assert again.status == "completed" and again.stopped is None
    assert same_bits(bits(again.model), bits(whole.model))


def test_an_end_that_is_there_anyway_is_no_stop():
    result = quiet(toy_mlp(), epochs=3, tau=1, callbacks=[Stop(2)]).fit(toy_data())
    assert result.status == "completed" and result.stopped is None


def test_last_weights_stay_where_a_watched_phase_is_stopped():
    settings = {"epochs": 9, "tau": 1, "second_phase": "agd", "agd": {"early_stopping": 8}}
    stopped = quiet(toy_mlp(), callbacks=[Stop(6)], **settings).fit(toy_data(), toy_data(9, seed=5))
    assert stopped.guarantee.curve[-1]["steps"] == max(
        row["steps"] for row in stopped.guarantee.curve
    )
    assert not any("weights kept" in note for note in stopped.guarantee.notes)
    assert stopped.history[-1]["val_loss"] == pytest.approx(stopped.final["val_loss"], rel=1e-6)
