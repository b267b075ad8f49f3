"""Make a model real analytic, as Theorem 1 asks of h_X: softplus for each kink, and a report."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from twophase_ext.core import arrays
from twophase_ext.model import layers

from ..calling import one_tensor
from ..softplus import Softplus, checked_beta
from . import smooth
from .catalog import is_container, judge_module
from .examples import examples
from .functions import NAMES, Settings, make_analytic
from .operators import Status
from .tracing import Trace, join, trace
from .watch import Watched, watch


class Finding(NamedTuple):
    """One module, or one function that a forward calls.

    name: the module's dotted path, "" for the model itself. kind: the module's type, or, for a
    call in that module's forward, "function relu" and the like.
    status: "analytic", "not analytic" or "unknown". reason: why, or what to use instead.
    """

    name: str
    kind: str
    status: Status
    reason: str


class Replacement(NamedTuple):
    """One place where a module was replaced: its path, the old and the new module as printed.

    note: what the stand-in does not keep of the old module, "" where nothing is lost.
    """

    name: str
    old: str
    new: str
    note: str


@dataclass(frozen=True)
class AnalyticReport:
    """What `analytic` replaced, and what still stands in the way.

    replaced: one `Replacement` per place. remaining: every `Finding` that is not "analytic".
    traced: whether every forward was followed, so that functional calls were seen too.
    """

    replaced: tuple[Replacement, ...]
    remaining: tuple[Finding, ...]
    traced: bool

    @property
    def is_analytic(self) -> bool:
        """Whether every module and every call that was seen is analytic in eval mode."""
        return self.traced and not self.remaining

    def __str__(self) -> str:
        """The report as readable tables."""
        rows = [
            (_shown(r.name), r.old, f"{r.new}  ({r.note})" if r.note else r.new)
            for r in self.replaced
        ]
        left = [(_shown(f.name), f.kind, f"{f.status}: {f.reason}") for f in self.remaining]
        parts = [
            f"analytic: {'yes' if self.is_analytic else 'not shown'}",
            f"replaced: {len(rows)}",
            *_table(("where", "was", "now"), rows),
            f"remaining: {len(left)}",
            *_table(("where", "what", "why"), left),
        ]
        if not self.traced:
            parts.append("functional calls were not all seen: some forward could not be followed")
        return "\n".join(parts)


def analytic(
    model: nn.Module,
    beta: float = 100.0,
    *,
    pooling: str = "smooth",
    example_input: Any = None,
) -> AnalyticReport:
    """Replace what has kinks in `model` by analytic counterparts, in place and at any depth.

    ReLU, RReLU, ELU, CELU, SELU, Threshold(0, 0), torch's thresholded nn.Softplus (which keeps its
    own beta) and the relu inside torch's transformer layers become `Softplus(beta)`; LeakyReLU,
    PReLU, ReLU6, Hardtanh, Hardsigmoid and Hardswish the same function with softplus for each of
    its kinks (smooth.py); max pooling the smooth maximum log(sum exp(beta x)) / beta of the same
    windows, or, with pooling="average", the mean of them, which costs less. The same functions
    called in a forward (F.relu, x.relu(), F.max_pool2d, ...) are replaced where the model is run on
    `example_input`, or on a made-up one, and seen to call them: that module's class becomes a
    subclass of its own class.

    One instance used in several places is replaced by one instance; `inplace` and the training
    mode are kept, and what trained before trains after. What the stand-in changes (a negative
    branch) is noted. Modules that are analytic stay. What is left (`torch.clamp`, `x.max()`, ...)
    is listed in the report's `.remaining`, as `classify` judges with this `example_input`.

    As softplus tends to ReLU with beta, the error is at most log(2) / beta a kink (section 5.2),
    and log(k) / beta for the smooth maximum of k numbers.
    Raises TypeError for a model that is not an nn.Module, ValueError where the model is itself
    the module to be replaced, or for a beta or pooling that is none.
    """
    beta = checked_beta(beta)
    if pooling not in ("smooth", "average"):
        raise ValueError(f'pooling: expected "smooth" or "average", got {pooling!r}')
    own = Settings(beta, pooling)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    model = layers.unwrap(model)
    if _stand_in(model, own) is not None:
        raise ValueError(
            f"model: it is itself an nn.{type(model).__name__}, nothing can be replaced in place; "
            "wrap it in nn.Sequential"
        )
    replaced = list(_replace(model, own))
    with _example(model, example_input) as batches:
        seen = _see(model, batches)
        if calls := list(_replace_calls(model, seen, own)):
            replaced += calls
            seen = _see(model, batches)
    remaining = tuple(f for f in _findings(model, seen) if f.status != "analytic")
    return AnalyticReport(tuple(replaced), remaining, traced=not seen.failures)


def classify(
    model: nn.Module, *, example_input: Any = None, whole: bool = True, frozen: bool = False
) -> list[Finding]:
    """Judge every module of `model`, as it is in eval mode, and every function that it calls.

    A copy of the model is run, and every operator that acts on what hangs on its parameters is
    judged, whoever calls it: forwards, hooks, parametrizations. What hangs on the inputs alone is
    constant in the weights, so that masks are no objection.

    example_input: a batch, tensor or array, a dict of them, or a list of batches. whole:
    whether these are all inputs that count; if not, a path chosen by inputs' values is "unknown".
    frozen: whether parameters with requires_grad=False are constants; what acts on these and on the
    inputs alone, kinks included, is then analytic: a constant in the weights.
    Without an example an input is made up and torch.fx has to be able to follow the model without
    values; where it cannot, or no made-up input fits, what the catalogue of torch's modules does
    not settle is "unknown".

    torch's containers (nn.Sequential, nn.ModuleList, ...) are left out. A module with a forward of
    its own is analytic if all that it calls is; otherwise each offending function is one entry, of
    the module that called it. One that is not called is no part of the function and left out, or
    "unknown" where something could not be followed. The model is not changed.
    Raises TypeError for a model that is not an nn.Module or an example that is no array.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    model = layers.unwrap(model)
    with _example(model, example_input) as batches:
        return list(_findings(model, _see(model, batches, whole, frozen), frozen))


