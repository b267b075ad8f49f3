"""Models of several inputs, or whose output is no tensor: called as x -> logits all the same.

Several inputs (a dict, as tokenizers make it; a tuple) are packed into one tensor [n, numbers], a
row a sample, which everything else sees: batches, hashes, comparisons of inputs, certificates. A
pre-hook of the model unpacks it, and a hook takes the logits out of what comes back: of an output
for each token or pixel, [b, t, k] or [b, k, height, width], a row each, [b t, k]. Other calls, with
the inputs as the model's owner gives them, pass by.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arrays import as_data
from .datasets import inputs_of
from .probing import Call, main_output, record, require_module, same_memory, unwrap
from .purity import held_back

_EXACT = 1 << 24  # whole numbers that every real type of a model holds


@dataclass(frozen=True)
class Packing:
    """How several inputs lie in one tensor [b, numbers].

    names: of keyword arguments, None for a positional one; shapes (of a sample) and dtypes: of
    each; rest: arguments that are no arrays, the same for every sample.
    """

    names: tuple[str | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    rest: tuple[tuple[str, Any], ...] = ()

    @property
    def width(self) -> int:
        """Numbers of a sample."""
        return sum(map(math.prod, self.shapes))

    def unpack(self, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """(positional, keyword) arguments of the rows of x [b, width]."""
        args: list[Tensor] = []
        kwargs: dict[str, Any] = dict(self.rest)
        start = 0
        for name, shape, dtype in zip(self.names, self.shapes, self.dtypes, strict=True):
            part = x[:, start : start + math.prod(shape)].reshape(len(x), *shape)
            start += math.prod(shape)
            if not (dtype.is_floating_point and x.is_floating_point()):
                part = part.to(dtype)
            if name is None:
                args.append(part)
            else:
                kwargs[name] = part
        return tuple(args), kwargs


def is_several(x: Any) -> bool:
    """Whether x is several inputs: a mapping, or a tuple."""
    return isinstance(x, Mapping | tuple)


def pack(x: Any, name: str) -> tuple[Tensor, Packing]:
    """Several inputs [n, ...] as one tensor [n, numbers], and how they lie in it.

    int64 where all are whole numbers, else the widest real type among them. Raises ValueError where
    they are not of one length, or where whole numbers beside real ones are beyond 2^24; TypeError
    where there is no array.
    """
    # by name: the order of a dict says nothing
    entries = sorted(x.items()) if isinstance(x, Mapping) else [(None, part) for part in x]
    arrays: list[tuple[str | None, Tensor]] = []
    rest: list[tuple[str, Any]] = []
    for key, part in entries:
        if key is not None and (part is None or isinstance(part, bool | int | float | str)):
            rest.append((key, part))
        else:
            what = f"{name}[{key!r}]" if key is not None else f"{name}[{len(arrays)}]"
            arrays.append((key, as_data(part, name=what)))
    if not arrays:
        raise TypeError(f"{name}: expected arrays, got {[key for key, _ in entries]}")
    lengths = {len(part) if part.dim() else -1 for _, part in arrays}
    if len(lengths) > 1 or -1 in lengths:
        shapes = {key: list(part.shape) for key, part in arrays}
        raise ValueError(f"{name}: expected inputs of one length, got {shapes}")
    real = [part.dtype for _, part in arrays if part.is_floating_point()]
    dtype = torch.int64
    for other in real:
        dtype = other if dtype == torch.int64 else torch.promote_types(dtype, other)
    rows = []
    for key, part in arrays:
        whole = bool(real) and not part.is_floating_point() and part.numel() > 0
        if whole and int(part.long().abs().max()) > _EXACT:
            raise ValueError(
                f"{name}: whole numbers beside real inputs are kept as real ones, up to 2^24; "
                f"{key!r} has larger ones"
            )
        rows.append(part.reshape(len(part), math.prod(part.shape[1:])).to(dtype))
    packing = Packing(
        tuple(key for key, _ in arrays),
        tuple(tuple(part.shape[1:]) for _, part in arrays),
        tuple(part.dtype for _, part in arrays),
        tuple(rest),
    )
    return torch.cat(rows, 1), packing


def serve(model: nn.Module, packing: Packing | None, example: Tensor) -> int | None:
    """From now on the model takes one tensor and gives one, [rows, m_y], until `dismiss`.

    example: one or two samples as the model is fed them, to see what its output is. A model that
    does that by itself stays as it is. Rows are samples; where the last layer runs on every token
    or pixel and the model gives all of it, those, sample by sample. Returns the dimension of the
    outputs then, 0 where [b, m_y] was reshaped, and None where it is [b, m_y] as it is.
    """
    require_module(model)
    inner = unwrap(model)
    dismiss(inner)
    if packing is not None:
        inner.register_forward_pre_hook(_Unpacks(packing), with_kwargs=True, prepend=True)
    try:
        with held_back(model):
            calls, output = record(model, example, nn.Linear)
    except Exception:  # what it does not take, it is asked again by whoever says why
        return None
    main = output if isinstance(output, Tensor) else main_output(output)
    if main is None:
        return None
    form = _form(calls, main)
    if form is not None or not isinstance(output, Tensor):
        inner.register_forward_hook(_TakesLogits(form))
    return form


def dismiss(model: nn.Module) -> None:
    """Undo `serve`, on a copy of the model too."""
    inner = unwrap(model)
    hooks: tuple[Any, ...] = (inner._forward_pre_hooks, inner._forward_hooks)
    for own in hooks:
        for key in [k for k, hook in own.items() if isinstance(hook, _Unpacks | _TakesLogits)]:
            del own[key]
            inner._forward_pre_hooks_with_kwargs.pop(key, None)


@contextmanager
def one_tensor(model: nn.Module, x: Any, name: str = "x") -> Iterator[Any]:
    """x, packed where it is several inputs; within it the model takes that and gives logits.

    x may be a Dataset or a DataLoader, too: its inputs.
    """
    require_module(model)
    packing, x = None, inputs_of(x, name)
    if is_several(x):
        x, packing = pack(x, name)
    try:
        array = as_data(x, name=name)
    except Exception:  # said by whoever checks x
        yield x
        return
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    example = array[:2] if array.dim() else array
    if parameter is not None:
        example = example.to(parameter.device)
        if example.is_floating_point() or example.dtype == torch.uint8:
            example = example.to(parameter.dtype)
    serve(model, packing, example)
    try:
        yield x
    finally:
        dismiss(model)


class _Unpacks:
    """A forward pre-hook; no closure, so that copies of the model can be dismissed."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == self.packing.width:
            return self.packing.unpack(x)
        return None


class _TakesLogits:
    """A forward hook. form: the dimension of the outputs, all others being rows (`_form`)."""

    def __init__(self, form: int | None) -> None:
        self.form = form

    def __call__(self, _: nn.Module, args: Any, output: Any) -> Any:
        main = output if isinstance(output, Tensor) else main_output(output)
        if main is None or self.form is None:
            return main
        if self.form == 0:
            return main.reshape(len(main), -1)
        return main.movedim(self.form, -1).flatten(0, -2)


def _form(calls: list[Call], output: Tensor) -> int | None:
    """How the output is the last layer's, where it is not [b, m_y]; None where it is, or is not.

    0: the layer ran on [b, m_H], and its output was reshaped. Else the dimension of the outputs:
    the layer ran on every token or pixel.
    """
    for call in reversed(calls):
        own = call.output
        if not isinstance(own, Tensor) or not same_memory(own, call.output_version, output):
            continue
        if own.dim() == 2:
            return None if output.shape == own.shape else 0
        for dim in range(1, output.dim()):
            moved = output.movedim(dim, -1)
            if moved.shape == own.shape and moved.stride() == own.stride():
                return dim
    return None
