"""Several second phases from one first phase."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from torch import nn

from ..core.files import inside
from ..model.probing import copy_model
from .adopt import adopt
from .config import Config, differing, resolve_tau
from .distributed import ranks
from .features.agreement import Agreement
from .loop import Loop
from .persistence.checkpoint import exists
from .persistence.runfolder import create
from .result import Result

TRUNK = "trunk"
FEATURES = differing("features")
ALLOWED = (*FEATURES, *differing("own"), "optimizer", "tau")


class Trainer(Protocol):
    """What is used of a Trainer (trainer.py, which is built on this module)."""

    model: nn.Module
    config: Config
    run_dir: str | Path | bool | None
    compares: bool
    known: Agreement | None

    def _clone(self, model: nn.Module, **changes: Any) -> Self: ...

    def _prepare(self, train: Any, val: Any, resume: bool | str | Path | None) -> Loop: ...

    def _execute(self, loop: Loop, epochs: int | None = None) -> Result: ...


def branch(
    trainer: Trainer,
    branches: Mapping[str, Mapping[str, Any]],
    train: Any,
    val: Any,
    resume: bool,
) -> dict[str, Result]:
    """See `Trainer.branch`."""
    _check(trainer, branches)
    if ranks.joined().size > 1:
        raise ValueError("branches: expected one process; on several, fit each branch by itself")
    root = trainer.run_dir
    if root is not False:
        root = create(None if root in (None, True) else Path(str(root)), resuming=resume)
    first = trainer._clone(
        trainer.model,
        second_phase="none",
        run_dir=_under(root, TRUNK),
        verify=False,
        augment_copies=None,
    )
    first.compares = any(
        t.get("batch_norm", trainer.config.batch_norm) != "batch" for t in branches.values()
    )
    for name, changes in branches.items():
        config = trainer._clone(trainer.model, **changes).config
        found = {config.batch_norm, first.config.batch_norm}
        if config.tau_epoch and len(found) > 1 and "kept" in found:
            raise ValueError(
                f"batch_norm: {name} has {config.batch_norm!r}, but the first phase trains with "
                f"{first.config.batch_norm!r}; 'kept' statistics are constants in both phases"
            )
    loop = first._prepare(train, val, _checkpoint(first, resume))
    folder = loop.context.folder
    try:
        return _grow(trainer, branches, first, loop, train, val, resume, root)
    finally:
        if folder is not None:
            folder.release()


def _grow(
    trainer: Trainer,
    branches: Mapping[str, Mapping[str, Any]],
    first: Trainer,
    loop: Loop,
    train: Any,
    val: Any,
    resume: bool,
    root: Any,
) -> dict[str, Result]:
    """The branches of the trunk `loop`, which the Trainer `first` trains as far as they need."""
    run, state = loop.run, loop.state
    taus = {name: _tau(trainer, changes) for name, changes in branches.items()}
    results: dict[str, Result] = {}
    shared: dict[tuple[str | None, str], Any] = {}
    kept: Any = None
    for name in sorted(branches, key=lambda name: (taus[name], _features(trainer, branches[name]))):
        changes, tau = branches[name], taus[name]
        if state.epoch < tau or not state.history:
            ended = first._execute(loop, epochs=tau)
            if ended.status != "completed":
                return {**results, TRUNK: ended}
        key = tau, _features(trainer, changes)
        if kept != key:  # caches of other features are of no more use
            shared.clear()
            kept = key
        model = copy_model(trainer.model)
        arguments = {"last_layer": run.context.network.last.name, **changes, "tau": tau}
        second = trainer._clone(model, run_dir=_under(root, name), **arguments)
        checkpoint = _checkpoint(second, resume)
        if checkpoint is None and state.epoch > tau:
            raise ValueError(
                f"branches: {name} begins at epoch {tau}, but the trunk in {root} is at epoch "
                f"{state.epoch} already; begin again in another run_dir"
            )
        second.known = run.context.fixed if run.context.fixed.compared else None
        continued = second._prepare(train, val, checkpoint)
        if checkpoint is None:
            adopt(continued.run, run, same="optimizer" not in changes)
        continued.run.branch_cache = shared
        results[name] = second._execute(continued)
        if results[name].status == "interrupted":
            break
    return {name: results[name] for name in branches if name in results}


def _check(trainer: Trainer, branches: Mapping[str, Mapping[str, Any]]) -> None:
    if not isinstance(branches, Mapping) or not branches:
        raise TypeError("branches: expected a dict {name: arguments to change}, at least one")
    for name, changes in branches.items():
        if not name or name != Path(str(name)).name or name in (TRUNK, ".", ".."):
            raise ValueError(
                f"branches: expected the name of a folder other than 'trunk', got {name!r}"
            )
        if not isinstance(changes, Mapping):
            raise TypeError(f"branches: expected a dict of arguments for {name}, got {changes!r}")
        wrong = [key for key in changes if key not in ALLOWED]
        if wrong:
            raise ValueError(
                f"branches: {name} changes {wrong[0]!r}, which the first phase depends on or which "
                f"is no argument; expected some of {sorted(ALLOWED)}"
            )
        trainer._clone(trainer.model, **{"tau": trainer.config.tau_epoch, **changes})  # or now


def _tau(trainer: Trainer, changes: Mapping[str, Any]) -> int:
    """The epoch at which a branch leaves the trunk."""
    tau = changes.get("tau", trainer.config.tau_epoch)
    return resolve_tau(tau, changes.get("epochs", trainer.config.epochs))


def _features(trainer: Trainer, changes: Mapping[str, Any]) -> str:
    """What the features after tau depend on, the same text for the same features."""
    own = {name: getattr(trainer.config, name) for name in FEATURES}
    return repr({name: changes.get(name, own[name]) for name in FEATURES})


def _checkpoint(trainer: Trainer, resume: bool) -> Path | None:
    """The checkpoint to continue from, where there is one."""
    if not resume or trainer.run_dir is False:
        return None
    folder = Path(str(trainer.run_dir))
    return folder if exists(folder) else None


def _under(root: Any, name: str) -> Any:
    return False if root is False else inside(root, name)