@dataclass
class _Seen:
    """How a model was followed: by a run, and without an example by tracing too."""

    run: Watched
    trace: Trace | None

    @property
    def failures(self) -> dict[str, str]:
        """Path -> why it could not be followed."""
        traced = {} if self.trace is None else self.trace.failures
        return {"": self.run.failure, **traced} if self.run.failure else traced


@contextmanager
def _example(model: nn.Module, example_input: Any) -> Iterator[list[Tensor]]:
    """The batches, of a mapping as of one tensor; within it the model takes them."""
    if not isinstance(example_input, Mapping):
        yield _batches(model, example_input)
        return
    with one_tensor(model, example_input, "example_input") as x:
        yield _batches(model, x)


def _batches(model: nn.Module, example_input: Any) -> list[Tensor]:
    if example_input is None:
        return []
    batches = example_input if isinstance(example_input, list | tuple) else [example_input]
    parameter = next(model.parameters(), None)
    tensors = [arrays.as_tensor(batch, name="example_input") for batch in batches]
    return tensors if parameter is None else [t.to(parameter.device) for t in tensors]


def _see(
    model: nn.Module, batches: list[Tensor], whole: bool = True, frozen: bool = False
) -> _Seen:
    if batches:
        return _Seen(watch(model, batches, whole=whole, frozen=frozen), None)
    traced, run = trace(model), Watched()
    for example in examples(model):
        run = watch(model, [example], whole=False, frozen=frozen)
        if not run.failure:
            return _Seen(run, traced)
    if all(judge_module(m) is not None or is_container(m) for m in model.modules()):
        return _Seen(Watched(), Trace())  # torch's own code alone: there is nothing to follow
    return _Seen(Watched(failure=f"no made-up input fits ({run.failure}); give one"), traced)


def _findings(model: nn.Module, seen: _Seen, frozen: bool = False) -> Iterator[Finding]:
    # where nothing was seen, a module may act on anything
    constant = seen.run.reached - seen.run.weighed if frozen and not seen.failures else set()
    calls: dict[str, list[Finding]] = {}
    for (name, function), judged in seen.run.calls.items():
        calls.setdefault(name, []).append(Finding(name, f"function {function}", *judged))
    for name, module in model.named_modules():
        rule, kind, found = judge_module(module), type(module).__name__, calls.get(name, [])
        if rule is not None and name in constant:
            reason = "acts on inputs and frozen layers alone: constant in the weights"
            yield from found or [Finding(name, kind, "analytic", reason)]
        elif rule is not None:
            # torch's own code, by its rule, if nothing else was seen to happen there
            yield from (rule.status == "analytic" and found) or [Finding(name, kind, *rule)]
        elif name in seen.failures:
            yield from found
            yield Finding(name, kind, "unknown", seen.failures[name])
        elif found or is_container(module):
            yield from found
        elif name in seen.run.reached and (seen.trace is None or name in seen.trace.visited):
            reason = "its forward calls analytic functions only"
            yield Finding(name, kind, "analytic", reason)
        elif seen.failures:
            yield Finding(name, kind, "unknown", "not reached by the forward that was followed")


