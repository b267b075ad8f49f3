"""Resumption under optimizers with state, kills, schedulers, and of what must not be resumed."""

import os

import pytest
import torch

from helpers import bits, quiet, same_bits, toy_data, toy_mlp
from interrupts import End, Killed
from twophase_ext.training.persistence import checkpoint
from twophase_ext.training.phases import accelerated

OPTIMIZERS = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "dampening": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, dampening=0.3),
}


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_bits_under_any_optimizer(tmp_path, name, stop):
    data, settings = toy_data(40), {"epochs": 5, "tau": 3, "optimizer": OPTIMIZERS[name]}
    whole, again = toy_mlp(), toy_mlp(seed=4)
    quiet(whole, tmp_path / "whole", **settings).fit(data)
    quiet(toy_mlp(), tmp_path / "cut", callbacks=[End(stop)], **settings).fit(data)
    quiet(again, tmp_path / "cut", **settings).fit(data, resume=True)
    assert same_bits(bits(whole), bits(again))


class Rate:
    """A learning rate of its own for every epoch, set as a scheduler would."""

    def on_epoch_end(self, run, record) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = 0.05 / (record["epoch"] + 2)


def test_a_rate_set_by_a_callback_survives_a_kill(tmp_path):
    data, settings = toy_data(40), {"epochs": 6, "tau": 3}
    whole, again = toy_mlp(), toy_mlp(seed=4)
    quiet(whole, tmp_path / "whole", callbacks=[Rate()], **settings).fit(data)

    model = toy_mlp()
    trainer = quiet(model, tmp_path / "cut", callbacks=[Rate()], **settings)

    class Killer:
        def on_perturb(self, run) -> None:
            raise Killed  # nothing after the last checkpoint is written

    trainer.callbacks += (Killer(),)
    with pytest.raises(Killed):
        trainer.fit(data)
    result = quiet(again, tmp_path / "cut", callbacks=[Rate()], **settings).fit(data, resume=True)
    assert same_bits(bits(whole), bits(again)) and len(result.history) == 6


def test_a_kill_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    """Newest damaged, the one before good; killed in the next save: one good file must be read."""
    checkpoint.save(tmp_path, {"model": {}, "epoch": 1})
    checkpoint.save(tmp_path, {"model": {}, "epoch": 2})
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    own, done = os.replace, []

    def replace(source, target) -> None:
        if done == ["checkpoint.pt.new", "checkpoint.previous.pt"]:
            raise KeyboardInterrupt
        own(source, target)
        done.append(os.path.basename(target))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, {"model": {}, "epoch": 3})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)[0]["epoch"] == 3
    assert checkpoint.load(tmp_path / "checkpoint.pt")[0]["epoch"] == 3


def test_what_cannot_be_resumed_is_refused_before_anything_changes(tmp_path):
    data = toy_data(40)
    quiet(toy_mlp(), tmp_path / "run").fit(data)

    def refused(message, data=data, folder="run", resume=True, **settings):
        model = toy_mlp(seed=6)
        before = bits(model)
        with pytest.raises(ValueError, match=message):
            quiet(model, tmp_path / folder, **settings).fit(data, resume=resume)
        assert same_bits(before, bits(model))

    refused("resume: .*optimizer='SGD', this Trainer has 'Adam'", optimizer=torch.optim.Adam)
    refused("resume: .*n=40, .* 60", data=toy_data(60))
    two = lambda ps: torch.optim.SGD([{"params": ps[:2]}, {"params": ps[2:]}], lr=0.1)  # noqa: E731
    refused("resume: .*group", optimizer=two)
    state = checkpoint.load(tmp_path / "run")[0]
    state["model"]["0.bias"] += 1
    checkpoint.save(tmp_path / "run", state)
    refused("hidden layers do not match their hash")
    # a run of another folder must not be overwritten by the continuation
    quiet(toy_mlp(seed=1), tmp_path / "other").fit(data)
    kept = (tmp_path / "other" / "metrics.csv").read_text()
    quiet(toy_mlp(), tmp_path / "third").fit(data)
    refused("holds a run already", folder="other", resume=tmp_path / "third")
    assert (tmp_path / "other" / "metrics.csv").read_text() == kept


def test_a_checkpoint_continues_in_a_new_folder(tmp_path):
    data = toy_data(40)
    quiet(toy_mlp(), tmp_path / "old", callbacks=[End(1)]).fit(data)
    whole, again = toy_mlp(), toy_mlp(seed=2)
    quiet(whole).fit(data)
    quiet(again, tmp_path / "new").fit(data, resume=tmp_path / "old")
    assert same_bits(bits(whole), bits(again)) and (tmp_path / "new" / "metrics.csv").exists()


def test_ctrl_c_returns_without_a_pass_over_the_data(tmp_path):
    stop = End(1)
    result = quiet(toy_mlp(), tmp_path / "run", callbacks=[stop]).fit(toy_data())
    assert result.status == "interrupted" and result.final == {}
    assert "interrupted after 2 epochs" in str(result)


def test_ctrl_c_while_the_bound_is_made_keeps_the_run(tmp_path, monkeypatch):
    data, settings = toy_data(40), {"epochs": 4, "tau": 2, "second_phase": "agd"}
    whole, again = toy_mlp(), toy_mlp(seed=4)
    expected = quiet(whole, tmp_path / "whole", **settings).fit(data)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(accelerated, "accelerated_guarantee", stop)
        result = quiet(toy_mlp(), tmp_path / "cut", **settings).fit(data)
    assert result.status == "interrupted" and not result.guarantee.curve
    assert (tmp_path / "cut" / "result.json").exists()
    result = quiet(again, tmp_path / "cut", **settings).fit(data, resume=True)
    assert result.status == "completed" and same_bits(bits(whole), bits(again))
    assert result.guarantee.curve == expected.guarantee.curve
