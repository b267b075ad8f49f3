"""Checkpoints: exact resumption, damage, strangers, Ctrl-C."""

import json
import signal

import pytest
import torch

from helpers import bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from interrupts import End

SETTINGS = {"epochs": 6, "tau": 3}


def uninterrupted(tmp_path, build, data):
    model = build()
    result = quiet(model, tmp_path / "whole", **SETTINGS).fit(data)
    return bits(model), result


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
def test_resumed_at_an_epoch_boundary_ends_with_the_same_bits(tmp_path, stop):
    data = toy_images(33)
    whole, reference = uninterrupted(tmp_path, toy_convnet, data)
    folder = tmp_path / "cut"
    first = quiet(toy_convnet(), folder, callbacks=[End(stop)], **SETTINGS).fit(data)
    assert first.status == "interrupted" and len(first.history) == stop + 1
    model = toy_convnet(seed=9)  # its own weights must not matter
    second = quiet(model, folder, **SETTINGS).fit(data, resume=True)
    assert second.status == "completed"
    assert same_bits(whole, bits(model))
    losses = [row["train_loss"] for row in second.history]
    assert losses == [row["train_loss"] for row in reference.history]
    assert second.final == reference.final


@pytest.mark.parametrize("epoch", [1, 4])
def test_resumed_within_an_epoch_ends_with_the_same_bits(tmp_path, epoch):
    data = toy_images(33)  # dropout draws from the random state that is saved
    build = toy_convnet
    settings = {**SETTINGS, "feature_cache": "none"}
    model = build()
    reference = quiet(model, tmp_path / "whole", **settings).fit(data)
    whole = bits(model)
    folder = tmp_path / "cut"
    first = quiet(build(), folder, callbacks=[End(epoch, 2)], **settings).fit(data)
    assert first.status == "interrupted" and len(first.history) == epoch
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["batch"]) == (epoch, 3)
    model = build(seed=9)
    second = quiet(model, tmp_path / "cut", **settings).fit(data, resume=folder)
    assert same_bits(whole, bits(model))
    assert [r["train_loss"] for r in second.history] == [r["train_loss"] for r in reference.history]


def test_second_phase_resumes_with_every_cache(tmp_path):
    data = toy_data(40)
    for cache in ("hidden", "backbone"):
        model = toy_mlp()
        quiet(model, tmp_path / f"{cache}-whole", feature_cache=cache, **SETTINGS).fit(data)
        folder = tmp_path / cache
        stop = [End(4)]
        quiet(toy_mlp(), folder, feature_cache=cache, callbacks=stop, **SETTINGS).fit(data)
        other = toy_mlp(seed=3)
        quiet(other, folder, feature_cache=cache, **SETTINGS).fit(data, resume=True)
        assert same_bits(bits(model), bits(other))


def test_a_finished_run_resumes_to_its_result(tmp_path):
    data = toy_data()
    model = toy_mlp()
    first = quiet(model, tmp_path / "run").fit(data)
    other = toy_mlp(seed=4)
    again = quiet(other, tmp_path / "run").fit(data, resume=True)
    assert same_bits(bits(model), bits(other))
    assert again.final == pytest.approx(first.final, rel=1e-6)


