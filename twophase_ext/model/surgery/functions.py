"""Functions with kinks that a forward calls: analytic ones in their places.

The class of the module becomes a subclass whose forward runs under a mode that replaces them. The
module stays the same object with the same state dict, is still an instance of its own class, and is
copied and pickled as such.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from twophase_ext import ops

from . import smooth

_OWN = "_analytic_functions"  # in a module's __dict__: the Settings of its forward


class Settings(NamedTuple):
    """beta of softplus; pooling: "smooth" for the smooth maximum, "average" for the mean."""

    beta: float
    pooling: str = "smooth"


def _relu(own: Settings, input: Tensor, inplace: bool = False) -> Tensor:
    return (ops.softplus_ if inplace else ops.softplus)(input, own.beta)


def _relu_(own: Settings, input: Tensor) -> Tensor:
    return ops.softplus_(input, own.beta)


def _elementwise(function: Callable[..., Tensor], *defaults: float) -> Callable[..., Tensor]:
    """By a function of (x, numbers, beta), as torch calls it: with the numbers, and inplace."""
    names = ("negative_slope",) if len(defaults) == 1 else ("min_val", "max_val")[: len(defaults)]

    def stand_in(
        own: Settings, input: Tensor, *given: Any, inplace: bool = False, **named: Any
    ) -> Tensor:
        numbers = [*given[: len(defaults)]]
        numbers += [named.get(k, d) for k, d in zip(names, defaults, strict=True)][len(numbers) :]
        inplace = bool(given[len(defaults)]) if len(given) > len(defaults) else inplace
        if inplace:
            return input.copy_(function(input.clone(), *numbers, own.beta))
        return function(input, *numbers, own.beta)

    return stand_in


def _relu6(x: Tensor, beta: float) -> Tensor:
    return smooth.hardtanh(x, 0.0, 6.0, beta)


def _pool(axes: int, of_torch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def pool(
        own: Settings,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        if own.pooling == "average" and dilation in (1, (1,) * axes, [1] * axes):
            return smooth.average_pool(input, kernel_size, stride, padding, ceil_mode, axes)
        settings = kernel_size, stride, padding, dilation, ceil_mode
        if not input.is_floating_point():
            return of_torch(input, *settings)
        return ops.smooth_max_pool(input, *settings, axes=axes, beta=own.beta)

    return pool


# What arrives in a mode: torch's functions by the objects that they are.
FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _relu_),
    F.relu6: _elementwise(_relu6),
    F.hardtanh: _elementwise(smooth.hardtanh, -1.0, 1.0),
    F.leaky_relu: _elementwise(smooth.leaky_relu, 0.01),
    F.hardsigmoid: _elementwise(smooth.hardsigmoid),
    F.hardswish: _elementwise(smooth.hardswish),
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d), _pool(1, F.max_pool1d)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _pool(2, F.max_pool2d)),
    **dict.fromkeys((F.max_pool3d, torch.max_pool3d), _pool(3, F.max_pool3d)),
}
# The names by which the watch reports them (watch.py).
NAMES = {
    *("relu", "relu6", "hardtanh", "leaky_relu", "hardsigmoid", "hardswish"),
    *("max_pool1d", "max_pool2d", "max_pool3d"),
}


class _Analytic(TorchFunctionMode):
    def __init__(self, own: Settings) -> None:
        super().__init__()
        self.own = own

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        stand_in = FUNCTIONS.get(func)
        if stand_in is None or kwargs.get("return_indices"):
            return func(*args, **kwargs)
        return stand_in(self.own, *args, **kwargs)


@functools.cache
def analytic_class(own: Any) -> Any:  # Any: mypy takes a type of modules for not hashable
    """The subclass of a module's class `own` whose forward calls analytic functions instead."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Analytic(self.__dict__[_OWN]):
            return own.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _blank, (own,), self.__dict__

    return type(
        own.__name__,
        (own,),
        {
            "forward": forward,
            "__reduce_ex__": reduce,
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__doc__": own.__doc__,
        },
    )


def _blank(own: Any) -> Any:
    kind = analytic_class(own)
    return kind.__new__(kind)


def make_analytic(module: nn.Module, own: Settings) -> None:
    """Put analytic functions in the places of those that the module's own forward calls."""
    if _OWN not in module.__dict__:
        kind: Any = type(module)
        module.__class__ = analytic_class(kind)
    module.__dict__[_OWN] = own


def calls_analytic(module: nn.Module) -> bool:
    """Whether `make_analytic` has changed it."""
    return _OWN in module.__dict__