def _replace_calls(model: nn.Module, seen: _Seen, own: Settings) -> Iterator[Replacement]:
    modules = dict(model.named_modules())
    for path, function in seen.run.calls:
        module = modules.get(path)
        if function in NAMES and module is not None and judge_module(module) is None:
            try:
                make_analytic(module, own)
            except TypeError:  # a class that no other can take the place of: a scripted one
                continue
            kind = "average" if "pool" in function and own.pooling == "average" else "analytic"
            new = f"{kind} counterpart, beta={own.beta:g}"
            yield Replacement(path, f"{function} in {type(module).__name__}'s forward", new, "")


def _replace(model: nn.Module, own: Settings) -> Iterator[Replacement]:
    beta = own.beta
    done: dict[nn.Module, tuple[nn.Module, str]] = {}
    for path, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if child not in done:
                stand_in = _stand_in(child, own)
                if stand_in is None:
                    continue
                stand_in[0].train(child.training)
                done[child] = stand_in
            new, note = done[child]
            parent._modules[name] = new
            yield Replacement(join(path, name), str(child), str(new), note)
        if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            yield from _replace_transformer_relu(path, parent, beta)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(getattr(layer, "activation", None), Softplus) for layer in encoder.layers
        ):
            encoder.use_nested_tensor = False  # settled at construction, for the fused layers alone


def _replace_transformer_relu(path: str, layer: Any, beta: float) -> Iterator[Replacement]:
    if layer.activation is F.relu:
        layer.activation = Softplus(beta).train(layer.training)
        yield Replacement(join(path, "activation"), "F.relu", str(layer.activation), "")
    fused = getattr(layer, "activation_relu_or_gelu", 0)
    kinds = {1: (F.relu, nn.ReLU), 2: (F.gelu, nn.GELU)}.get(fused)
    if kinds and not (layer.activation is kinds[0] or isinstance(layer.activation, kinds[1])):
        # noted at construction; it would still send eval mode to torch's fused kernel
        layer.activation_relu_or_gelu = 0


def _stand_in(module: Any, own: Settings) -> tuple[nn.Module, str] | None:
    """The counterpart of a module with kinks and what it does not keep; None for other modules.

    Softplus keeps for the backward pass what the old module kept: its output alone, or numbers of
    its own, so that an operation in place after it does no more harm than before.
    """
    inplace = bool(getattr(module, "inplace", False))
    copy = not inplace or isinstance(module, nn.Threshold)
    beta = own.beta
    match module:
        case nn.Softplus():
            return Softplus(module.beta, keeps_copy=True), ""
        case nn.Hardtanh():  # ReLU6 too
            return smooth.SmoothHardtanh(module.min_val, module.max_val, beta, inplace), ""
        case nn.LeakyReLU():
            return smooth.SmoothLeakyReLU(module.negative_slope, beta, inplace), ""
        case nn.PReLU():
            return smooth.SmoothPReLU(module.weight, beta), ""
        case nn.Hardsigmoid():
            return smooth.SmoothHardsigmoid(beta, inplace), ""
        case nn.Hardswish():
            return smooth.SmoothHardswish(beta, inplace), ""
        case nn.MaxPool1d() | nn.MaxPool2d() | nn.MaxPool3d() if not module.return_indices:
            return _pooling(module, own)
        case nn.AdaptiveMaxPool1d() | nn.AdaptiveMaxPool2d() | nn.AdaptiveMaxPool3d():
            axes = int(type(module).__name__[-2])
            if module.return_indices or module.output_size not in (1, (1,) * axes):
                return None
            return smooth.SmoothGlobalMaxPool(axes=axes, beta=beta), ""
        case nn.RReLU():
            note = "the random negative slope is dropped"
        case nn.ELU() | nn.CELU():
            note = f"the negative branch, down to -{module.alpha:g}, is dropped"
        case nn.SELU():
            note = "the negative branch and the scale 1.0507 are dropped"
        case nn.Threshold(threshold=0, value=0):
            note = ""
        case nn.ReLU():
            note, copy = "", False
        case _:
            return None
    return Softplus(beta, inplace=inplace, keeps_copy=copy), note


def _pooling(module: Any, own: Settings) -> tuple[nn.Module, str]:
    axes = int(type(module).__name__[-2])
    windows = module.kernel_size, module.stride, module.padding
    if own.pooling == "average" and module.dilation in (1, (1,) * axes):
        kind = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[axes - 1]
        return kind(*windows, ceil_mode=module.ceil_mode, count_include_pad=False), "a mean"
    found = smooth.SmoothMaxPool(
        *windows, module.dilation, module.ceil_mode, axes=axes, beta=own.beta
    )
    return found, ""


def _shown(name: str) -> str:
    return name or "(model)"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    return [
        "  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in [head, *rows]
    ]
