"""Runs killed by SIGKILL at chosen function calls, continued, and compared with a whole run.

python tests/kill_harness.py FOLDER [SEED]: one JSON line a kill, then a summary.

Each run is a fork of this process, which has started no thread. First the function calls of every
stage, of Python and C alike, are counted in the whole run; then "the k-th call of this stage",
drawn at random, is where the next run is killed. Repetitions have the same calls: the clock moves
by a millisecond whenever it is asked, and calls that wait for another process do not count. Should
a few differ (a loop over a set has the order of addresses), the kill is in its stage all the same.
"""

import csv
import itertools
import json
import os
import random
import selectors
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it: once, instead of in every fork

from helpers import quiet, toy_convnet, toy_images
from twophase_ext.core.hashing import tensors_hash

# Functions of the Trainer, and the stage that each is of; the innermost one counts.
STAGES = {
    "FirstPhase.epoch": "first",
    "LastLayer.epoch": "second",
    "GradientDescentPhase.epoch": "second",
    "StochasticPhase.epoch": "second",
    "_perturb": "perturb",
    "SecondPhase.fill_caches": "caches",
    "Loop._finish_epoch": "finish",
    "save": "save",
    "write": "write",
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "base": {"checkpoint_every": "2 steps"},
    "base, nothing cached": {"feature_cache": "none", "checkpoint_every": "3 steps"},
    # by the clock, but due at every step: the calls of a run do not depend on the machine's load
    "gd": {"second_phase": "gd", "gd": {"steps": 4}, "checkpoint_every": "0.000001 seconds"},
    "sgd": {"second_phase": "sgd", "checkpoint_every": 1},
}
KILLS = ("first", "second", "perturb", "write", "anywhere")  # in each scenario


WAITING = (subprocess.__file__, selectors.__file__)  # git is asked for the commit


def train(folder: Path, scenario: str) -> None:
    """Start the run in `folder`, or go on with it."""
    asked = itertools.count()
    time.monotonic = time.perf_counter = lambda: next(asked) / 1000
    data = toy_images(33)
    settings = {"epochs": 5, "tau": 3, "verify": "auto", **SCENARIOS[scenario]}
    quiet(toy_convnet(), folder, **settings).fit(data, data, resume="auto")


def outcome(folder: Path) -> dict[str, Any]:
    """What a finished run leaves, without its times."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    verdict = json.loads((folder / "verdict.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    for part in (*rows, verdict, result):
        for measured in ("seconds", "peak_bytes", "stages", "timings", "checksum"):
            part.pop(measured, None)
    momenta = {
        str(i): s["momentum_buffer"]
        for i, s in state["optimizer"]["state_dict"]["state"].items()
        if s.get("momentum_buffer") is not None
    }
    curve = folder / "guarantee.csv"
    return {
        "weights": tensors_hash(state["model"]),
        "momenta": tensors_hash(momenta),
        "metrics": rows,
        "verdict": verdict,
        "result": result,
        "guarantee": curve.read_text() if curve.exists() else None,
    }


class Calls:
    """Numbers function calls by stage; dies at call `at` of `stage`, where they are given."""

    def __init__(self, stage: str = "", at: int = -1) -> None:
        """Counting starts with the context."""
        self.end = stage, at
        self.count = 0
        self.stages: dict[str, list[int]] = {name: [] for name in (*STAGES.values(), "anywhere")}
        self._open: list[str] = []

    def _event(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if code.co_filename in WAITING:
            return
        stage = STAGES.get(code.co_qualname) or STAGES.get(code.co_name)
        if stage is not None and "twophase_ext/training" in code.co_filename:
            if event == "call":
                self._open.append(stage)
            elif event == "return":
                self._open.pop()
        if event in ("call", "c_call"):
            stage = self._open[-1] if self._open else "anywhere"
            if (stage, len(self.stages[stage])) == self.end:
                os.kill(os.getpid(), signal.SIGKILL)
            self.stages[stage].append(self.count)
            self.count += 1

    def __enter__(self) -> "Calls":
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a fork; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_calls(folder: Path, scenario: str) -> None:
    """A whole run, the calls of its stages written beside it."""
    with Calls() as calls:
        train(folder, scenario)
    (folder / "calls.json").write_text(json.dumps(calls.stages))


def die(folder: Path, scenario: str, stage: str, at: int) -> None:
    """A run that ends at call number `at` of a stage."""
    with Calls(stage, at):
        train(folder, scenario)


def main(root: Path, seed: int = 0) -> None:
    """All scenarios, all kills."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    draw = random.Random(seed)
    kills = same = 0
    for number, scenario in enumerate(SCENARIOS):
        whole = root / f"{number}-whole"
        assert forked(lambda f=whole, s=scenario: count_calls(f, s)) == 0
        stages, truth = json.loads((whole / "calls.json").read_text()), outcome(whole)
        for stage in KILLS:
            at = draw.randrange(len(stages[stage]) * 99 // 100)  # there at every repetition
            folder = root / f"{number}-{stage}"
            ended = forked(lambda f=folder, s=scenario, st=stage, k=at: die(f, s, st, k))
            left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
            resumed = forked(lambda f=folder, s=scenario: train(f, s))
            found = outcome(folder) if resumed == 0 else None
            differing = [key for key in truth if found is None or found[key] != truth[key]]
            line = {
                "scenario": scenario,
                "stage": stage,
                "call": at,
                "signal": -ended,
                "left": left,
                "differing": differing,
            }
            print(json.dumps(line), flush=True)
            kills += ended == -signal.SIGKILL
            same += not differing
    print(json.dumps({"kills": kills, "same bits": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
