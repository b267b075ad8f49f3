"""Find the last affine layer and the wide softplus layer of any model by running it once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .nn.softplus import Softplus


@dataclass(frozen=True)
class LastLayer:
    """The affine last layer: its dotted name and module."""

    name: str
    module: nn.Linear


@dataclass(frozen=True)
class WideLayer:
    """The last hidden layer where it is affine + exact softplus: h = softplus(linear(z), beta)."""

    name: str
    linear: nn.Linear
    beta: float


class _Stop(Exception):
    """Ends a forward pass once the input that was asked for is known."""


def canonical_name(name: str) -> str:
    """A parameter's name without the components that wrappers (DataParallel, compile) add."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def input_of(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """The input that `module` gets when the model is run on x; nothing after it is computed.

    Raises ValueError where the model's forward pass does not reach the module.
    """
    caught: list[Tensor] = []

    def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        caught.append(arguments[0])
        raise _Stop

    handle = module.register_forward_pre_hook(stop)
    try:
        model(x)
    except _Stop:
        return caught[0]
    finally:
        handle.remove()
    raise ValueError("model: its forward pass does not reach the layer that was asked for")


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, buffers and random state come back afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def _record(
    model: nn.Module, example: Tensor, wanted: Callable[[nn.Module], bool]
) -> tuple[list[tuple[nn.Module, Tensor, Tensor]], Any]:
    """Run the model once: (module, input, output) of each wanted call, and the model's output."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    inputs: list[Tensor] = []

    # Clones, and the input before the call: an in-place activation overwrites what it is given.
    def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0].detach().clone())

    def after(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
        calls.append((module, inputs.pop(), output.detach().clone()))

    wanted_modules = [m for m in model.modules() if wanted(m)]
    handles = [m.register_forward_pre_hook(before) for m in wanted_modules]
    handles += [m.register_forward_hook(after) for m in wanted_modules]
    try:
        with _untouched(model):
            output = model(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def find_last_layer(
    model: nn.Module, example: Tensor, last_layer: nn.Module | str | None = None
) -> LastLayer:
    """The nn.Linear whose output is the model's output, found by running `example` once.

    last_layer: a module or name that settles which one. The model's mode, buffers and torch's
    random state are unchanged. Raises TypeError where the layer given is not nn.Linear, ValueError
    where it is not found, is not the output, runs more than once, or shares its weights.
    """
    names = {module: name for name, module in model.named_modules()}
    calls, output = _record(model, example, lambda m: isinstance(m, nn.Linear))
    candidates = list(dict.fromkeys(names[module] for module, _, _ in calls))
    listing = f"affine layers on the path: {', '.join(candidates) or 'none'}"
    if not isinstance(output, Tensor):
        raise ValueError(f"model: expected one tensor as output, got {type(output).__name__}")

    if last_layer is not None:
        module = (
            dict(model.named_modules()).get(last_layer)
            if isinstance(last_layer, str)
            else last_layer
        )
        if module is None or module not in names:
            raise ValueError(f"last_layer: {last_layer!r} is not in the model; {listing}")
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"last_layer: expected an affine layer (nn.Linear), got {type(module).__name__} "
                f"({names[module] or 'the model itself'}); {listing}"
            )
    else:
        if not calls:
            raise ValueError(f"last_layer: the model has no nn.Linear on its path; {listing}")
        matching = list(dict.fromkeys(m for m, _, out in calls if _equal(out, output)))
        if not matching:
            raise ValueError(
                "last_layer: the model's output is not the output of an affine layer (is there a "
                f"softmax behind it? the loss expects logits); {listing}"
            )
        if len(matching) > 1:
            raise ValueError(
                "last_layer: ambiguous, the output equals that of "
                f"{', '.join(names[m] for m in matching)}; name one"
            )
        module = matching[0]
    assert isinstance(module, nn.Linear)
    own = [call for call in calls if call[0] is module]
    if len(own) != 1:
        raise ValueError(
            f"last_layer: {names[module]} runs {len(own)} times in a forward pass, expected once; "
            f"{listing}"
        )
    if not _equal(own[0][2], output):
        raise ValueError(
            f"last_layer: the model's output is not the output of {names[module]}; {listing}"
        )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = name.rpartition(".")[0] == names[module]
        if not inside and any(parameter is p for p in module.parameters()):
            raise ValueError(f"last_layer: {names[module]} shares its weights with {name}")
    return LastLayer(canonical_name(names[module]), module)


def find_wide_layer(model: nn.Module, example: Tensor, last: LastLayer) -> WideLayer | None:
    """The affine layer whose exact softplus is the last layer's input, or None."""
    names = {module: name for name, module in model.named_modules()}
    calls, _ = _record(model, example, lambda m: isinstance(m, nn.Linear | Softplus))
    order = [module for module, _, _ in calls]
    if last.module not in order:
        return None
    position = order.index(last.module)
    if position < 2:
        return None
    (linear, _, pre), (activation, given, h) = calls[position - 2 : position]
    if not (isinstance(linear, nn.Linear) and isinstance(activation, Softplus)):
        return None
    if order.count(linear) > 1:
        return None
    if not (_equal(given, pre) and _equal(h, calls[position][1])):
        return None
    return WideLayer(canonical_name(names[linear]), linear, activation.beta)


def _equal(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape
    return same and bool(((a == b) | (a.isnan() & b.isnan())).all())
