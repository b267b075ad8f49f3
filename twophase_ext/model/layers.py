"""The last affine layer and the wide softplus layer of any model, found by running it once."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.names import WRAPPERS, canonical_name
from .activations import ANALYTIC
from .gate import Readers, intercepted, is_affine, overlap
from .probing import Call, input_of, record, rows_into, unchanged, untouched, unwrap
from .softplus import Softplus

_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


class LastLayer(NamedTuple):
    """The affine last layer W^(H+1): its canonical name and the module.

    rows: outputs of a sample: 1, or its tokens or pixels where the model gives an output for each.
    """

    name: str
    module: nn.Linear
    rows: int = 1


class WideLayer(NamedTuple):
    """The last hidden layer where it is h = softplus(linear(z), beta), with canonical names."""

    linear_name: str
    linear: nn.Linear
    activation_name: str
    beta: float


class AnalyticLayer(NamedTuple):
    """The last hidden layer where it is h = activation(linear(z)), one of ANALYTIC."""

    linear: nn.Linear
    activation_name: str
    activation: nn.Module


@dataclass(frozen=True)
class Split:
    """A model cut at its wide and its last layer; run in the caller's grad mode and its own."""

    model: nn.Module
    last: LastLayer
    wide: WideLayer | None

    def hidden_features(self, x: Tensor) -> Tensor:
        """h, the input of the last layer: [rows, m_H]."""
        return rows_into(self.model, [self.last.module], x)

    def backbone_features(self, x: Tensor) -> Tensor:
        """z, the input of the wide layer: [rows, d]. ValueError where there is no wide layer."""
        if self.wide is None:
            raise ValueError("model: it has no wide layer (nn.Linear, then tp.nn.Softplus)")
        return rows_into(self.model, wide_chain(self.model, self.wide, self.last), x)


def wide_chain(
    model: nn.Module, wide: WideLayer | AnalyticLayer, last: LastLayer
) -> list[nn.Module]:
    """The last hidden layer, its activation and the last layer, as they follow each other."""
    named = {canonical_name(name): module for name, module in model.named_modules()}
    return [wide.linear, named[wide.activation_name], last.module]


def describe_candidates(names: Iterable[str]) -> str:
    """The affine layers that a user may have meant, for the end of an error."""
    return f"affine layers: {', '.join(map(repr, dict.fromkeys(names))) or 'none'}"


def find_last_layer(
    model: nn.Module,
    example_input: Tensor,
    last_layer: nn.Module | str | None = None,
    *,
    tied: bool = False,
) -> LastLayer:
    """Find the nn.Linear whose output is the model's output, by running the model once.

    example_input: a batch of at least one sample, [b, ...]. last_layer: the module or its name,
    where the user says which; it is checked in the same way. The layer must get [b, m_H], run
    once and, unless `tied`, share no parameter with another module. The run is in eval mode, with
    no gradients; the model's mode, buffers and torch's random state are the same afterwards.

    Raises TypeError where `last_layer` is not an nn.Linear, ValueError in every other case that
    is not met; the errors name the affine layers that ran, in the order of execution.

    A layer that runs on every token, [b, t, m_H], is the last one too where the model's output is
    one row of its output for each sample (a decoder that reads its last token), or all of them,
    [b t, k] (as `calling.serve` makes it of [b, t, k]).
    """
    model = unwrap(model)
    if last_layer is not None:
        named_last_layer(model, last_layer, tied=tied)
    calls, output = record(model, example_input, nn.Linear | _CONVOLUTIONS)
    names = _names(model)
    linear = [call for call in calls if isinstance(call.module, nn.Linear)]
    listing = describe_candidates(names[call.module] for call in linear)
    if not isinstance(output, Tensor):
        raise ValueError(f"model: expected one tensor as output, got {_kind(output)}; {listing}")
    if last_layer is None:
        ends = [c for c in linear if _gives(c, output)]
        ends = ends or [c for c in linear[-1:] if _picks_rows(model, c, example_input, output)]
        if not ends:
            raise ValueError(_not_affine(calls, names, output, listing))
        last_layer = ends[-1].module
    found = named_last_layer(model, last_layer, tied=tied)
    own = [call for call in linear if call.module is found.module]
    if len(own) != 1:
        raise ValueError(
            f"last_layer: {found.name!r} runs {len(own)} times in one forward pass, expected "
            f"once; {listing}"
        )
    if not _gives(own[0], output):
        if _picks_rows(model, own[0], example_input, output):
            return found
        raise ValueError(
            f"last_layer: the model's output is not the output of {found.name!r}; {listing}"
        )
    shape, samples = tuple(own[0].input.shape), example_input.shape[0]
    if len(shape) < 2 or shape[0] != samples or output.dim() != 2:
        raise ValueError(
            f"last_layer: expected the input of {found.name!r} to have one row per sample, "
            f"({samples}, {shape[-1]}), got {shape}"
        )
    return found._replace(rows=math.prod(shape[1:-1]))


