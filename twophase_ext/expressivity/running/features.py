"""The wide layer's input with a proved bound of its rounding error, from the model as it runs."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...core.messages import type_and_line
from ...model.probing import rows_into
from ..bounded import (
    ARITHMETIC,
    CONSTANTS,
    LIBM,
    LIFTED,
    SMOOTH_MAX,
    SOFTPLUS,
    Bounded,
    BoundedFeatures,
    Lost,
    Unbounded,
)
from .engine import Running
from .tape import Step

_ORDER = (SOFTPLUS, SMOOTH_MAX, LIBM, LIFTED, CONSTANTS)


class Known(NamedTuple):
    """What a batch of this size does, and what of it need not be computed."""

    trace: str
    skipped: Mapping[int, Step]
    lift: bool


@torch.no_grad()
def bounded_features(
    model: nn.Module,
    stop: nn.Module | Sequence[nn.Module],
    batches: Iterable[Tensor],
    *,
    n: int,
    progress: Callable[[int], object] = lambda _: None,
    norms: dict[Any, Any] | None = None,
    known: dict[int, Known] | None = None,
) -> BoundedFeatures:
    """The input of the layer `stop` for all samples, with a bound of each sample's error.

    stop: or the layers from it to the last one; where these run on every token and the model picks
    one, the rows that it picks.
    model: float64, in evaluation mode. batches: [b, ...] on the model's device, n samples in all,
    of real numbers (the model gets them in float64) or integers, taken as exact. "Exact" is real
    arithmetic on the stored weights and inputs; the bound holds for the float64 arithmetic in
    `assumptions`. z or error is NaN or infinite where the computation overflows. progress: called
    with the number of samples done. norms: of weights, kept from call to call. known: what batches
    do, by their size, kept from call to call over the same weights.

    Every two batches of one size take the same operators with the same numbers beside them, and so
    does a batch of other samples where a size comes once: what a sample hangs on is its own.

    Raises Unbounded (a ValueError) naming the module and operator that has no rule; ValueError
    where `stop` is not in the model or n is not the number of samples.
    """
    started = time.perf_counter()
    stop = [stop] if isinstance(stop, nn.Module) else list(stop)
    if not set(stop) <= set(model.modules()):
        raise ValueError("stop: expected a module of the model")
    if torch.get_float32_matmul_precision() != "highest":
        raise Unbounded("float32 products are not plain: set_float32_matmul_precision('highest')")
    batches = [x for x in batches if len(x)]
    sizes = [len(x) for x in batches]
    if sum(sizes) != n or not batches:
        raise ValueError(f"batches: expected {n} samples, got {sum(sizes)}")
    norms, known = {} if norms is None else norms, {} if known is None else known
    lifts = {k.lift for k in known.values()} or {True}
    try:
        parts, assumed = _all(model, stop, batches, norms, known, progress, lift=lifts == {True})
    except Unbounded:
        known.clear()
        try:  # a forward may insist on float32
            parts, assumed = _all(model, stop, batches, norms, known, progress, lift=False)
        except Unbounded:
            pass
        else:
            return _together(parts, assumed, started)
        raise
    return _together(parts, assumed, started)


def _together(parts: list[Bounded], assumed: set[str], started: float) -> BoundedFeatures:
    return BoundedFeatures(
        torch.cat([part.value for part in parts]),
        torch.cat([part.error for part in parts]),
        [ARITHMETIC, *(text for text in _ORDER if text in assumed)],
        time.perf_counter() - started,
    )


def _all(
    model: nn.Module,
    stop: list[nn.Module],
    batches: list[Tensor],
    norms: dict[Any, Any],
    known: dict[int, Known],
    progress: Callable[[int], object],
    *,
    lift: bool,
) -> tuple[list[Bounded], set[str]]:
    """Every batch's features, and what their bounds rest on."""
    sizes = [len(x) for x in batches]
    assumed: set[str] = set()
    parts: list[Bounded] = []
    for x in batches:
        if len(x) not in known:
            mode, found, known[len(x)] = _first(model, stop, x, norms, lift)
            if sizes.count(len(x)) == 1:
                _again(model, stop, _others(x, batches), norms, known[len(x)])
        else:
            mode, found = _again(model, stop, x, norms, known[len(x)])
        if found.value.dim() != 2:
            raise Unbounded(f"stop: expected features [b, d], got {tuple(found.value.shape)}")
        parts.append(Bounded(found.value.double(), found.error))
        assumed |= mode.assumed
        progress(len(x))
    return parts, assumed


