"""Activations for which separation is a proof: real analytic on R, element by element."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .softplus import Softplus

_aten = torch.ops.aten
# None is a polynomial. With what they compute, whatever has been made of a module's forward; all
# have slopes of at most SLOPE.
ANALYTIC: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    Softplus: lambda m, x: ops.softplus(x, m.beta),
    nn.GELU: lambda m, x: _aten.gelu(x, approximate=m.approximate),
    nn.SiLU: lambda _, x: _aten.silu(x),
    nn.Mish: lambda _, x: _aten.mish(x),
    nn.Tanh: lambda _, x: _aten.tanh(x),
    nn.Sigmoid: lambda _, x: _aten.sigmoid(x),
    nn.LogSigmoid: lambda _, x: _aten.log_sigmoid(x),
    nn.Tanhshrink: lambda _, x: x - _aten.tanh(x),
}
SLOPE = 1.2  # GELU 1.13, SiLU 1.10, Mish 1.09
