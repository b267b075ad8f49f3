"""Add the wide softplus layer of section 7 before a model's last layer."""

import math
from typing import Any

from torch import Tensor, nn

from ..layers import find_last_layer
from .softplus import Softplus


class WideHead(nn.Module):
    """last_layer(softplus(wide(z))): takes the place of a model's last affine layer."""

    def __init__(self, features: int, units: int, outputs: int, beta: float, bias: bool) -> None:
        """features -> units -> outputs, PyTorch's default initialisation."""
        super().__init__()
        self.wide = nn.Linear(features, units)
        self.activation = Softplus(beta)
        self.last_layer = nn.Linear(units, outputs, bias=bias)

    def forward(self, z: Tensor) -> Tensor:
        """Outputs [..., outputs] of features [..., features]."""
        return self.last_layer(self.activation(self.wide(z)))


def widen(
    model: nn.Module,
    n: int,
    ratio: float = 1.1,
    *,
    last_layer: nn.Module | str | None = None,
    beta: float = 100.0,
    example_input: Tensor | None = None,
) -> nn.Module:
    """Insert a fully connected softplus layer of ceil(ratio * n) units before the last layer.

    n: training samples. The last affine layer (found by running `example_input`, or given by
    `last_layer`; without either, the model's last nn.Linear in definition order) is replaced by a
    `WideHead` whose layers are freshly initialised, on the same device and in the same dtype.
    Changes the model in place and returns it. Raises ValueError for n < 1, a ratio that gives no
    layer, a last layer that is not found, or a model that is itself the last layer.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n: expected an integer >= 1, got {n!r}")
    if not (isinstance(ratio, int | float) and math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"ratio: expected a finite number > 0, got {ratio!r}")
    units = math.ceil(round(ratio * n, 9))  # 1.1 * 10 is 11.000000000000002
    old = _last_linear(model, last_layer, example_input)
    if old is model:
        raise ValueError("model: is itself the last layer; wrap it, e.g. nn.Sequential(model)")
    head = WideHead(old.in_features, units, old.out_features, beta, old.bias is not None)
    head.to(device=old.weight.device, dtype=old.weight.dtype).train(old.training)
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, head)
                return model
    raise ValueError("last_layer: not found among the model's children")


def _last_linear(model: nn.Module, last_layer: Any, example: Tensor | None) -> nn.Linear:
    if example is not None:
        example = example.to(next(model.parameters()).device)
        return find_last_layer(model, example, last_layer).module
    named = dict(model.named_modules())
    if last_layer is None:
        linears = [module for module in named.values() if isinstance(module, nn.Linear)]
        if not linears:
            raise ValueError("last_layer: the model has no nn.Linear")
        return linears[-1]
    module = named.get(last_layer) if isinstance(last_layer, str) else last_layer
    if not any(module is m for m in named.values()):
        raise ValueError(f"last_layer: {last_layer!r} is not in the model")
    if not isinstance(module, nn.Linear):
        raise TypeError(f"last_layer: expected nn.Linear, got {type(module).__name__}")
    return module
