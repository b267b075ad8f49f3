"""The user's own metrics of a run: fn(logits, y) -> a number, over a whole data set."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..core.messages import type_and_line
from ..model.losses import ConvexLoss, split
from ..model.network import Network
from .data.samples import BATCH, Samples

Metrics = Mapping[str, Callable[[Tensor, Tensor], Any]]
OWN = ("loss", "accuracy")  # what every run measures


def resolve_metrics(given: Any) -> Metrics:
    """The argument `metrics`; TypeError or ValueError where it is none."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"metrics: expected {{name: function}}, got {type(given).__name__}")
    for name, function in given.items():
        if not (isinstance(name, str) and name and name.isprintable()) or name in OWN:
            raise ValueError(f"metrics: expected a name other than {OWN}, got {name!r}")
        if not callable(function):
            raise TypeError(f"metrics: {name}: expected a function, got {function!r}")
    return dict(given)


def evaluate(
    metrics: Metrics, loss: ConvexLoss, outputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> dict[str, float | None]:
    """Each metric of these outputs and targets, on the CPU; None where it is not finite.

    Raises ValueError that names a metric that raises or returns no number.
    """
    if not metrics:
        return {}
    logits, y = torch.cat(list(outputs)).cpu(), split(loss, torch.cat(list(targets)).cpu())[0]
    return {name: _number(name, function, logits, y) for name, function in metrics.items()}


def _number(
    name: str, function: Callable[[Tensor, Tensor], Any], logits: Tensor, y: Tensor
) -> float | None:
    shapes = f"logits {list(logits.shape)} and y {list(y.shape)}"
    try:
        found = function(logits.clone(), y.clone())  # which may write into them
    except Exception as error:  # whatever the user's own function raises
        raise ValueError(f"metrics: {name} fails on {shapes}: {type_and_line(error)}") from error
    if hasattr(found, "item") and getattr(found, "size", None) is not None and _entries(found) == 1:
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, Real):
        raise ValueError(
            f"metrics: {name}: expected a number for {shapes}, got {type(found).__name__}"
        )
    return float(found) if math.isfinite(found) else None


def _entries(found: Any) -> int:
    return int(found.numel() if isinstance(found, Tensor) else found.size)


def own_metrics(row: Mapping[str, Any], part: str) -> list[str]:
    """The metrics of a row of numbers, "name value" each; part: "train" or "val"."""
    names = {key.removeprefix(f"{part}_"): key for key in row if key.startswith(f"{part}_")}
    return [
        f"{name} {row[key]:.4g}"
        for name, key in names.items()
        if name not in OWN and isinstance(row[key], int | float)
    ]


@torch.no_grad()
def try_out(metrics: Metrics, network: Network, samples: Samples) -> None:
    """Call each metric on some samples, spread over the data, before anything long is begun.

    ValueError as of `evaluate`; the model keeps its modes.
    """
    if not metrics:
        return
    size = max(1, BATCH // samples.each)
    index = torch.arange(0, samples.n, max(1, -(-samples.n // size)), device="cpu")
    model = network.model
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        x, y = samples.fetch(index, augmented=False)
        counted = samples.counted(y)
        evaluate(metrics, samples.objective, [model(x)[counted]], [y[counted]])
    finally:
        for module, mode in modes.items():
            module.training = mode
