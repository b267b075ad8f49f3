"""The last affine layer and the wide softplus layer of any model, found by running it once."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .names import WRAPPERS, canonical_name
from .nn.softplus import Softplus
from .probing import Call, input_of, record, unchanged, untouched, unwrap

_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


class LastLayer(NamedTuple):
    """The affine last layer W^(H+1): its canonical name and the module."""

    name: str
    module: nn.Linear


class WideLayer(NamedTuple):
    """The last hidden layer where it is h = softplus(linear(z), beta), with canonical names."""

    linear_name: str
    linear: nn.Linear
    activation_name: str
    beta: float


@dataclass(frozen=True)
class Split:
    """A model cut at its wide layer and at its last layer; both run in the caller's grad mode.

    They work in whatever mode the model is, and compute nothing behind what they return.
    """

    model: nn.Module
    last: LastLayer
    wide: WideLayer | None

    def hidden_features(self, x: Tensor) -> Tensor:
        """h, the input of the last layer: [batch, m_H]."""
        return input_of(self.model, self.last.module, x)

    def backbone_features(self, x: Tensor) -> Tensor:
        """z, the input of the wide layer: [batch, d]. ValueError where there is no wide layer."""
        if self.wide is None:
            raise ValueError("model: it has no wide layer (nn.Linear, then tp.nn.Softplus)")
        return input_of(self.model, self.wide.linear, x)


def describe_candidates(names: Iterable[str]) -> str:
    """The affine layers that a user may have meant, for the end of an error."""
    return f"affine layers: {', '.join(map(repr, dict.fromkeys(names))) or 'none'}"


def find_last_layer(
    model: nn.Module, example_input: Tensor, last_layer: nn.Module | str | None = None
) -> LastLayer:
    """Find the nn.Linear whose output is the model's output, by running the model once.

    example_input: a batch of at least one sample, [b, ...]. last_layer: the module or its name,
    where the user says which; it is checked in the same way. The layer must get [b, m_H], must
    run once and share no parameter with another module. The run is in eval mode without gradients;
    the model's mode, buffers and torch's random state are the same afterwards.

    Raises TypeError where `last_layer` is not an nn.Linear, ValueError in every other case that
    is not met; the errors name the affine layers that ran, in the order of execution.
    """
    model = unwrap(model)
    if last_layer is not None:
        named_last_layer(model, last_layer)
    calls, output = record(model, example_input, nn.Linear | _CONVOLUTIONS)
    names = _names(model)
    linear = [call for call in calls if isinstance(call.module, nn.Linear)]
    listing = describe_candidates(names[call.module] for call in linear)
    if not isinstance(output, Tensor):
        raise ValueError(f"model: expected one tensor as output, got {_kind(output)}; {listing}")
    if last_layer is None:
        ends = [c for c in linear if unchanged(c.output, c.output_version, output)]
        if not ends:
            raise ValueError(_not_affine(calls, names, output, listing))
        found = named_last_layer(model, ends[-1].module)
    else:
        found = named_last_layer(model, last_layer)
    own = [call for call in linear if call.module is found.module]
    if len(own) != 1:
        raise ValueError(
            f"last_layer: {found.name!r} runs {len(own)} times in one forward pass, expected "
            f"once; {listing}"
        )
    if not unchanged(own[0].output, own[0].output_version, output):
        raise ValueError(
            f"last_layer: the model's output is not the output of {found.name!r}; {listing}"
        )
    shape, rows = tuple(own[0].input.shape), example_input.shape[0]
    if len(shape) != 2 or shape[0] != rows:
        raise ValueError(
            f"last_layer: expected the input of {found.name!r} to have one row per sample, "
            f"({rows}, {shape[-1]}), got {shape}"
        )
    return found


def named_last_layer(model: nn.Module, last_layer: nn.Module | str) -> LastLayer:
    """Check the module or name that was given as last layer, without running the model.

    Raises TypeError where it is not affine (nn.Linear), ValueError where it is not in the model,
    is parametrized, not initialised, or shares a parameter with another module.
    """
    model = unwrap(model)
    names = _names(model)
    listing = describe_candidates(n for m, n in names.items() if isinstance(m, nn.Linear))
    module: nn.Module | None
    if not isinstance(last_layer, str):
        module = last_layer
    else:
        wanted = canonical_name(last_layer)
        module = next((m for m, n in names.items() if n == wanted), None)
        if module is None:
            raise ValueError(f"last_layer: {last_layer!r} is not in the model; {listing}")
    if not isinstance(module, nn.Module):
        raise TypeError(f"last_layer: expected an nn.Linear or its name, got {_kind(module)}")
    module = unwrap(module)
    if not _is_affine(module):
        name = f" ({names[module]!r})" if names.get(module) else ""
        raise TypeError(
            f"last_layer: expected an affine layer (nn.Linear), got {_kind(module)}{name}; "
            f"{listing}"
        )
    if module not in names:
        raise ValueError(f"last_layer: this {module} is not in the model; {listing}")
    _check_parameters(model, names, module)
    return LastLayer(names[module], module)


def find_wide_layer(model: nn.Module, example_input: Tensor, last: LastLayer) -> WideLayer | None:
    """The last hidden layer, if it is an nn.Linear whose exact softplus is the last layer's input.

    Nothing may happen between the three, and the linear layer must run once; None otherwise. Runs
    the model once, as `find_last_layer` does.
    """
    model = unwrap(model)
    calls, _ = record(model, example_input, nn.Linear | Softplus)
    names = _names(model)
    h = next((c for c in calls if c.module is last.module), None)
    if h is None:
        return None
    for activation in calls:
        if not isinstance(activation.module, Softplus) or not unchanged(
            activation.output, activation.output_version, h.input, h.input_version
        ):
            continue
        for call in calls:
            if _is_affine(call.module) and unchanged(
                call.output, call.output_version, activation.input, activation.input_version
            ):
                if sum(c.module is call.module for c in calls) > 1:
                    return None
                beta = activation.module.beta
                return WideLayer(names[call.module], call.module, names[activation.module], beta)
    return None


def split(model: nn.Module, last: LastLayer, wide: WideLayer | None = None) -> Split:
    """The functions x -> h and x -> z of a model (wrapped or not), from the layers found in it."""
    return Split(unwrap(model), last, wide)


def last_parameters(model: nn.Module, last: LastLayer) -> dict[str, nn.Parameter]:
    """The trainable parameters of the last layer, w_(H+1), by canonical name."""
    return {n: p for n, p in trainable_parameters(model).items() if _belongs(p, last.module)}


def hidden_parameters(model: nn.Module, last: LastLayer) -> dict[str, nn.Parameter]:
    """The other trainable parameters, w_(1:H), by canonical name. They get the noise at tau."""
    return {n: p for n, p in trainable_parameters(model).items() if not _belongs(p, last.module)}


def hidden_state(model: nn.Module, last: LastLayer, *, buffers: bool = True) -> dict[str, Tensor]:
    """Parameters, trainable or not, and buffers of everything but the last layer."""
    state = {
        canonical_name(n): p.detach()
        for n, p in model.named_parameters()
        if not _belongs(p, last.module)
    }
    if buffers:
        state |= {canonical_name(n): b for n, b in model.named_buffers()}
    return state


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every trainable parameter by canonical name; ValueError where two names become one."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if canonical_name(name) in found:
            raise ValueError(
                f"model: two parameters are called {canonical_name(name)!r} once the wrappers' "
                f"names {' and '.join(WRAPPERS)} are left out; rename that submodule"
            )
        if parameter.requires_grad:
            found[canonical_name(name)] = parameter
    return found


def _belongs(parameter: nn.Parameter, module: nn.Module) -> bool:
    return any(parameter is own for own in module.parameters())


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {module: canonical_name(name) for name, module in model.named_modules()}


def _kind(value: object) -> str:
    return type(value).__name__


def _is_affine(module: nn.Module) -> TypeGuard[nn.Linear]:
    # a subclass with another forward (LoRA, a clamp, ...) is not the affine map of its weight
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _check_parameters(model: nn.Module, names: dict[nn.Module, str], module: nn.Linear) -> None:
    name = names[module]
    own = dict(module.named_parameters(recurse=False))
    if not {"weight"} <= set(own) <= {"weight", "bias"}:
        raise ValueError(
            f"last_layer: {name!r} is parametrized (weight_norm, spectral_norm, ...), so its "
            "output is not affine in its parameters; remove the parametrization"
        )
    if is_lazy(module.weight):
        raise ValueError(f"last_layer: {name!r} is not initialised yet; run the model once")
    for other, other_name in names.items():
        for attribute, parameter in other.named_parameters(recurse=False):
            if other is not module and any(_overlap(parameter, p) for p in own.values()):
                shared = f"{other_name}.{attribute}".lstrip(".")
                raise ValueError(
                    f"last_layer: {name!r} shares its weights with {shared!r}, so it cannot be "
                    "trained while the hidden layers stay fixed"
                )


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a is b or is_lazy(a) or is_lazy(b):
        return a is b
    (a_begin, a_end), (b_begin, b_end) = _extent(a), _extent(b)
    return a.device == b.device and max(a_begin, b_begin) < min(a_end, b_end)


def _extent(t: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first to behind its last byte; empty where it has none."""
    begin = t.data_ptr()
    if begin == 0 or t.numel() == 0:
        return begin, begin
    reach = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (reach + 1) * t.element_size()


