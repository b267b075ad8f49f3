"""What a run keeps in a checkpoint, and how another run takes it up."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.hashing import tensors_hash
from ..core.names import canonical_name
from ..expressivity import Verdict
from .context import Context
from .persistence import checkpoint, optimizer_state
from .state import PhaseState, RunState

OWN_FORM = {"second", "verdict"}  # fields of RunState that the file holds in another form


def contents(context: Context, state: RunState) -> dict[str, Any]:
    """What a checkpoint holds: tensors and plain data."""
    return {
        "model": context.network.state(),
        "optimizer": optimizer_state.pack(
            context.optimizer, context.network.model.named_parameters()
        ),
        "averaged": dict(context.averaged.kept),  # where a schedule-free optimizer's steps go on
        "scheduler": context.schedule.state(),
        "scaler": context.base_step.state(),
        "config": context.identity(),
        "data": context.train.content,
        "layers": settings_of_layers(context.network.model),
        **{f.name: getattr(state, f.name) for f in fields(state) if f.name not in OWN_FORM},
        "second": state.second.as_dict(),
        "verdict": None if state.verdict is None else state.verdict.as_dict(),
    }


def store(context: Context, state: RunState, folder: Path) -> None:
    """Save the run's state as the folder's checkpoint; an OSError says what is left.

    ValueError for an optimizer's state that no checkpoint holds.
    """
    try:
        with context.averaged.saved():
            found = contents(context, state)
            check_holds(context, found["optimizer"])
            checkpoint.save(folder, found)
    except OSError as error:
        error.add_note(
            f"The checkpoint of epoch {state.epoch}, step {state.batch} was not written; the one "
            "before it is whole. Free some space, then fit(..., resume=True)"
        )
        raise


def check_holds(context: Context, packed: dict[str, Any] | None = None) -> None:
    """ValueError for what the optimizer keeps and a checkpoint does not give back.

    packed: its state, made here by default. A run without a folder keeps none.
    """
    if context.folder is None:
        return
    if packed is None:
        try:
            packed = optimizer_state.pack(
                context.optimizer, context.network.model.named_parameters()
            )
        except Exception as error:  # of any package
            raise ValueError(
                f"optimizer: {type(context.optimizer).__name__}.state_dict() failed: "
                f"{type(error).__name__}: {error}. With run_dir=False it trains without checkpoints"
            ) from error
    for path, value in checkpoint.not_held(checkpoint.plain(packed["state_dict"]), "state_dict()"):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(
            f"optimizer: {type(context.optimizer).__name__} keeps a {kind} ({path}), which no "
            "checkpoint gives back: torch.load(weights_only=True) reads tensors and plain data. "
            "With run_dir=False it trains without checkpoints; a class of yours can be allowed by "
            "torch.serialization.add_safe_globals"
        )


def settings_of_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{module: {"class": ..., setting: value}} of torch's own and this package's modules.

    A module of the user's has its class alone: its attributes may be counters.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        kind = type(module)
        own = found[canonical_name(name)] = {"class": kind.__qualname__}
        if kind.__module__.split(".")[0] in ("torch", "twophase_ext"):
            for key, value in vars(module).items():
                if not key.startswith("_") and key != "training" and _simple(value):
                    own[key] = list(value) if isinstance(value, tuple) else value
    return found


def _simple(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, bool | int | float | str) for part in parts)


def _check_layers(known: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> None:
    """ValueError for another setting of a module; what only one torch has is not compared."""
    for name in known.keys() & now.keys():
        for key in known[name].keys() & now[name].keys():
            if known[name][key] != now[name][key]:
                raise ValueError(
                    f"resume: the checkpoint's model is another one: {name or 'its root'} has "
                    f"{key} = {known[name][key]!r} there, {now[name][key]!r} here"
                )


def restore(context: Context, frozen: dict[str, Tensor], saved: dict[str, Any]) -> RunState:
    """Load a checkpoint into model and optimizer; the place in the run that it holds.

    frozen: what stays as it is from tau on.

    Raises ValueError, before the model has changed, where it is of another model, configuration
    or training data, or where its hidden layers are not those that were frozen. Checkpoints of
    before these were noted have neither `data` nor `layers`.
    """
    model = context.network
    checkpoint.check_matches(saved, checkpoint.describe(model.state()), context.identity())
    known, now = saved.get("data"), context.train.content
    if known is not None and now is not None and known != now:
        raise ValueError("resume: the training data are not the checkpoint's (SHA-256 differs)")
    _check_layers(saved.get("layers") or {}, settings_of_layers(model.model))
    if saved["hidden_hash"] is not None:
        theirs = {name: saved["model"].get(name, tensor) for name, tensor in frozen.items()}
        if tensors_hash(theirs) != saved["hidden_hash"]:
            raise ValueError("resume: the checkpoint's hidden layers do not match their hash")
    try:
        if "order" in saved["optimizer"]:
            named = model.model.named_parameters()
            optimizer_state.load(context.optimizer, saved["optimizer"], named)
        else:  # format 3
            optimizer_state.load_exactly(context.optimizer, saved["optimizer"])
    except Exception as error:  # of any package
        raise ValueError(f"resume: the checkpoint's optimizer does not fit: {error}") from error
    context.schedule.load(saved["scheduler"])
    context.base_step.load(saved["scaler"])
    model.load_state(saved["model"])
    context.averaged.kept = {n: y.to(context.device) for n, y in saved.get("averaged", {}).items()}
    own = {f.name for f in fields(RunState)} - OWN_FORM
    return RunState(
        **{name: value for name, value in saved.items() if name in own},
        second=PhaseState(**saved["second"]),
        # one of before the distinct inputs were counted has no version
        verdict=Verdict(**{"version": 1, **saved["verdict"]}) if saved["verdict"] else None,
    )
