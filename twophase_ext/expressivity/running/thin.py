"""Tensors most of whose channels are constant: only the others are computed.

A witness may have weights that are zero but for a few channels (backbone.py). A channel that no
live weight reaches is one number at every place of every sample. It is kept as that number, with
its error, through convolutions, normalization, element-wise maps, sums, pooling and linear layers,
each of which acts on the live channels as the same operator with a part of its weights: products
with zeros are left out, and nothing else, so the numbers are those of the whole network. Python
sees a tensor of the right geometry whose memory nobody may touch (untouched.py); whatever has no
rule here gets all of the tensor, written out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ...linalg.bounds import SLACK
from ..bounded import Refused, Unbounded
from .call import Call, Pass, Result
from .notes import Note, laid_out, mark
from .rules import RULES
from .untouched import Untouched
from .writes import ruled

TOUCHED = "an operand was read or written by what is no operator"


@dataclass(frozen=True)
class Thin:
    """A tensor [b, C, ...] of the geometry (shape, stride), its channels along dimension 1.

    value [b, k, ...]: those of the channels live [k], ascending; None where k = 0. rest [1, C, 1,
    ...]: the number of every other channel. Both are tensors of the pass, with notes of their own.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    live: Tensor
    value: Tensor | None
    rest: Tensor


class Owner(Pass, Protocol):
    """What is asked of the pass. pruned: see `live_part`. weights: names, by storage."""

    weights: dict[int, str]
    pruned: dict[str, Tensor] | None
    untouched: Untouched

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator itself."""
        ...

    def keep(self, result: Result) -> None:
        """Note what a rule said of a tensor that nobody else sees."""
        ...


Found = tuple[Tensor, Tensor | None, Tensor] | None  # live, value, rest
Rule = Callable[[Owner, Any, tuple[Any, ...], dict[str, Any]], Found]


def thin_of(owner: Pass, tensor: Any) -> Thin | None:
    """What is known of a tensor that is all of a thin one, as it is."""
    note = owner.notes.of(tensor) if isinstance(tensor, Tensor) else None
    thin: Thin | None = None if note is None else note.thin
    if thin is None or tensor.storage_offset() != 0:
        return None
    return thin if (tuple(tensor.shape), tensor.stride()) == (thin.shape, thin.stride) else None


def thinned(owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the operator makes, by its live channels; None where no rule here applies.

    In place as well, where it writes all of a thin tensor.
    """
    name = func._schema.name.removeprefix("aten::")
    target = args[0] if name.endswith("_") and args else None
    if target is not None:
        if thin_of(owner, target) is None or any(_reads(args[1:], target)):
            return None
        space, _, own = func._schema.name.partition("::")
        packet = getattr(getattr(torch.ops, space), own[:-1], None)
        func = getattr(packet, func._overloadname, None)
        name = name[:-1]
    rule = _RULES.get(name)
    if rule is None or func is None or owner.samples < 2:
        return None
    found = rule(owner, func, args, kwargs)
    if found is None:
        return None
    if target is not None:
        return _noted(owner, target, *found)
    made = func(*tree_map(_described, args), **tree_map(_described, kwargs))
    first, *others = made if isinstance(made, tuple) else (made,)
    out = owner.untouched.like(first)
    _noted(owner, out, *found)
    if not isinstance(made, tuple):
        return out
    return out, *(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in others)


def whole(owner: Owner, tensor: Tensor) -> None:
    """Write out a thin tensor, all of its channels, whichever view of its storage this is."""
    note = owner.notes.of(tensor)
    if note is None or note.thin is None:
        return
    thin: Thin = note.thin
    out = tensor.as_strided(thin.shape, thin.stride, 0)
    if not owner.untouched.release(out):
        raise Refused(TOUCHED)
    out.copy_(thin.rest.expand(thin.shape))
    if thin.value is not None:
        out.index_copy_(1, thin.live, thin.value)
    owner.notes.write(out, replace(note, thin=None))


def _reads(args: tuple[Any, ...], target: Tensor) -> list[bool]:
    """Whether an argument lies in the storage that is written."""
    own = target.untyped_storage()._cdata
    return [isinstance(a, Tensor) and a.untyped_storage()._cdata == own for a in args]


def _described(given: Any) -> Any:
    if not isinstance(given, Tensor):
        return given
    return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device="meta")


def _noted(owner: Owner, out: Tensor, live: Tensor, value: Tensor | None, rest: Tensor) -> Tensor:
    if not bool(rest.isfinite().all()):  # zero times it is not zero in the model itself
        raise Unbounded("a constant overflows")
    if (value is None) != (len(live) == 0) or (
        value is not None and value.shape != (len(out), len(live), *out.shape[2:])
    ):
        raise Unbounded("its channels are not those of its operands")
    thin = Thin(tuple(out.shape), out.stride(), live, value, rest)
    off = owner.operand(rest).error * math.sqrt(math.prod(thin.shape[2:]))
    error = off.expand(owner.samples)
    if value is not None:
        error = (owner.operand(value).error.square() + off.square()).sqrt() * SLACK
    note = laid_out(out, 0, torch.arange(owner.samples), error)
    owner.notes.write(out, replace(note, thin=thin), seen=False)
    return out