def running(
    model: nn.Module,
    stop: list[nn.Module],
    x: Tensor,
    norms: dict[Any, Any] | None = None,
    pruned: dict[str, Tensor] | None = None,
) -> Running:
    """One pass over a batch up to `stop`, without bounds where these fail; its tape is of use.

    pruned: gets the live columns of weights whose other columns do not count (thin.py).
    """
    mode = Running(model, {} if norms is None else norms, thin=pruned is not None, pruned=pruned)
    try:
        with torch.no_grad():
            _enter(mode, model, stop, _own(model, x))
    except Unbounded:
        pass
    return mode


def steps_to(
    model: nn.Module, stop: list[nn.Module], x: Tensor, norms: dict[Any, Any] | None = None
) -> tuple[list[Step], list[Step]]:
    """(steps on which the input of `stop` depends, other ones) of one pass, in order."""
    mode = Running(model, {} if norms is None else norms)
    with torch.no_grad():
        value = _enter(mode, model, stop, _own(model, x))
    dead = mode.skippable(value)
    steps = mode.tape.steps
    return [s for k, s in steps.items() if k not in dead], list(dead.values())


def _first(
    model: nn.Module, stop: list[nn.Module], x: Tensor, norms: dict[Any, Any], lift: bool
) -> tuple[Running, Bounded, Known]:
    """The first batch of its size, computed whole; again without what it need not compute where
    the numbers of an operator that has no rule reached the end.
    """
    mode = Running(model, norms, lift=lift, thin=True)
    value = _enter(mode, model, stop, _own(model, x))
    known = Known(mode.trace.result(), mode.skippable(value), lift)
    try:
        return mode, mode.bounded(value), known
    except Lost:
        if not known.skipped:
            raise
    finally:
        mode.notes.forget()
    return *_again(model, stop, x, norms, known), known


def _again(
    model: nn.Module, stop: list[nn.Module], x: Tensor, norms: dict[Any, Any], known: Known
) -> tuple[Running, Bounded]:
    """A further batch; Unbounded where it is not treated as the first one of its size."""
    mode = Running(model, norms, known.skipped, lift=known.lift, thin=True)
    found = mode.bounded(_enter(mode, model, stop, _own(model, x)))
    mode.notes.forget()
    if mode.trace.result() != known.trace:
        raise Unbounded("the model does something else for other samples")
    return mode, found


def _enter(mode: Running, model: nn.Module, stop: list[nn.Module], x: Tensor) -> Tensor:
    mode.enter(x)
    try:
        with plain_attention(), mode.watching(), mode:
            return rows_into(model, stop, x)
    except (Unbounded, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the user's forward, or of torch's modes
        reason = f"the model does not run as it is watched: {type_and_line(error)}"
        raise Unbounded(reason) from error


def _own(model: nn.Module, x: Tensor) -> Tensor:
    """A copy, as a forward may work in place on its input; real numbers in the model's float64."""
    wide = any(p.dtype is torch.float64 for p in model.parameters())
    return x.to(torch.float64, copy=True) if wide and x.is_floating_point() else x.clone()


def _others(x: Tensor, batches: list[Tensor]) -> Tensor:
    """As many samples as x holds, other ones in their places."""
    whole = torch.cat(batches[:3])
    moved = whole.roll(1 + len(whole) // 2, 0)[: len(x)].clone()
    if moved.is_floating_point():
        return 0.75 * moved + 0.25 * x
    return moved


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as the products that it is, not as one operator."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