@pytest.mark.parametrize("phase", ["base", "gd", "sgd", "agd"])
def test_more_epochs_over_a_finished_run(tmp_path, phase):
    """The bits of a run that was asked for them at once; its folder tells of them."""
    data, settings = toy_data(), {"second_phase": phase, "tau": 2}
    whole = toy_mlp()
    expected = quiet(whole, tmp_path / "whole", epochs=7, **settings).fit(data, data)
    quiet(toy_mlp(), tmp_path / "run", epochs=4, **settings).fit(data, data)
    model = toy_mlp(seed=4)
    found = quiet(model, tmp_path / "run", epochs=7, **settings).fit(data, data, resume=True)
    assert same_bits(bits(model), bits(whole))
    assert [row["epoch"] for row in found.history] == list(range(7))
    assert found.final == pytest.approx(expected.final, rel=1e-9)
    for name in ("config.json", "result.json"):
        kept = json.loads((tmp_path / "run" / name).read_text("utf-8"))
        assert kept.get("epochs", 7) == 7 and kept.get("epochs_done", 7) == 7
    fewer = quiet(toy_mlp(), tmp_path / "run", epochs=5, **settings)
    with pytest.raises(ValueError, match="epochs: 7 are done, expected 7 or more, got 5"):
        fewer.fit(data, data, resume=True)
    with pytest.raises(ValueError, match="for other epochs after the same tau pass tau=2"):
        quiet(toy_mlp(), tmp_path / "run", epochs=20, second_phase=phase).fit(
            data, data, resume=True
        )


def test_no_more_epochs_where_the_last_weights_are_gone(tmp_path):
    data, held_out = toy_data(), toy_data(seed=9)
    settings = {"second_phase": "agd", "tau": 1, "agd": {"early_stopping": 50}}
    result = quiet(toy_mlp(), tmp_path, epochs=12, **settings).fit(data, held_out)
    assert min(result.history[1:], key=lambda row: row["val_loss"])["epoch"] < 11
    again = quiet(toy_mlp(), tmp_path, epochs=14, **settings)
    with pytest.raises(ValueError, match=r"kept the weights of epoch \d+ .early_stopping"):
        again.fit(data, held_out, resume=True)


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    data = toy_data()
    folder = tmp_path / "run"
    model = toy_mlp()
    quiet(model, folder).fit(data)
    path = folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    other = toy_mlp(seed=4)
    with pytest.warns(UserWarning, match=r"Using checkpoint.previous.pt, 3 epochs done"):
        quiet(other, folder).fit(data, resume=True)
    assert same_bits(bits(model), bits(other))
    (folder / "checkpoint.previous.pt").unlink()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        quiet(toy_mlp(), folder).fit(data, resume=True)


def test_foreign_checkpoints_are_refused(tmp_path):
    data = toy_data()
    folder = tmp_path / "run"
    quiet(toy_mlp(), folder).fit(data)
    with pytest.raises(ValueError, match=r"another model.*2.weight: expected .*\[70, 16\]"):
        quiet(toy_mlp(width=70), folder).fit(data, resume=True)
    with pytest.raises(ValueError, match=r"made with seed=1, this Trainer has 2"):
        quiet(toy_mlp(), folder, seed=2).fit(data, resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        quiet(toy_mlp()).fit(data, resume=tmp_path / "nowhere")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a checkpoint of twophase_ext"):
        quiet(toy_mlp()).fit(data, resume=tmp_path / "other.pt")
    with pytest.raises(ValueError, match="resume: True needs run_dir"):
        quiet(toy_mlp()).fit(data, resume=True)


def test_a_run_is_not_overwritten(tmp_path):
    data = toy_data()
    quiet(toy_mlp(), tmp_path / "run").fit(data)
    with pytest.raises(ValueError, match="holds a run already; pass resume=True"):
        quiet(toy_mlp(), tmp_path / "run").fit(data)


def test_checkpoint_holds_no_code(tmp_path):
    quiet(toy_mlp(), tmp_path / "run").fit(toy_data())
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        state = torch.load(tmp_path / "run" / name, weights_only=True)
        assert not any("_orig_mod" in key or "module." in key for key in state["model"])


@pytest.fixture
def ctrl_c():
    """Python's own handler: a shell's background jobs start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_ctrl_c_is_not_swallowed(tmp_path, ctrl_c):
    class Twice(End):
        def on_epoch_end(self, run, record) -> None:
            super().on_epoch_end(run, record)
            super().on_epoch_end(run, record)

    with pytest.raises(KeyboardInterrupt):
        quiet(toy_mlp(), tmp_path / "run", callbacks=[Twice(0)]).fit(toy_data())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