def _applied(owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The operator on tensors of the pass, noted by its own rule."""
    made = owner.compute(func, args, kwargs)
    outs = list(made) if isinstance(made, tuple) else [made]
    call = Call(owner, func, args, kwargs, outs)
    for result in ruled(RULES[func._schema.name.removeprefix("aten::")], call):
        owner.keep(result)
    return outs[0]


def _is_constant(owner: Owner, *tensors: Tensor | None) -> bool:
    """Whether these are stored numbers of float64, or not there."""
    return all(
        t is None or (t.dtype == torch.float64 and owner.notes.of(t) is None) for t in tensors
    )


def _by_sample(owner: Owner, x: Tensor) -> bool:
    """Whether x [b, ...] holds a sample in each row, and all of its numbers."""
    note = owner.notes.of(x)
    if note is None or note.thin is not None or note.ids is None or note.lost:
        return False
    if x.dtype != torch.float64 or x.dim() < 2 or len(x) != owner.samples:
        return False
    operand = owner.operand(x)
    return operand.dim == 0 and not operand.huge


def live_part(
    owner: Owner, weight: Tensor, live: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor] | None:
    """(live rows, their weights for the live columns) of a weight [out, in, ...].

    live: channels that are not constant, None for all. centred: the middle pixel alone, where the
    other weights are zero. None where weights of other columns are not zero; where the pass prunes
    (`pruned`, name -> live columns) these count as zero, and it is written down.
    """
    columns = None if live is None else tuple(live.tolist())
    place = weight.data_ptr(), tuple(weight.shape), weight.stride()
    key = ("thin", *place, mark(weight), columns, centred)
    if key not in owner.norms or owner.pruned is not None:
        own = weight.detach()
        found = own if live is None else own.index_select(1, live)
        dead = torch.ones(own.shape[1], dtype=torch.bool)
        dead[slice(None) if live is None else live] = False
        part: tuple[Tensor, Tensor] | None = None
        name = owner.weights.get(weight.untyped_storage()._cdata)
        useless = bool(own[:, dead].any())
        if useless and owner.pruned is not None and name is not None:
            owner.pruned[name], useless = ~dead, False
        if not useless:
            rows = found.flatten(1).any(1).nonzero()[:, 0]
            found = found.index_select(0, rows)
            part = rows, (_middle_alone(found) if centred else found).contiguous()
        owner.norms[key] = weight, part  # kept: its place is not given away
    found_part: tuple[Tensor, Tensor] | None = owner.norms[key][1]
    return found_part


def _middle_alone(weights: Tensor) -> Tensor:
    """The middle pixel as a kernel of its own, where the other ones are zero; else all."""
    taps = weights.flatten(2)
    middle = taps.shape[2] // 2
    if taps.shape[2] == 1 or bool(taps[..., :middle].any() or taps[..., middle + 1 :].any()):
        return weights
    return taps[..., middle].reshape(*taps.shape[:2], *[1] * (weights.dim() - 2))


def _affine(
    owner: Owner,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    centred: bool = False,
) -> Found:
    """Of weight [out, in, ...]; apply: to live channels, with their weights and bias.

    centred: whether a middle pixel alone does what a convolution of single pixels does.
    """
    own = thin_of(owner, x)
    if not _is_constant(owner, weight, bias) or (own is None and not _by_sample(owner, x)):
        return None
    part = live_part(owner, weight, None if own is None else own.live, centred)
    if part is None or (own is None and 2 * len(part[0]) > len(weight)):
        return None
    live, weights = part
    rest = weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()
    rest = rest.view(1, -1, *[1] * (x.dim() - 2))
    value = None
    inner = x if own is None else own.value
    if len(live) and inner is not None:
        value = apply(inner, weights, None if bias is None else bias[live])
    return live, value, rest


def _convolution(owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    x, weight, bias, *others = args
    transposed, groups = others[3], others[5]
    if kwargs or transposed or groups != 1:
        return None
    stride, padding, dilation, *rest = others
    sizes = weight.shape[2:]
    centred = all(
        k % 2 == 1 and 2 * p == d * (k - 1)
        for k, p, d in zip(sizes, padding, dilation, strict=True)
    )

    def apply(inner: Tensor, weights: Tensor, part: Tensor | None) -> Tensor:
        padded = padding if weights.shape[2:] == sizes else [0] * len(sizes)
        given = (inner, weights, part, stride, padded, dilation, *rest)
        return _applied(owner, func, given, {})

    return _affine(owner, x, weight, bias, apply, centred)


def _addmm(owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    bias, x, weight = args if len(args) == 3 else (None, *args)
    if kwargs or not isinstance(weight, Tensor) or (bias is not None and bias.dim() != 1):
        return None

    def apply(inner: Tensor, weights: Tensor, part: Tensor | None) -> Tensor:
        given = (inner, weights.mT) if part is None else (part, inner, weights.mT)
        return _applied(owner, func, given, {})

    return _affine(owner, x, weight.mT, bias, apply)


def _batch_norm(owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    x, weight, bias, mean, variance, training, *others = args
    own = thin_of(owner, x)
    parts = weight, bias, mean, variance
    if own is None or kwargs or training or mean is None or not _is_constant(owner, *parts):
        return None
    rest = _applied(owner, func, (own.rest, *parts, training, *others), {})
    value = None
    if own.value is not None:
        live = [None if part is None else part[own.live] for part in parts]
        value = _applied(owner, func, (own.value, *live, training, *others), {})
    return own.live, value, rest


def _channelwise(owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    """Number by number, beside plain numbers."""
    own = thin_of(owner, args[0]) if args else None
    if own is None or any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values())):
        return None
    rest = _applied(owner, func, (own.rest, *args[1:]), kwargs)
    value = None if own.value is None else _applied(owner, func, (own.value, *args[1:]), kwargs)
    return own.live, value, rest


def _averages(owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    """Of places: what is constant stays so, where no zeros are padded."""
    own = thin_of(owner, args[0])
    if own is None or kwargs.get("dtype") is not None:
        return None
    name = func._schema.name
    if name == "aten::avg_pool2d":
        given = dict(
            zip(("kernel", "stride", "padding", "ceil", "pad", "by"), args[1:], strict=False)
        )
        if any(given.get("padding") or ()) or given.get("ceil") or given.get("by") or kwargs:
            return None
    elif name == "aten::mean":
        dims = [d % len(own.shape) for d in args[1] or ()]
        if not dims or min(dims) < 2:
            return None
    rest = own.rest
    if name == "aten::mean" and not (args[2] if len(args) > 2 else kwargs.get("keepdim")):
        rest = rest.view(1, -1, *[1] * (len(own.shape) - len(dims) - 2))
    value = None if own.value is None else _applied(owner, func, (own.value, *args[1:]), kwargs)
    return own.live, value, rest


def _sum(owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    x, y = args[:2]
    if not isinstance(y, Tensor):
        return _channelwise(owner, func, args, kwargs)
    if kwargs or len(args) > 2 or x.shape != y.shape or x.dim() < 2:
        return None
    first, second = thin_of(owner, x), thin_of(owner, y)
    if first is None or second is None:
        return None
    if func._schema.name == "aten::add" and first.value is None:
        first, second = second, first
    live = torch.cat([first.live, second.live]).unique()
    rest = _applied(owner, func, (first.rest, second.rest), {})
    nothing = second.value is None and not bool(second.rest.any())
    if nothing and owner.operand(second.rest).exact:
        return live, first.value, first.rest
    parts = [_spread(owner, own, live) for own in (first, second)]
    return live, None if len(live) == 0 else _applied(owner, func, tuple(parts), {}), rest


def _spread(owner: Owner, own: Thin, live: Tensor) -> Tensor:
    """The channels `live`, which are its own live ones and others; a constant without any."""
    if own.value is None:
        rest = own.rest.index_select(1, live)
        owner.notes.write(rest, Note(owner.operand(own.rest).error), seen=False)
        return rest
    if len(live) == len(own.live):
        return own.value
    shape = (own.shape[0], len(live), *own.shape[2:])
    out = own.rest.index_select(1, live).expand(shape).clone()
    out.index_copy_(1, torch.searchsorted(live, own.live), own.value)
    off = owner.operand(own.rest).error * math.sqrt(math.prod(own.shape[2:]))
    error = (owner.operand(own.value).error.square() + off.square()).sqrt() * SLACK
    owner.keep(Result(out, 0, torch.arange(owner.samples), error))
    return out


_RULES: dict[str, Rule] = {
    "convolution": _convolution,
    **dict.fromkeys(("addmm", "mm"), _addmm),
    "native_batch_norm": _batch_norm,
    **dict.fromkeys(
        (
            *("relu", "gelu", "silu", "mish", "tanh", "sigmoid", "elu", "leaky_relu", "hardtanh"),
            *("clone", "neg", "twophase::softplus", "softplus", "mul", "div"),
        ),
        _channelwise,
    ),
    **dict.fromkeys(("avg_pool2d", "_adaptive_avg_pool2d", "mean"), _averages),
    **dict.fromkeys(("add", "sub"), _sum),
}