def _gives(call: Call, output: Tensor) -> bool:
    """Whether the output is the call's, row by row."""
    own = call.output
    if isinstance(own, Tensor) and own.dim() > 2 and output.dim() == 2:
        own = own.flatten(0, -2)
    return unchanged(own, call.output_version, output)


def named_last_layer(
    model: nn.Module, last_layer: nn.Module | str, *, tied: bool = False
) -> LastLayer:
    """Check the module or name that was given as last layer, without running the model.

    Raises TypeError where it is not affine (nn.Linear), ValueError where it is not in the model,
    is parametrized, not initialised, or, unless `tied`, shares a parameter with another module.
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
    if not is_affine(module):
        name = f" ({names[module]!r})" if names.get(module) else ""
        raise TypeError(
            f"last_layer: expected an affine layer (nn.Linear), got {_kind(module)}{name}; "
            f"{listing}"
        )
    if module not in names:
        raise ValueError(f"last_layer: this {module} is not in the model; {listing}")
    _check_parameters(names, module, tied)
    if module.in_features < 1 or module.out_features < 1:
        raise ValueError(f"last_layer: {names[module]!r} has no weights: {module}")
    if any(torch._debug_has_internal_overlap(p) == 1 for p in module.parameters(recurse=False)):
        raise ValueError(
            f"last_layer: entries of the weights of {names[module]!r} share memory (expand), so "
            "that no step can move one alone; use weight.contiguous()"
        )
    if tuple(module.weight.shape) != (module.out_features, module.in_features):
        raise ValueError(
            f"last_layer: {names[module]!r} has a weight of shape {tuple(module.weight.shape)}, "
            f"but out_features, in_features = {module.out_features, module.in_features}; set them"
        )
    if why := intercepted(module):
        raise ValueError(
            f"last_layer: {names[module]!r} is not computed from its weights alone: {why}. The "
            "second phase computes it without calling the module: remove that, or put a plain "
            "nn.Linear in its place"
        )
    return LastLayer(names[module], module)


def find_analytic_layer(
    model: nn.Module, example_input: Tensor, last: LastLayer
) -> AnalyticLayer | None:
    """The last hidden layer, if it is an nn.Linear and one of ANALYTIC gives the last one's input.

    Nothing may happen between the three, the linear layer must run once, and neither it nor the
    activation may have hooks, a replaced forward or a parametrization; None otherwise. Runs the
    model once, as `find_last_layer` does.
    """
    model = unwrap(model)
    calls, _ = record(model, example_input, (nn.Linear, *ANALYTIC))
    h = next((c for c in calls if c.module is last.module), None)
    if h is None:
        return None
    for activation in calls:
        exact = type(activation.module) in ANALYTIC and not intercepted(activation.module)
        if not exact or not unchanged(
            activation.output, activation.output_version, h.input, h.input_version
        ):
            continue
        for call in calls:
            if isinstance(call.module, nn.Linear) and unchanged(
                call.output, call.output_version, activation.input, activation.input_version
            ):
                runs = sum(c.module is call.module for c in calls)
                if runs > 1 or intercepted(call.module) or not is_affine(call.module):
                    return None
                beta: object = getattr(activation.module, "beta", 1.0)
                if isinstance(beta, bool) or not isinstance(beta, Real):
                    return None  # anything may have been assigned
                name = _names(model)[activation.module]
                return AnalyticLayer(call.module, name, activation.module)
    return None


def find_wide_layer(model: nn.Module, example_input: Tensor, last: LastLayer) -> WideLayer | None:
    """`find_analytic_layer`, where its activation is the exact softplus; None otherwise."""
    return as_wide(model, find_analytic_layer(model, example_input, last))


def as_wide(model: nn.Module, layer: AnalyticLayer | None) -> WideLayer | None:
    """The layer as a wide layer, where its activation is the exact softplus."""
    if layer is None or not isinstance(layer.activation, Softplus):
        return None
    name = _names(unwrap(model))[layer.linear]
    return WideLayer(name, layer.linear, layer.activation_name, float(layer.activation.beta))


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


def _check_parameters(names: dict[nn.Module, str], module: nn.Linear, tied: bool) -> None:
    name = names[module]
    own = dict(module.named_parameters(recurse=False))
    if not {"weight"} <= set(own) <= {"weight", "bias"}:
        raise ValueError(
            f"last_layer: {name!r} is parametrized (weight_norm, spectral_norm, ...), so its "
            "output is not affine in its parameters; remove the parametrization"
        )
    if is_lazy(module.weight):
        raise ValueError(f"last_layer: {name!r} is not initialised yet; run the model once")
    for other, other_name in () if tied else names.items():
        for attribute, parameter in other.named_parameters(recurse=False):
            if other is not module and any(overlap(parameter, p) for p in own.values()):
                shared = f"{other_name}.{attribute}".lstrip(".")
                raise ValueError(
                    f"last_layer: {name!r} shares its weights with {shared!r}, so it cannot be "
                    "trained while the hidden layers stay fixed"
                )


def check_hidden_layers(model: nn.Module, example: Tensor, last: LastLayer) -> None:
    """ValueError where h itself depends on the last layer's weights, however it reads them.

    A decoder tied to its embedding does, by a function instead of a module. Runs the model up to
    the last layer, as `find_last_layer` does, and watches what its operators read; then once more
    with other weights, as a read by NumPy is no operator's.
    """
    own = list(last.module.parameters(recurse=False))
    kept = [p.detach().clone() for p in own]
    with untouched(model):
        with Readers(own) as readers:
            before = input_of(model, last.module, example)
        read = f" ({readers.found[0]})" if readers.found else ""
    try:
        for p in own:
            p.data.mul_(-3).add_(1)
        with untouched(model):
            after = input_of(model, last.module, example)
    finally:
        for p, value in zip(own, kept, strict=True):
            p.data.copy_(value)
    # some kernels of a GPU add in another order each time
    tolerance = 0.0 if before.device.type == "cpu" else 64 * torch.finfo(before.dtype).eps
    apart = (before - after).abs() > tolerance * before.abs().amax()
    if read or bool(apart.any()):
        raise ValueError(
            f"last_layer: the hidden layers read the weights of {last.name!r} too{read}, so it "
            "cannot be trained while they stay fixed; give it weights of its own"
        )


@torch.no_grad()
def _picks_rows(model: nn.Module, call: Call, example: Tensor, output: Tensor) -> bool:
    """Whether the output is one row a sample of a layer that runs on every token, at any weights.

    The rows that are picked come out where the layer hands its input on.
    """
    layer = call.module
    if call.input.dim() != 3 or len(call.input) != len(example) or not is_affine(layer):
        return False
    own = dict(layer.named_parameters(recurse=False))
    kept = {name: p.detach().clone() for name, p in own.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with untouched(model):
            h = rows_into(model, [layer], example)
            if h.shape != (len(example), layer.in_features):
                return False
            pairs = [(output, F.linear(h, layer.weight, layer.bias))]
            for p in own.values():
                drawn = torch.randn(p.shape, generator=generator, device="cpu")
                p.data.copy_(drawn)
            pairs.append((model(example.clone()), F.linear(h, layer.weight, layer.bias)))
    except (RuntimeError, ValueError, IndexError, TypeError):  # of a forward that needs its classes
        return False
    finally:
        for name, p in own.items():
            p.data.copy_(kept[name])
    tolerance = 64 * torch.finfo(output.dtype).eps
    return all(
        a.shape == b.shape and bool(((a - b).norm() <= tolerance * (1 + b.norm())).all())
        for a, b in pairs
    )


def _not_affine(
    calls: list[Call], names: dict[nn.Module, str], output: Tensor, listing: str
) -> str:
    for call in calls:
        if isinstance(call.module, _CONVOLUTIONS) and call.output.data_ptr() == output.data_ptr():
            return (
                f"last_layer: the output comes from the convolution {names[call.module]!r}; put "
                "nn.Flatten and nn.Linear in its place, or, if it is a 1 x 1 convolution, call "
                f"tp.nn.widen(model, n, example_input=x); {listing}"
            )
    asked = "is there a softmax after it, a scaling or a sum of heads? the loss expects logits"
    cure = "end the model with an nn.Linear" if listing.endswith("none") else asked
    what = "the model's output is not the output of one affine layer"
    return f"last_layer: {what} ({cure}); {listing}"
