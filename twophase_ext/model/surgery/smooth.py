"""Real analytic functions beside those with kinks: each is made of exact softplus.

With s(x) = softplus(x, beta), which tends to max(x, 0) as beta grows, within log(2) / beta:
max(x, 0) becomes s(x); a x + sum of c_i max(x - t_i, 0), which every piecewise linear function is,
becomes a x + sum of c_i s(x - t_i); the largest of k numbers becomes log(sum exp(beta x_i)) / beta,
within log(k) / beta above it, whose gradient is their softmax.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twophase_ext import ops

from ..softplus import checked_beta


def leaky_relu(x: Tensor, slope: float | Tensor, beta: float) -> Tensor:
    """slope x + (1 - slope) s(x)."""
    return slope * x + (1 - slope) * ops.softplus(x, beta)


def hardtanh(x: Tensor, low: float, high: float, beta: float) -> Tensor:
    """low + s(x - low) - s(x - high), from low to high."""
    return low + ops.softplus(x - low, beta) - ops.softplus(x - high, beta)


def hardsigmoid(x: Tensor, beta: float) -> Tensor:
    """(s(x + 3) - s(x - 3)) / 6, from 0 to 1."""
    return (ops.softplus(x + 3, beta) - ops.softplus(x - 3, beta)) / 6


def hardswish(x: Tensor, beta: float) -> Tensor:
    """x hardsigmoid(x)."""
    return x * hardsigmoid(x, beta)


def average_pool(
    x: Tensor,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    ceil_mode: bool,
    axes: int,
) -> Tensor:
    """The mean over the windows of torch's max pooling without dilation; padding does not count."""
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
    return pool(x, kernel, stride, padding, ceil_mode, count_include_pad=False)  # type: ignore


class Smooth(nn.Module):
    """A function without kinks. beta: how near the one with kinks, as of `Softplus`; inplace:
    overwrite the input.
    """

    def __init__(self, beta: float = 100.0, inplace: bool = False) -> None:
        """See the class."""
        super().__init__()
        self.beta, self.inplace = checked_beta(beta), bool(inplace)

    def forward(self, x: Tensor) -> Tensor:
        """The result, in x where inplace."""
        # of a copy: what the backward pass keeps is not what is overwritten
        return x.copy_(self._of(x.clone())) if self.inplace else self._of(x)

    def _of(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The settings, as print(model) shows them."""
        return f"beta={self.beta:g}" + (", inplace=True" if self.inplace else "")


class SmoothLeakyReLU(Smooth):
    """slope x + (1 - slope) softplus(x, beta), near nn.LeakyReLU(slope); elementwise."""

    def __init__(self, slope: float = 0.01, beta: float = 100.0, inplace: bool = False) -> None:
        """See the class."""
        super().__init__(beta, inplace)
        self.slope = float(slope)

    def _of(self, x: Tensor) -> Tensor:
        return leaky_relu(x, self.slope, self.beta)

    def extra_repr(self) -> str:
        """The settings, as print(model) shows them."""
        return f"slope={self.slope:g}, {super().extra_repr()}"


class SmoothPReLU(Smooth):
    """w x + (1 - w) softplus(x, beta), near nn.PReLU; x [b, channels, ...], w [1] or [channels]."""

    def __init__(self, weight: nn.Parameter, beta: float = 100.0) -> None:
        """weight: the one of nn.PReLU; kept, not copied."""
        super().__init__(beta)
        self.weight = weight

    def _of(self, x: Tensor) -> Tensor:
        shape = [-1, *[1] * (x.dim() - 2)] if x.dim() > 1 else [-1]
        return leaky_relu(x, self.weight.view(shape), self.beta)


class SmoothHardtanh(Smooth):
    """low + softplus(x - low) - softplus(x - high), near nn.Hardtanh and nn.ReLU6; elementwise."""

    def __init__(
        self, low: float = -1.0, high: float = 1.0, beta: float = 100.0, inplace: bool = False
    ) -> None:
        """See the class."""
        super().__init__(beta, inplace)
        self.low, self.high = float(low), float(high)

    def _of(self, x: Tensor) -> Tensor:
        return hardtanh(x, self.low, self.high, self.beta)

    def extra_repr(self) -> str:
        """The settings, as print(model) shows them."""
        return f"low={self.low:g}, high={self.high:g}, {super().extra_repr()}"


class SmoothHardsigmoid(Smooth):
    """(softplus(x + 3) - softplus(x - 3)) / 6, near nn.Hardsigmoid; elementwise."""

    def _of(self, x: Tensor) -> Tensor:
        return hardsigmoid(x, self.beta)


class SmoothHardswish(Smooth):
    """x (softplus(x + 3) - softplus(x - 3)) / 6, near nn.Hardswish; elementwise."""

    def _of(self, x: Tensor) -> Tensor:
        return hardswish(x, self.beta)


class SmoothMaxPool(Smooth):
    """log(sum exp(beta x)) / beta over windows, near nn.MaxPool1d, 2d or 3d (axes: which).

    At most log(window) / beta above the maximum. The gradient is shared by a window's numbers as
    their softmax. Settings and shapes as of torch's layer, without return_indices.
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        *,
        axes: int = 2,
        beta: float = 100.0,
    ) -> None:
        """See the class."""
        super().__init__(beta)
        self.axes, self.ceil_mode = axes, bool(ceil_mode)
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding, self.dilation = padding, dilation

    def _of(self, x: Tensor) -> Tensor:
        windows: tuple[Any, Any, Any, Any]
        windows = self.kernel_size, self.stride, self.padding, self.dilation
        return ops.smooth_max_pool(x, *windows, self.ceil_mode, axes=self.axes, beta=self.beta)

    def extra_repr(self) -> str:
        """The settings, as print(model) shows them."""
        parts = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return f"{parts}, axes={self.axes}, {super().extra_repr()}"


class SmoothGlobalMaxPool(Smooth):
    """log(sum exp(beta x)) / beta over whole images, near nn.AdaptiveMaxPool1d, 2d or 3d (1)."""

    def __init__(self, *, axes: int = 2, beta: float = 100.0) -> None:
        """axes: how many dimensions an image has."""
        super().__init__(beta)
        self.axes = axes

    def _of(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self.beta * x, tuple(range(-self.axes, 0)), keepdim=True) / self.beta
