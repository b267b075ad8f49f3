"""What a run prints off a terminal: a notebook, a log file."""

import itertools

import pytest

import twophase_ext as tp
from helpers import toy_data, toy_mlp
from interrupts import End
from twophase_ext.training.control import progress


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic in seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_ever_less_often(clock, capsys):
    shown = progress.Progress(True)
    with shown:
        shown.begin("epochs", 2000)
        for epoch in range(2000):  # of 10 seconds, 5 steps each
            shown.begin(f"epoch {epoch}", 5)
            for _ in range(5):
                clock[0] += 2
                shown.advance(f"epoch {epoch}")
            shown.end(f"epoch {epoch}")
            shown.advance("epochs", 1, "loss 0.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "epoch 0: 5 of 5, about 0 s left"
    assert lines[1] == "epochs: 1 of 2,000, loss 0.5, about 5.6 h left"
    assert 80 < len(lines) < 200


def test_a_stage_that_takes_long_is_told_within(clock, capsys):
    shown = progress.Progress(True)
    shown.begin("epoch 3", 100, 40)  # resumed there
    for _ in range(3):
        clock[0] += 6
        shown.advance("epoch 3")
    assert capsys.readouterr().out == "epoch 3: 42 of 100, about 348 s left\n".replace(
        "348 s", "6 min"
    )
    quiet = progress.Progress(False)
    quiet.begin("epochs", 3)
    for _ in range(3):
        clock[0] += 60
        quiet.advance("epochs", 1, "loss 1")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_tells_of_its_interruption(capsys, tmp_path, kept):
    folder = tmp_path / "run" if kept else False
    trainer = tp.Trainer(toy_mlp(), epochs=3, tau=1, run_dir=folder, callbacks=[End(0)])
    assert trainer.fit(toy_data()).status == "interrupted"
    how = f"fit(..., resume='{folder}') goes on" if kept else "without a run folder it cannot go on"
    assert f"epoch 1: interrupted; {how}\n" in capsys.readouterr().out


def test_a_run_tells_of_its_first_epoch(capsys, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks) * 1e-3)
    tp.Trainer(toy_mlp(), epochs=3, tau=1, verify=False, run_dir=False).fit(toy_data())
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epochs: ")]
    assert len(found) == 1 and found[0].startswith("epochs: 1 of 3, loss ")
