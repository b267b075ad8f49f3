"""A Result again from the folder that a run left."""

from pathlib import Path
from typing import Any

from torch import nn

from ..core.names import canonical_name
from ..model.losses import NAMED
from ..model.probing import require_module
from .config import PRECISIONS
from .minimum import Minimum
from .persistence import checkpoint
from .persistence.runfolder import COLUMNS, RunFolder
from .result import Result

UNFINISHED = "unfinished"  # no result.json yet, or a kill came before it


def load_run(folder: str | Path, model: nn.Module | None = None) -> Result:
    """The Result of the run in `folder`, as `Trainer.fit` returned it.

    model: a network of the same architecture, which gets the weights of the folder's newest
    checkpoint and the run's precision; a folder has tensors and no code, so that `predict` and
    `score` need it. Its mode is evaluation after tau, as after `fit`. Without it result.model is
    None.

    history has the columns of metrics.csv. status is "unfinished" where the run has no result yet;
    loss is None where it was none that the package names. Runs nothing that the folder brings.
    Raises FileNotFoundError where there is no run or no checkpoint for the model, ValueError for
    files that cannot be read and for a model that the weights are not of, TypeError where `model`
    is no nn.Module.
    """
    if model is not None:
        require_module(model)
    path = Path(folder)
    kept = RunFolder(path)
    if not kept.begun:
        raise FileNotFoundError(f"folder: {path} holds no run (there is no config.json)")
    config = _read(kept.config, path / "config.json")
    found: dict[str, Any] = {"status": UNFINISHED}
    guarantee = verdict = None
    history: list[dict[str, Any]] = []
    if (path / "result.json").exists():
        found, guarantee = _read(kept.result, path / "result.json")
    if (path / "verdict.json").exists():
        verdict = _read(kept.verdict, path / "verdict.json")
    if (path / "metrics.csv").exists():
        for row in _read(kept.history, path / "metrics.csv"):
            whole = {"epoch": int(row["epoch"]), "phase": int(row["phase"])}
            history.append({**dict.fromkeys(COLUMNS), **row, **whole})
    result = Result(
        model=model,  # type: ignore[arg-type]
        history=history,
        status=found["status"],
        run_dir=path,
        verdict=verdict,
        guarantee=guarantee,
        divergence=found.get("divergence"),
        final=found.get("final") or {},
        timings=found.get("timings") or {},
        hidden_hash=found.get("hidden_hash"),
        feature_cache=found.get("feature_cache"),
        minimum=_read(lambda: Minimum.of(found.get("minimum")), path / "result.json"),
        loss=None if config.get("own_loss") else NAMED.get(str(config["loss"])),
        last_layer=config.get("last_layer"),
        classes=None if config.get("classes") is None else tuple(map(str, config["classes"])),
        stopped=found.get("stopped"),
    )
    _read(result.__str__, path / "result.json")  # what cannot be shown is damaged
    if model is not None:
        _fill(model, path, config)
    return result


def _read(reader: Any, file: Path) -> Any:
    try:
        return reader()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"folder: {file} cannot be read: {error}") from error


def _fill(model: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    """The checkpoint's weights into the model; nothing of it has changed where they do not fit."""
    state, file = checkpoint.load(folder)
    dtype = PRECISIONS.get(str(config.get("precision")), PRECISIONS["float32"])[0]
    own = {canonical_name(name): name for name in model.state_dict()}
    now = {
        canonical_name(name): t.to(dtype) if t.is_floating_point() else t
        for name, t in model.state_dict().items()
    }
    if differing := checkpoint.difference(state, checkpoint.describe(now)):
        raise ValueError(f"model: {file}: {differing}")
    model.to(dtype)
    model.load_state_dict({own[name]: t for name, t in state["model"].items()})
    if state["hidden_hash"] is not None and config.get("batch_norm") != "batch":
        model.eval()
