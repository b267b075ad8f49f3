"""What a run keeps in a checkpoint, and how another run takes it up."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..expressivity import Verdict
from . import checkpoint
from .freeze import tensors_hash

if TYPE_CHECKING:
    from .engine import Run

# Attributes of a Run that a checkpoint holds as they are.
SAVED = (
    "cache_mode",
    "epoch",
    "batch",
    "sums",
    "rng",
    "hidden_hash",
    "history",
    "timings",
    "descent",
)


def state(run: "Run") -> dict[str, Any]:
    """What a checkpoint holds: tensors and plain data."""
    return {
        "model": run.network.state(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.schedule.state(),
        "scaler": run.first_step.state(),
        "config": run.identity(),
        **{name: getattr(run, name) for name in SAVED},
        "verdict": None if run.verdict is None else run.verdict.as_dict(),
    }


def store(run: "Run", folder: Path) -> None:
    """Save the run's state as the folder's checkpoint; an OSError says what is left."""
    try:
        checkpoint.save(folder, state(run))
    except OSError as error:
        error.add_note(
            f"The checkpoint of epoch {run.epoch}, step {run.batch} was not written; the one "
            "before it is whole. Free some space, then fit(..., resume=True)"
        )
        raise


def restore(run: "Run", state: dict[str, Any]) -> None:
    """Continue `run` from a checkpoint's state.

    Raises ValueError, before the model has changed, where it is of another model, configuration
    or number of samples, or where its hidden layers are not those that were frozen.
    """
    model = run.network
    checkpoint.check_matches(state, checkpoint.describe(model.state()), run.identity())
    if state["hidden_hash"] is not None:
        own = run.frozen()
        theirs = {name: state["model"].get(name, tensor) for name, tensor in own.items()}
        if tensors_hash(theirs) != state["hidden_hash"]:
            raise ValueError("resume: the checkpoint's hidden layers do not match their hash")
    try:
        run.optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise ValueError(f"resume: the checkpoint's optimizer does not fit: {error}") from error
    run.schedule.load(state["scheduler"])
    run.first_step.load(state["scaler"])
    model.load_state(state["model"])
    for name in SAVED:
        setattr(run, name, state[name])
    run.verdict = Verdict(**state["verdict"]) if state["verdict"] else None


def adopt(run: "Run", trunk: "Run") -> None:
    """Let `run` go on from where `trunk` stands, before its tau; the models are the same.

    The optimizer keeps its own hyper-parameters, under its own schedule, and takes over the other's
    state, where it is of the same class and has the same groups.
    """
    run.epoch, run.history = trunk.epoch, [dict(row) for row in trunk.history]
    run.timings = dict(trunk.timings)
    # a copy: load_state_dict keeps the tensors that it is given, and branches write to them
    theirs, own = copy.deepcopy(trunk.optimizer.state_dict()), run.optimizer.state_dict()
    groups = [[group["params"] for group in d["param_groups"]] for d in (theirs, own)]
    if type(trunk.optimizer) is type(run.optimizer) and groups[0] == groups[1]:
        run.optimizer.load_state_dict({**theirs, "param_groups": own["param_groups"]})
    run.schedule.follow(trunk.schedule, run.history)
    run.first_step.load(trunk.first_step.state())
