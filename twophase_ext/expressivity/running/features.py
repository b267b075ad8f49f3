"""The wide layer's input with a proved bound of its rounding error, from the model as it runs."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.messages import type_and_line
from ...model.probing import input_of
from ..bounded import ARITHMETIC, LIBM, SOFTPLUS, Unbounded
from ..forward_error import BoundedFeatures
from ..forward_error import bounded_features as traced_features
from .engine import Running, plain_attention

_ORDER = (SOFTPLUS, LIBM)


def bounded_features(
    model: nn.Module,
    stop: nn.Module,
    batches: list[Tensor],
    *,
    n: int,
    progress: Callable[[int], object] = lambda _: None,
) -> BoundedFeatures:
    """By the model's graph; by what it does as it runs, where there is no graph or no rule in it.

    Arguments as of both (forward_error.py). Raises Unbounded with what stood in both ways.
    """
    try:
        return traced_features(model, stop, batches, n=n, progress=progress)
    except Unbounded as traced:
        try:
            return running_features(model, stop, batches, n=n, progress=progress)
        except Unbounded as error:
            raise Unbounded(f"{traced}; as it runs: {error}") from None
        except Exception as error:  # of the user's forward, or of torch's modes
            raise Unbounded(f"{traced}; as it runs: {type_and_line(error)}") from error


@torch.no_grad()
def running_features(
    model: nn.Module,
    stop: nn.Module,
    batches: Iterable[Tensor],
    *,
    n: int,
    progress: Callable[[int], object] = lambda _: None,
) -> BoundedFeatures:
    """As `bounded_features`, by the operators that the model applies as it runs.

    model: float64, in evaluation mode, on the CPU. batches: [b, ...], n samples in all, of real
    numbers or integers. Every two batches of one size, and every batch and one of other samples,
    take the same operators with the same numbers beside them: what a sample hangs on is its own.
    """
    started = time.perf_counter()
    batches = list(batches)
    if torch.get_float32_matmul_precision() != "highest":
        raise Unbounded("float32 products are not plain: set_float32_matmul_precision('highest')")
    norms: dict[Any, Any] = {}
    traces: dict[int, str] = {}
    assumed: set[str] = set()
    z: Tensor | None = None
    done = 0

    def run(x: Tensor) -> tuple[Running, Any]:
        mode = Running(model, norms)
        mode.enter(x)
        with plain_attention(), mode.watching(), mode:
            value = input_of(model, stop, x)
        return mode, mode.bounded(value)

    for x in batches:
        if x.device.type != "cpu":
            raise Unbounded("operators are bounded on the CPU alone")
        mode, found = run(x.clone())
        if found.value.dim() != 2:
            raise Unbounded(f"stop: expected features [b, d], got {tuple(found.value.shape)}")
        trace = traces.get(len(x))
        if trace is None:
            trace = traces[len(x)] = run(_others(x, batches))[0].trace
        if mode.trace != trace:
            raise Unbounded("the model does something else for other samples")
        if z is None:
            z, error = x.new_empty(n, found.value.shape[1], dtype=torch.float64), torch.empty(n)
            error = error.double()
        z[done : done + len(x)], error[done : done + len(x)] = found.value, found.error
        done += len(x)
        assumed |= mode.assumed
        progress(len(x))
    if z is None or done != n:
        raise ValueError(f"batches: expected {n} samples, got {done}")
    assumptions = [ARITHMETIC, *(text for text in _ORDER if text in assumed)]
    return BoundedFeatures(z, error, assumptions, time.perf_counter() - started)


def _others(x: Tensor, batches: list[Tensor]) -> Tensor:
    """As many samples as x holds, other ones in their places."""
    whole = torch.cat(batches[:3])
    moved = whole.roll(1 + len(whole) // 2, 0)[: len(x)].clone()
    if moved.is_floating_point():
        return 0.75 * moved + 0.25 * x
    return moved
