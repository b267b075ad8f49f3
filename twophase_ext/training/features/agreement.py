"""Whether h and the outputs are fixed functions of a sample, whatever stands beside it in a batch.

The premise "fixed features" of Theorem 1, and what a cache of features rests on.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.messages import first_line
from ...model.drawn import drawn
from ...model.network import Network
from ...model.probing import State, compiled, eager, untouched
from ..batchnorm import batch_bounds
from ..data.samples import BATCH, Samples
from ..distributed.ranks import Ranks
from .cache import Features

SECONDS = 60.0  # of passes before training; beyond them the samples left are not compared
# Of the row's norm: other kernels for other batch sizes, and what deep networks make of it. Batch
# statistics move h by hundredths and more.
ROUNDINGS = 1e3
REDUCED = 32  # likewise, of the unit of products in TF32 or bfloat16


@dataclass
class Agreement:
    """What the comparison found: `evidence` of the first disagreement or None, and `extent`."""

    evidence: str | None = None
    extent: str = "not compared with other batches"
    compared: bool = False


class _Block(NamedTuple):
    """Samples, and what the model gives for them, row by row; `each` rows of a sample."""

    samples: Tensor  # their indices
    x: Tensor
    h: Tensor
    outputs: Any
    each: int = 1

    def part(self, index: Tensor) -> Tensor:
        """Rows of the samples with these places."""
        return (index[:, None] * self.each + torch.arange(self.each, device="cpu")).flatten()


def tolerance(device: torch.device, dtype: torch.dtype) -> float:
    """How far two passes may be apart by rounding, relative to the row's norm."""
    reduced = 0.0
    if dtype is torch.float32:
        chosen = torch.get_float32_matmul_precision()
        tf32 = device.type == "cuda" and (chosen == "high" or torch.backends.cudnn.allow_tf32)
        reduced = 2.0**-8 if chosen == "medium" else 2.0**-11 * (tf32 or chosen == "high")
    return max(ROUNDINGS * torch.finfo(dtype).eps, REDUCED * reduced)


def agreement(
    network: Network,
    samples: Samples,
    batch_size: int,
    ranks: Ranks | None = None,
    *,
    accumulate: int = 1,
) -> Agreement:
    """Compare two passes over all samples in evaluation mode: as they come, and regrouped.

    The outputs must be the last layer's. Batches of every size that training makes of the samples
    are tried, with gradients on where training has them, and a compiled model as it is compiled.
    Each sample is fetched once. Each rank passes its own, and all learn of a disagreement.

    batch_size, accumulate: of training, a batch going through in that many parts. Raises
    ValueError where the model does not run on these samples, or its forward pass changes
    parameters or buffers in evaluation mode.
    """
    ranks = ranks or Ranks()
    found, started, done = Agreement(), time.monotonic(), 0
    sizes = _other_sizes(network, samples.n, batch_size, accumulate)
    held = -(-batch_size // accumulate)
    first: list[_Block] = []  # of max(sizes) samples
    with _other_last_layer(network), untouched(network.model), _state_kept(network.model):
        batches = samples.batches(BATCH)
        for number, (x, _) in enumerate(samples.visit(batches)):
            start, end = batches[number]
            index = torch.arange(start, end, device="cpu")
            late = time.monotonic() - started > SECONDS
            if found.evidence or late:
                continue
            if number % ranks.size == ranks.rank:
                try:
                    block = _Block(index, x, *_run(network, x), network.last.rows)
                except Exception as error:  # whatever the user's own forward pass raises
                    raise ValueError(
                        f"{samples.name}: the model does not run on samples {start} to {end - 1}: "
                        f"{first_line(error)}"
                    ) from error
                found.evidence = (
                    _outputs_apart(network, block, network.logits(block.h))
                    or _compiled_apart(network, block)
                    or _regrouped(network, block, _parts(len(x), held), held)
                )
                if sum(len(part.x) for part in first) < max(sizes, default=0):
                    first.append(block)
            done = end
        if first and not found.evidence:
            whole = first[0]
            for block in first[1:]:
                parts = zip(whole[:4], block[:4], strict=True)
                whole = _Block(*map(torch.cat, parts), whole.each)  # type: ignore[call-arg, arg-type]
            of_sizes = (torch.arange(k, device="cpu") for k in sizes if k <= len(whole.x))
            found.evidence = _regrouped(network, whole, of_sizes, held)
    found.compared = True
    found.evidence = next((e for e in ranks.all_gather_object(found.evidence) if e), None)
    if done and not found.evidence:
        compared = "all" if done == samples.n else f"the first {done} of"
        found.extent = f"h is the same in other batches for {compared} {samples.n} samples"
    return found


@torch.no_grad()
def cache_disagreement(
    features: Features,
    network: Network,
    batch_size: int,
    at_most: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> str | None:
    """Evidence where the user's own model, on regrouped inputs, gives other h than the cache, or
    other outputs than the last layer's.

    The model is in evaluation mode. at_most: look at so many samples (all). advance: called with
    the number of samples that are done.
    """
    done = 0
    with _other_last_layer(network), untouched(network.model):
        each = network.last.rows
        for x, h, places in features.beside_inputs():
            index = torch.arange(done, done + len(x), device="cpu")
            if len(places) < len(x) * each:  # rows that do not count are in no cache
                h = network.hidden(x).index_copy_(0, places.to(h.device), h)
            block = _Block(index, x, h, network.logits(h), each)
            found = _regrouped(network, block, _parts(len(x), batch_size), batch_size)
            if found := found or _compiled_apart(network, block):
                return found
            done += len(x)
            advance(len(x))
            if at_most is not None and done >= at_most:
                break
    return None


@contextmanager
def _other_last_layer(network: Network) -> Iterator[None]:
    """Weights of the last layer at which nothing that follows it can hide (its own may be 0)."""
    with drawn(list(network.last.module.parameters(recurse=False)), 1.0):
        yield


def _run(network: Network, x: Tensor) -> tuple[Tensor, Any]:
    """h and the outputs, of the model as its owner calls it."""
    caught: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0] if args else kwargs["input"]).detach().clone())

    handle = network.last.module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with eager():
            outputs = network.model(x.clone())
    finally:
        handle.remove()
    h = caught[-1]
    return (h if h.dim() == 2 else network.hidden(x)), outputs  # of one token, where it is picked


