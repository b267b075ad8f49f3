"""Whether h and the outputs are fixed functions of a sample, whatever stands beside it in a batch.

The premise "fixed features" of Theorem 1, and what a cache of features rests on.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..network import Network
from ..probing import eager, untouched
from .data import Samples
from .features import BATCH, Features
from .freeze import tensors_hash
from .ranks import Ranks

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


def tolerance(device: torch.device, dtype: torch.dtype) -> float:
    """How far two passes may be apart by rounding, relative to the row's norm."""
    reduced = 0.0
    if dtype is torch.float32:
        chosen = torch.get_float32_matmul_precision()
        tf32 = device.type == "cuda" and (chosen == "high" or torch.backends.cudnn.allow_tf32)
        reduced = 2.0**-8 if chosen == "medium" else 2.0**-11 * (tf32 or chosen == "high")
    return max(ROUNDINGS * torch.finfo(dtype).eps, REDUCED * reduced)


def agreement(
    network: Network, samples: Samples, batch_size: int, ranks: Ranks | None = None
) -> Agreement:
    """Compare two passes over all samples in evaluation mode: as they come, and regrouped.

    The outputs must be the last layer's. Each batch is fetched once. Each rank passes its own
    batches, and all learn of a disagreement.

    Raises ValueError where the model does not run on these samples, or its forward pass changes
    parameters or buffers in evaluation mode.
    """
    ranks = ranks or Ranks()
    found, started, done = Agreement(), time.monotonic(), 0
    with untouched(network.model), _state_kept(network.model):
        for number, (start, end) in enumerate(samples.batches(BATCH)):
            x, _ = samples.fetch(torch.arange(start, end, device="cpu"), augmented=False)
            late = time.monotonic() - started > SECONDS
            if found.evidence or late:
                continue
            if number % ranks.size == ranks.rank:
                try:
                    h, outputs = _run(network, x)
                except Exception as error:  # whatever the user's own forward pass raises
                    raise ValueError(
                        f"{samples.name}: the model does not run on samples {start} to {end - 1}: "
                        f"{_first_line(error)}"
                    ) from error
                found.evidence = _outputs_apart(
                    network, h, outputs, network.logits(h), start
                ) or _regrouped(network, x, h, outputs, start, batch_size)
            done = end
    found.compared = True
    found.evidence = next((e for e in ranks.collect(found.evidence) if e), None)
    if done and not found.evidence:
        whole = "all" if done == samples.n else f"the first {done} of"
        found.extent = f"h is the same in other batches for {whole} {samples.n} samples"
    return found


@torch.no_grad()
def cache_disagreement(features: Features, network: Network, batch_size: int) -> str | None:
    """Evidence where the user's own model, on regrouped inputs, gives other outputs than the cache.

    The model is in evaluation mode.
    """
    done = 0
    with untouched(network.model):
        for x, h in features.beside_inputs():
            expected = network.logits(h)
            for part in _parts(len(x), batch_size):
                try:
                    with eager():
                        outputs = network.model(x[part])
                except Exception as error:  # whatever the user's own forward pass raises
                    return _does_not_run(part, done, error)
                found = _outputs_apart(network, h[part], outputs, expected[part], done, part)
                if found:
                    return found
            done += len(x)
    return None


def _run(network: Network, x: Tensor) -> tuple[Tensor, Any]:
    """h and the outputs, of the model as its owner calls it."""
    caught: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0] if args else kwargs["input"]).clone())

    handle = network.last.module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with eager():
            outputs = network.model(x.clone())
    finally:
        handle.remove()
    return caught[-1], outputs


def _regrouped(
    network: Network, x: Tensor, h: Tensor, outputs: Tensor, start: int, size: int
) -> str | None:
    for part in _parts(len(x), size):
        try:
            h_now, outputs_now = _run(network, x[part])
        except Exception as error:  # whatever the user's own forward pass raises
            return _does_not_run(part, start, error)
        bad = _first_apart(h_now, h[part], h[part].flatten(1).norm(dim=1))
        if bad is not None:
            row, apart, allowed = bad
            return (
                f"h of sample {start + int(part[row])} is another one in another batch: apart by "
                f"{apart:.2g} of its norm, rounding explains {allowed:.2g}"
            )
        found = _outputs_apart(network, h[part], outputs_now, outputs[part], start, part)
        if found:
            return found
    return None


def _outputs_apart(
    network: Network,
    h: Tensor,
    outputs: Any,
    expected: Tensor,
    start: int,
    part: Tensor | None = None,
) -> str | None:
    weight, bias = network.last.module.weight, network.last.module.bias
    scale = h.flatten(1).norm(dim=1) * weight.norm()
    if bias is not None:
        scale = scale + bias.norm()
    if not isinstance(outputs, Tensor) or outputs.shape != expected.shape:
        found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        return (
            f"the model's output is {found} for {len(h)} samples, {list(expected.shape)} expected"
        )
    bad = _first_apart(outputs, expected, scale)
    if bad is None:
        return None
    row, apart, allowed = bad
    sample = start + (row if part is None else int(part[row]))
    return (
        f"the model's output for sample {sample} is not the last layer's of its features: apart by "
        f"{apart:.2g} of |h| |W|, rounding explains {allowed:.2g}"
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


def _does_not_run(part: Tensor, start: int, error: Exception) -> str:
    rows = ", ".join(str(start + int(i)) for i in part[:3])
    return f"the model does not run on {len(part)} samples ({rows}, ...): {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """ValueError where parameters or buffers have other bits afterwards; parameters come back."""
    before = {name: (t, t.detach().clone()) for name, t in _state(model).items()}
    yield
    now = _state(model)
    changed = [n for n, (_, value) in before.items() if n not in now or not _same(now[n], value)]
    changed += [n for n in now if n not in before]
    if not changed:
        return
    with torch.no_grad():
        for t, value in before.values():
            if isinstance(t, nn.Parameter) and not _same(t, value):
                t.copy_(value)
    raise ValueError(
        f"model: its forward pass changes {', '.join(changed[:3])} in evaluation mode, so that no "
        "two passes are of the same function; let it change them in training mode alone"
    )


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _same(a: Tensor, b: Tensor) -> bool:
    return tensors_hash({"": a}) == tensors_hash({"": b})
