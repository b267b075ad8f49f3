"""Operators that read or write by index: tables, gathering, and sums at given places."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...linalg.bounds import SLACK
from ..bounded import refuse
from .call import Call, Result
from .moves import dim_of, moved, owner_of
from .operand import Operand

Rule = Callable[[Call], list[Result]]


def _embedding(call: Call) -> list[Result]:
    index, weight = call.operand("indices"), call.operand("weight")
    if not weight.constant:
        return refuse("no rule for a table that depends on the samples")
    error = weight.error * math.sqrt(index.value.numel()) * SLACK
    if not index.constant:
        error = error.expand(call.owner.samples)
    return [Result(call.out, index.dim, index.ids, error)]


def _gather(call: Call) -> list[Result]:
    """Within each sample, at places that may be the sample's own."""
    x, index = call.operand("self"), call.operand("index")
    axis = call["dim"] % max(x.value.dim(), 1)
    if index.constant:
        return moved("self")(call)
    if not x.constant and (x.dim != index.dim or not torch.equal(x.ids, index.ids)):  # type: ignore[arg-type]
        return refuse("it brings different samples together")
    if axis in (x.dim, index.dim):
        return refuse("it mixes the samples")
    times = index.value.shape[axis]
    error = (x.error if not x.constant else x.error.expand(call.owner.samples)) * math.sqrt(times)
    return [Result(call.out, index.dim, index.ids, error * SLACK, x.huge)]


def _index(call: Call) -> list[Result]:
    """x[i, j, ...], one broadcast block of indices: whose each number of the result is, by both."""
    indices = call["indices"] if "indices" in call.given else [None] * call["dim"] + [call["index"]]
    known = [call.known(t) for t in indices if isinstance(t, Tensor)]
    x = call.operand("self", masks=True)
    if all(operand.constant for operand in known):
        return moved("self")(call)
    axes = [k for k, t in enumerate(indices) if t is not None]
    if axes != list(range(axes[0], axes[-1] + 1)) or any(
        operand.value.dtype == torch.bool for operand in known
    ):
        return refuse("no rule for places that depend on the samples")
    shape = torch.broadcast_shapes(*(operand.value.shape for operand in known))
    own = torch.stack([owner_of(k.expanded(shape)) for k in known])
    owners, other = own.amax(0), torch.where(own < 0, call.owner.samples, own).amin(0)
    view = [1] * axes[0] + list(shape) + [1] * (call.out.dim() - axes[0] - len(shape))
    owners, other = (t.reshape(view).expand(call.out.shape) for t in (owners, other))
    if not x.constant:
        source = call.func(**{**call.given, "self": owner_of(x)})
        owners, other = torch.maximum(owners, source), torch.minimum(other, source)
    if bool((other != owners).logical_and(owners >= 0).any()) or bool((owners < 0).any()):
        return refuse("it brings different samples together")
    dim, ids = dim_of(owners, call.owner.samples)
    # the same number may be read at every place
    times = math.prod(shape)
    error = x.error.expand(call.owner.samples) * math.sqrt(times) * SLACK
    return [Result(call.out, dim, ids, error, x.huge)]


def _together(call: Call, operands: Sequence[Operand]) -> tuple[int | None, Tensor | None]:
    found = [o for o in operands if not o.constant]
    if not found:
        return None, None
    first = found[0]
    if any(o.dim != first.dim or not torch.equal(o.ids, first.ids) for o in found):  # type: ignore[arg-type]
        refuse("it brings different samples together")
    return first.dim, first.ids


def _sums_at(source: str, kinds: Sequence[str] = ("sum",)) -> Rule:
    """self, and numbers of `source` added at their places: at most so many meet in one of them."""

    def rule(call: Call) -> list[Result]:
        x, values, index = call.operand("self"), call.operand(source), call.operand("index")
        kind = call["reduce"] or "sum"
        if kind not in kinds or abs(float(call["alpha"] or 1)) != 1:
            return refuse(f"no rule for {kind}")
        operands = [x, values, index] if index.value.dim() == x.value.dim() else [x, values]
        dim, ids = _together(call, operands)
        if not index.constant and len(operands) == 2:
            return refuse("no rule for places that depend on the samples")
        if dim is not None and call["dim"] % x.value.dim() == dim:
            return refuse("it mixes the samples")
        if kind in ("amax", "amin"):
            return [Result(call.out, dim, ids, (x.error.square() + values.error.square()).sqrt())]
        ones = {
            **call.given,
            "self": torch.zeros_like(x.value),
            source: torch.ones_like(values.value),
        }
        if "reduce" in ones:
            ones |= {"reduce": "sum", "include_self": True}
        times = max(float(call.func(**ones).max()), 1.0)
        if kind == "sum" and _counts(x) and _counts(values) and _counted(call):
            return [Result(call.out, dim, ids, call.zeros(x, values))]
        # a mean is no longer than the sum
        norm, terms = math.sqrt(times), call.gamma(times + 4)
        error = x.error + norm * values.error + terms * (x.norm + norm * values.norm)
        return [Result(call.out, dim, ids, error * SLACK)]

    return rule


def _counts(x: Operand) -> bool:
    """Whether these are exact whole numbers: degrees of nodes are sums of such."""
    return x.exact and bool((x.value == x.value.round()).all())


def _counted(call: Call) -> bool:
    """Whether no sum of whole numbers has left those that the type holds exactly."""
    return not call.out.numel() or float(call.out.abs().max()) * 2 * call.u < 1


def _index_put(call: Call) -> list[Result]:
    """Constants written at places that are constant, or each sample's own."""
    x, values = call.operand("self", masks=True), call.operand("values")
    places = [call.known(t) for t in call["indices"] if isinstance(t, Tensor)]
    own = [p for p in places if not p.constant]
    whole = len(own) == len(places) == 1 and own[0].value.dtype == torch.bool
    if not values.constant or call["accumulate"] or (own and not whole):
        return refuse("no rule for what it writes")
    if own and (own[0].dim != x.dim or not torch.equal(own[0].ids, x.ids)):  # type: ignore[arg-type]
        return refuse("it brings different samples together")
    error = x.error
    if not values.exact:
        error = error + values.error * math.sqrt(call.out.numel()) * SLACK
    return [Result(call.out, x.dim, x.ids, error, x.huge)]


PLACES: dict[str, Rule] = {
    "embedding": _embedding,
    "gather": _gather,
    **dict.fromkeys(("index", "index_select"), _index),
    "scatter_add": _sums_at("src"),
    "scatter_reduce": _sums_at("src", ("sum", "mean", "amax", "amin")),
    "index_add": _sums_at("source"),
    "index_put": _index_put,
}