def _regrouped(network: Network, block: _Block, parts: Iterable[Tensor], held: int) -> str | None:
    """Evidence where parts of the block have other features or outputs than the block.

    held: samples of which training holds the graph; gradients are on for as many.
    """
    for part in parts:
        index, x = block.samples[part], block.x.index_select(0, part.to(block.x.device))
        try:
            with torch.set_grad_enabled(len(part) <= held):
                now = _Block(index, x, *_run(network, x), block.each)
        except Exception as error:  # whatever the user's own forward pass raises
            return _does_not_run(index, error)
        rows = block.part(part)
        h = block.h[rows]
        bad = _first_apart(now.h, h, h.flatten(1).norm(dim=1))
        if bad is not None:
            row, apart, allowed = bad
            return (
                f"h of sample {int(index[row // block.each])} is another one in another batch: "
                "apart by "
                f"{apart:.2g} of its norm, rounding explains {allowed:.2g}"
            )
        if found := _outputs_apart(network, now, block.outputs[rows]):
            return found
    return None


def _compiled_apart(network: Network, block: _Block) -> str | None:
    """Evidence where the compiled model, as its owner runs it, gives other outputs."""
    if not compiled(network.model):
        return None
    try:
        outputs = network.model(block.x.clone())
    except Exception as error:  # whatever the compiler or the forward pass raises
        return _does_not_run(block.samples, error)
    return _outputs_apart(network, block._replace(outputs=outputs), block.outputs)


def _outputs_apart(network: Network, block: _Block, expected: Tensor) -> str | None:
    """Evidence where the block's outputs are not those expected."""
    weight, bias = network.last.module.weight, network.last.module.bias
    scale = block.h.flatten(1).norm(dim=1) * weight.norm()
    if bias is not None:
        scale = scale + bias.norm()
    outputs = block.outputs
    if not isinstance(outputs, Tensor) or outputs.shape != expected.shape:
        found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        return (
            f"the model's output is {found} for {len(block.samples)} samples, "
            f"{list(expected.shape)} expected"
        )
    bad = _first_apart(outputs, expected, scale)
    if bad is None:
        return None
    row, apart, allowed = bad
    sample = int(block.samples[row // block.each])
    return (
        f"the model's output for sample {sample} is not the last layer's of its "
        f"features: apart by {apart:.2g} of |h| |W|, rounding explains {allowed:.2g}"
    )


def _first_apart(a: Tensor, b: Tensor, scale: Tensor) -> tuple[int, float, float] | None:
    """The first row where a and b differ by more than rounding, how far, and the tolerance."""
    allowed = tolerance(b.device, b.dtype)
    if a.shape != b.shape:
        return 0, float("inf"), allowed
    apart = (a - b).flatten(1).norm(dim=1) / scale.clamp(min=torch.finfo(b.dtype).tiny)
    bad = (~(apart <= allowed)).nonzero()  # NaN is no agreement
    if not len(bad):
        return None
    row = int(bad[0])
    return row, float(apart[row]), allowed


def _parts(b: int, size: int) -> Iterator[Tensor]:
    """The b rows in another order, in two parts (no part of one: BatchNorm would not run)."""
    order = torch.randperm(b, generator=torch.Generator().manual_seed(b), device="cpu")
    cut = size if 2 <= size <= b - 2 else 3 * b // 8
    cuts = [0, b] if cut < 2 else [0, cut, b]
    for begin, end in pairwise(cuts):
        yield order[begin:end]


def _other_sizes(network: Network, n: int, size: int, accumulate: int) -> list[int]:
    """Sizes of training's batches that `_parts` of blocks of BATCH does not make."""
    steps = {end - begin for begin, end in pairwise(batch_bounds(network.model, n, size))}
    held = -(-size // accumulate)
    made = {held} if held <= min(n, BATCH) - 2 else set()
    parts = {max(1, k // accumulate) for k in steps} | {-(-k // accumulate) for k in steps}
    return sorted(parts - made)


def _does_not_run(index: Tensor, error: Exception) -> str:
    rows = ", ".join(map(str, index[:3].tolist()))
    return f"the model does not run on {len(index)} samples ({rows}, ...): {first_line(error)}"


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """ValueError where parameters or buffers have other bits afterwards."""
    before = State(model)
    yield
    if changed := before.changed():
        raise ValueError(
            f"model: its forward pass changes {', '.join(changed[:3])} in evaluation mode, so that "
            "no two passes are of the same function; let it change them in training mode alone"
        )
