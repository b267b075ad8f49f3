"""Several processes that are stopped or die, and go on as another number of processes."""

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers import toy_mlp
from interrupts import End
from processes import assert_same, data, fit, results, start


class Signal:
    """A signal to one rank, as it first meets the others at a step."""

    def __init__(self, rank, epoch, batch, number):
        self.rank, self.at, self.number = rank, (epoch, batch), number

    def on_fit_start(self, run):
        steps = run.ranks.all_reduce_

        def sum_(tensor):
            if run.ranks.rank == self.rank and (run.epoch, run.batch) == self.at:
                os.kill(os.getpid(), self.number)
                self.at = None
            return steps(tensor)

        run.ranks.all_reduce_ = sum_


@pytest.mark.parametrize(
    ("at", "reached", "number"),
    [((0, 3), (0, 3), signal.SIGINT), ((2, 0), (2, 8), signal.SIGTERM)],
)
def test_one_rank_told_to_stop_stops_all_and_other_numbers_go_on(tmp_path, at, reached, number):
    given, folder, settings = data(), tmp_path / "run", {"batch_size": 4}
    one = fit(toy_mlp, given, **settings)
    stop = [Signal(1, *at, number)]
    cut = results(
        2, tmp_path / "2", lambda: fit(toy_mlp, given, folder, callbacks=stop, **settings)
    )
    assert [found["status"] for found in cut] == ["interrupted"] * 2
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["batch"]) == reached

    def go_on(callbacks=()):
        model = partial(toy_mlp, seed=5)
        return fit(model, given, folder, resume=True, callbacks=callbacks, **settings)

    assert go_on([End(2)])["status"] == "interrupted"  # in this process alone
    assert_same(one | {"run_dir": folder}, results(4, tmp_path / "4", go_on))


@pytest.mark.slow
@pytest.mark.parametrize(("at", "number"), [((1, 2), signal.SIGKILL), ((3, 2), signal.SIGSTOP)])
def test_a_lost_rank_ends_the_run_and_it_resumes(tmp_path, at, number):
    given, folder = data(), tmp_path / "run"
    lost = Signal(1, *at, number)
    settings = {"checkpoint_every": "1 step"}
    processes = start(
        2,
        tmp_path / "2",
        lambda: fit(toy_mlp, given, folder, callbacks=[lost], **settings),
        timeout=6 if number == signal.SIGSTOP else 300,
    )
    for process in processes:
        process.start()
    processes[0].join(300)
    assert processes[0].exitcode is not None
    processes[1].kill()
    processes[1].join()
    error = torch.load(tmp_path / "2" / "rank0.pt", weights_only=False)
    assert isinstance(error, RuntimeError)
    assert re.match(
        rf"epoch {at[0]}, step {at[1]}: another process ended or hung \(seen by rank 0 of 2: .+\)\."
        " Start again with resume=True, with any number of processes",
        str(error),
    )
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["batch"]) == (at[0], at[1] - 1)  # the last that all had made
    one = fit(toy_mlp, given, **settings)
    assert_same(one, [fit(toy_mlp, given, folder, resume=True, **settings)])


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The Trainer joins by itself; a killed process ends all with the cause told."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    killed = subprocess.run(
        [*command, "2", str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert killed.returncode != 0
    assert "epoch 2, step 0: another process ended or hung (seen by rank 0 of 2" in killed.stderr
    given = data()
    assert_same(fit(toy_mlp, given), [fit(toy_mlp, given, tmp_path / "run", resume=True)])


TRAIN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from helpers import toy_mlp
from processes import data, fit
from test_ranks_lost import Signal

fit(toy_mlp, data(), "run", callbacks=[Signal(1, 2, 0, signal.SIGKILL)])
"""
