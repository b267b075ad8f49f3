"""What a run keeps in a checkpoint, and how another run takes it up."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.hashing import tensors_hash
from ..expressivity import Verdict
from . import checkpoint, optimizer_state

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
        "optimizer": optimizer_state.pack(run.optimizer, run.network.model.named_parameters()),
        "averaged": dict(run.averaged.kept),  # where a schedule-free optimizer's steps go on
        "scheduler": run.schedule.state(),
        "scaler": run.first_step.state(),
        "config": run.identity(),
        **{name: getattr(run, name) for name in SAVED},
        "verdict": None if run.verdict is None else run.verdict.as_dict(),
    }


def store(run: "Run", folder: Path) -> None:
    """Save the run's state as the folder's checkpoint; an OSError says what is left.

    ValueError for an optimizer's state that no checkpoint holds.
    """
    try:
        with run.averaged.saved():
            found = state(run)
            check_holds(run, found["optimizer"])
            checkpoint.save(folder, found)
    except OSError as error:
        error.add_note(
            f"The checkpoint of epoch {run.epoch}, step {run.batch} was not written; the one "
            "before it is whole. Free some space, then fit(..., resume=True)"
        )
        raise


def check_holds(run: "Run", packed: dict[str, Any] | None = None) -> None:
    """ValueError for what the optimizer keeps and a checkpoint does not give back.

    packed: its state, made here by default. A run without a folder keeps none.
    """
    if run.folder is None:
        return
    if packed is None:
        try:
            packed = optimizer_state.pack(run.optimizer, run.network.model.named_parameters())
        except Exception as error:  # of any package
            raise ValueError(
                f"optimizer: {type(run.optimizer).__name__}.state_dict() failed: "
                f"{type(error).__name__}: {error}. With run_dir=False it trains without checkpoints"
            ) from error
    for path, value in checkpoint.not_held(checkpoint.plain(packed["state_dict"]), "state_dict()"):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(
            f"optimizer: {type(run.optimizer).__name__} keeps a {kind} ({path}), which no "
            "checkpoint gives back: torch.load(weights_only=True) reads tensors and plain data. "
            "With run_dir=False it trains without checkpoints; a class of yours can be allowed by "
            "torch.serialization.add_safe_globals"
        )


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
        if "order" in state["optimizer"]:
            named = model.model.named_parameters()
            optimizer_state.load(run.optimizer, state["optimizer"], named)
        else:  # format 3
            optimizer_state.load_exactly(run.optimizer, state["optimizer"])
    except Exception as error:  # of any package
        raise ValueError(f"resume: the checkpoint's optimizer does not fit: {error}") from error
    run.schedule.load(state["scheduler"])
    run.first_step.load(state["scaler"])
    model.load_state(state["model"])
    run.averaged.kept = {n: y.to(run.device) for n, y in state.get("averaged", {}).items()}
    for name in SAVED:
        setattr(run, name, state[name])
    run.verdict = Verdict(**state["verdict"]) if state["verdict"] else None


def adopt(run: "Run", trunk: "Run", same: bool) -> None:
    """Let `run` go on from where `trunk` stands, before its tau; the models are the same.

    same: the optimizer comes from the trunk's callable, and becomes what the trunk's is. Another
    of the same class and groups takes over the trunk's state and settings, but for those that its
    own callable gives otherwise than the trunk's did; where the class is another, it begins anew.
    """
    run.epoch, run.history = trunk.epoch, [dict(row) for row in trunk.history]
    run.timings = dict(trunk.timings)
    run.averaged.kept = {name: y.clone() for name, y in trunk.averaged.kept.items()}
    run.schedule.follow(trunk.schedule, run.history)
    models = run.network.model, trunk.network.model
    if same and optimizer_state.become(run.optimizer, trunk.optimizer, *models):
        run.schedule.load(trunk.schedule.state())
    else:
        _take_over(run, trunk, same)
    run.first_step.load(trunk.first_step.state())


def _take_over(run: "Run", trunk: "Run", same: bool) -> None:
    """The trunk's state and settings, but for those that the own callable gives otherwise."""
    packed, own = (
        optimizer_state.pack(r.optimizer, r.network.model.named_parameters()) for r in (trunk, run)
    )
    kinds = [optimizer_state.kind(r.optimizer) for r in (trunk, run)]
    if kinds[0] != kinds[1] or packed["order"] != own["order"]:
        if same:
            raise ValueError(
                f"optimizer: expected the callable to give the same optimizer for each branch, got "
                f"{kinds[0]} and {kinds[1]}, or its parameters in other groups"
            )
        run.averaged.kept = {}
        return
    now = [dict(group) for group in run.optimizer.param_groups]
    optimizer_state.load(run.optimizer, packed, run.network.model.named_parameters())
    if same:
        run.schedule.load(trunk.schedule.state())
        return
    firsts = run.schedule.first, trunk.schedule.first
    for group, mine, first, theirs in zip(run.optimizer.param_groups, now, *firsts, strict=True):
        for key, value in mine.items():
            # what is not in `first` is the scheduler's, which has followed with the own rates
            equal = key in first and checkpoint.digest(first[key]) == checkpoint.digest(
                theirs.get(key)
            )
            if key != "params" and not equal:
                group[key] = value
