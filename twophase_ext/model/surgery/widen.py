"""The wide last hidden layer of section 7: m_H = ceil(1.1 n) softplus units before the last."""

import math
import sys
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

# The module, not its names: layers itself imports nn.softplus.
from twophase_ext.core import arrays
from twophase_ext.model import layers, probing

from ..calling import is_several, one_tensor, pack
from ..datasets import inputs_of
from ..gate import intercepted
from ..groups import groups_of
from ..inputs import as_example
from ..softplus import Softplus, checked_beta
from .tracing import trace

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class WideHead(nn.Module):
    """last_layer(activation(wide(x))): what `widen` puts in place of a model's last layer.

    wide: nn.Linear(in_features, units). activation: exact softplus. last_layer:
    nn.Linear(units, out_features). Input [batch, in_features], output [batch, out_features].
    """

    def __init__(
        self,
        in_features: int,
        units: int,
        out_features: int,
        *,
        beta: float = 100.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Three layers in torch's default initialisation."""
        super().__init__()
        self.wide = nn.Linear(in_features, units, device=device, dtype=dtype)
        self.activation = Softplus(beta)
        self.last_layer = nn.Linear(units, out_features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The model's output from the old last layer's input."""
        return self.last_layer(self.activation(self.wide(x)))


class PixelHead(WideHead):
    """A WideHead over every pixel: in the place of a 1 x 1 convolution.

    Input [batch, in_features, ...], output [batch, out_features, ...]. kind: the convolution's
    class, for `plain`.
    """

    kind: type[Convolution] = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """The model's output from the old convolution's input."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def wide_units(n: int, ratio: float = 1.1) -> int:
    """ceil(ratio * n), the paper's m_H for n samples.

    The ratio counts as the decimal number that was written: 1.1 * 110 is 121 units, although in
    floating point the product is above 121. Raises TypeError or ValueError for n < 1 or a ratio
    that is not finite or gives less than one unit.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an int, the number of samples, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n: expected at least 1 sample, got {n}")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise TypeError(f"ratio: expected a number, got {type(ratio).__name__}")
    if not 0 < ratio <= sys.float_info.max:
        raise ValueError(f"ratio: expected a finite number > 0, got {ratio!r}")
    units = Fraction(repr(float(ratio))) * n
    if units < 1:
        raise ValueError(f"ratio: expected ratio * n >= 1, got {ratio!r} * {n}")
    return math.ceil(units)


def widen(
    model: nn.Module,
    n: Any,
    ratio: float = 1.1,
    *,
    last_layer: nn.Module | str | None = None,
    beta: float = 100.0,
    example_input: Any = None,
) -> nn.Module:
    """Insert a fully connected softplus layer of ceil(ratio * N) units before the last layer.

    Section 7 of the paper: with m_H >= N units, N the number of distinct training inputs, the
    expressivity condition can hold. The last layer d -> m_y is replaced, in place and under its own
    name, by a `WideHead`: d -> m_H -> m_y, both newly initialised by torch's default, with biases,
    on the old one's device, dtype and mode. Returns `model`.

    n: the training inputs (tensor or array, a dict or tuple of them, a Dataset or DataLoader), of
    which the distinct ones are counted, as the model's dtype tells them apart; or their number.
    last_layer: the nn.Linear to replace, or its name. Without it, the layer is found by running
    `example_input` (a batch; tensor or array, or a dict or tuple of them; by default the first
    inputs), and without inputs by tracing the model. A head that is a 1 x 1 convolution, found by
    running it, is replaced by the same layers over its pixels, a `PixelHead`. Where the model gives
    an output for every token or pixel, the outputs of the distinct inputs are counted. A last layer
    that is tied to an embedding leaves its weights to it.

    Raises ValueError where the last layer is not found, is ambiguous or is the model itself, and
    for inputs with NaN or infinity; TypeError where it is not an nn.Linear, and where n is neither
    inputs nor an int.
    """
    probing.require_module(model)
    inner = layers.unwrap(model)
    real = next((p for p in inner.parameters() if p.is_floating_point()), torch.empty(0))
    number = isinstance(n, int | float | str | None)  # or what is refused as one
    n = n if number else inputs_of(n, "n")
    count = n if number else _distinct(n, real.dtype)
    wide_units(count, ratio)  # or refused
    beta = checked_beta(beta)
    if isinstance(inner, nn.Linear):
        raise ValueError(
            "model: it is itself the last layer (nn.Linear), which cannot be replaced in place; "
            "wrap it in nn.Sequential"
        )
    old: nn.Linear | Convolution
    by_inputs = example_input is None and not number
    if by_inputs or example_input is not None:
        name, given = ("n", n) if by_inputs else ("example_input", example_input)
        with one_tensor(inner, given, name) as x:
            example = arrays.as_tensor(x, name=name)
            example = as_example(example, real) if by_inputs else example.to(real.device)
            try:
                found = layers.find_last_layer(inner, example, last_layer, tied=True)
                old, each = found.module, found.rows
            except ValueError:
                head = None if last_layer is not None else _pixel_head(inner, example)
                if head is None:
                    raise
                old, each = head
            count = count if number else count * each
    else:
        named = _traced_last_layer(inner) if last_layer is None else last_layer
        old = layers.named_last_layer(inner, named, tied=True).module
    units = wide_units(count, ratio)
    place: dict[str, Any] = {"beta": beta, "device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        new = WideHead(old.in_features, units, old.out_features, **place)
    else:
        new = PixelHead(old.in_channels, units, old.out_channels, **place)
        new.kind = type(old)
    new.train(old.training)
    for parent in list(inner.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model


def _distinct(inputs: Any, dtype: torch.dtype) -> int:
    """N, the number of distinct inputs in a model's dtype."""
    x = pack(inputs, "n")[0] if is_several(inputs) else arrays.as_data(inputs, name="n")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"n: expected inputs [n, ...] or their number, got {list(x.shape)}")
    arrays.require_finite(x, "n", "input")
    return int(groups_of(x.to(dtype) if x.is_floating_point() else x).max()) + 1


def _pixel_head(model: nn.Module, example_input: Tensor) -> tuple[Convolution, int] | None:
    """The 1 x 1 convolution whose numbers are the model's output, and how many pixels it has.

    On every pixel it is the affine map of its weights.
    """
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    calls, output = probing.record(model, example_input, kinds)
    for call in calls:
        conv = call.module
        if (
            isinstance(conv, kinds)
            and type(conv) in kinds
            and isinstance(output, Tensor)
            and probing.same_memory(call.output, call.output_version, output)
            and {*conv.kernel_size, *conv.stride, conv.groups} == {1}
            and (conv.padding == "valid" or not any(conv.padding))
            and not intercepted(conv)
        ):
            return conv, math.prod(call.output.shape[2:])
    return None


def _traced_last_layer(model: nn.Module) -> str:
    seen = trace(model, whole=(nn.Linear,))
    listing = layers.describe_candidates(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    )
    if "" in seen.failures:
        raise ValueError(
            "last_layer: without it the model is traced, and this one "
            f"{seen.failures['']}; give last_layer or example_input ({listing})"
        )
    if not seen.output or not isinstance(model.get_submodule(seen.output), nn.Linear):
        raise ValueError(
            "last_layer: the model's output is not the output of an affine layer (nn.Linear); "
            f"{listing}"
        )
    return seen.output