def check_hidden_layers(model: nn.Module, example: Tensor, last: LastLayer) -> None:
    """ValueError where h itself depends on the last layer's weights, however it reads them.

    A decoder tied to its embedding does, by a function instead of a module. Runs the model twice
    up to the last layer, as `find_last_layer` does; the weights are other ones meanwhile.
    """

    def h() -> Tensor:
        with untouched(model):
            return input_of(model, last.module, example)

    own = list(last.module.parameters(recurse=False))
    kept = [p.detach().clone() for p in own]
    before = h()
    try:
        for p in own:
            p.data.add_(1)
        after = h()
    finally:
        for p, value in zip(own, kept, strict=True):
            p.data.copy_(value)
    # not bit for bit: some kernels of a GPU add in another order each time
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"last_layer: the hidden layers read the weights of {last.name!r} too, so it cannot be "
            "trained while they stay fixed; give it weights of its own"
        )


def _not_affine(
    calls: list[Call], names: dict[nn.Module, str], output: Tensor, listing: str
) -> str:
    for call in calls:
        if isinstance(call.module, _CONVOLUTIONS) and call.output.data_ptr() == output.data_ptr():
            return (
                f"last_layer: the output comes from the convolution {names[call.module]!r}; put "
                f"nn.Flatten and nn.Linear in its place; {listing}"
            )
    return (
        "last_layer: the model's output is not the output of one affine layer (is there a softmax "
        f"behind it, a scaling or a sum of heads? the loss expects logits); {listing}"
    )
