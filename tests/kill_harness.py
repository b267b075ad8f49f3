"""Runs killed by SIGKILL at chosen function calls, continued, and compared with a whole run.

python tests/kill_harness.py FOLDER [SEED]: one JSON line a kill, then a summary.

Each run is a fork of this process, which has started no thread. A run's function calls, of Python
and C alike, are the same at every repetition, so that "the k-th call" is a point of the run: first
calls of every stage are counted in the whole run, then a random one of each stage is where the next
run is killed.
"""

import csv
import json
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers import quiet, toy_convnet, toy_images
from twophase_ext.training.freeze import tensors_hash

# Functions of the Trainer that name a stage; the innermost one counts.
STAGES = ("_first", "_second", "_perturb", "_fill_caches", "_finish_epoch", "save", "write")
SCENARIOS: dict[str, dict[str, Any]] = {
    "base": {"checkpoint_every": "2 steps"},
    "base, nothing cached": {"feature_cache": "none", "checkpoint_every": "3 steps"},
    "gd": {"second_phase": "gd", "gd": {"steps": 4}, "checkpoint_every": "0.01 seconds"},
    "sgd": {"second_phase": "sgd", "checkpoint_every": 1},
}
KILLS = ("_first", "_second", "_perturb", "write", "anywhere")  # in each scenario


def train(folder: Path, scenario: str) -> None:
    """Start the run in `folder`, or go on with it."""
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
    """Counts function calls by stage; dies at call `at`, where it is given."""

    def __init__(self, at: int | None = None) -> None:
        """Counting starts with the context."""
        self.at, self.count = at, 0
        self.stages: dict[str, list[int]] = {name: [] for name in (*STAGES, "anywhere")}
        self._open: list[str] = []

    def _event(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if code.co_name in STAGES and "twophase_ext/training" in code.co_filename:
            if event == "call":
                self._open.append(code.co_name)
            elif event == "return":
                self._open.pop()
        if event in ("call", "c_call"):
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.at is None:
                self.stages[self._open[-1] if self._open else "anywhere"].append(self.count)
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


def die(folder: Path, scenario: str, at: int) -> None:
    """A run that ends at its call `at`."""
    with Calls(at):
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
            at = draw.choice(stages[stage])
            folder = root / f"{number}-{stage.strip('_')}"
            ended = forked(lambda f=folder, s=scenario, k=at: die(f, s, k))
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
