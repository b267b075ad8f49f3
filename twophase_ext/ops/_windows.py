"""Pooling windows, and the smooth maximum over them in torch's own operators."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """A number for each pooled dimension, and beta of the smooth maximum.

    A dataclass, so that functorch takes it as one argument.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool
    beta: float

    @property
    def axes(self) -> int:
        """How many dimensions are pooled over."""
        return len(self.kernel)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the operators take them."""
        lists = (list(v) for v in (self.kernel, self.stride, self.padding, self.dilation))
        return *lists, self.ceil_mode, self.beta

    def counts(self, sizes: Sequence[Any]) -> list[Any]:
        """Windows along each dimension, of integers and of what stands for them in a trace."""
        found = []
        for size, k, s, p, d in self._along(sizes):
            room = size + 2 * p - d * (k - 1) - 1
            count = (room + (s - 1 if self.ceil_mode else 0)) // s + 1
            if self.ceil_mode:  # one less where the last one would begin in the padding behind
                most = (size + p + s - 1) // s  # count <= most + 1; no comparison: it is traced
                count = count - count // (most + 1)
            found.append(count)
        return found

    def unfolded(self, x: Tensor, fill: float) -> Tensor:
        """[..., windows, kernel]: the numbers of each window, `fill` in the padding."""
        sizes = [x.shape[a - self.axes] for a in range(self.axes)]
        pads: list[int] = []
        for (size, k, s, p, d), count in zip(self._along(sizes), self.counts(sizes), strict=True):
            # less than 0 where numbers at the end are in no window
            pads = [p, (count - 1) * s + d * (k - 1) + 1 - size - p, *pads]
        x = F.pad(x, pads, value=fill)
        for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True):
            x = x.unfold(-self.axes, d * (k - 1) + 1, s)[..., ::d]
        return x

    def _along(self, sizes: Sequence[Any]) -> Any:
        return zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)


def windows_of(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
    axes: int,
    beta: float,
) -> Windows:
    """As torch's pooling takes them: one number for all dimensions, no stride for the kernel's."""
    stride = kernel_size if stride is None or stride == [] or stride == () else stride
    named = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    kernel, strides, pads, dilations = (_each(v, axes, name) for name, v in named.items())
    return Windows(kernel, strides, pads, dilations, bool(ceil_mode), float(beta))


def _each(value: int | Sequence[int], axes: int, name: str) -> tuple[int, ...]:
    found = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in found):
        raise TypeError(f"{name}: expected an int or {axes} of them, got {value!r}")
    least = 0 if name == "padding" else 1
    if min(found, default=least) < least:
        raise ValueError(f"{name}: expected numbers from {least}, got {min(found)}")
    return found * axes if len(found) == 1 else found


def smooth_max_formula(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *,
    axes: int = 2,
    beta: float = 100.0,
) -> Tensor:
    """What `smooth_max_pool` of these arguments is, in torch's operators; of proxies too."""
    return formula(x, windows_of(kernel_size, stride, padding, dilation, ceil_mode, axes, beta))


def formula(x: Tensor, windows: Windows) -> Tensor:
    """log(sum exp(beta x)) / beta over the windows. 16-bit types in float32, rounded once."""
    y = windows.unfolded(_wide(x) * windows.beta, -math.inf)
    axes = tuple(range(-windows.axes, 0))
    # torch.logsumexp cannot be differentiated backward after forward
    top = y.amax(axes, keepdim=True).detach()
    top = top.masked_fill(top.isinf(), 0.0)
    total = (y - top).exp().sum(axes)
    return ((total.log() + top.sum(axes)) / windows.beta).to(x.dtype)


def tangent(x: Tensor, v: Tensor, windows: Windows) -> Tensor:
    """The derivative of `formula` at x along v: the mean of v by the weights of each window."""
    axes = tuple(range(-windows.axes, 0))
    y = windows.unfolded(_wide(x) * windows.beta, -math.inf).flatten(-windows.axes)
    weights = torch.softmax(y, -1).unflatten(-1, windows.kernel)
    return (weights * windows.unfolded(_wide(v), 0.0)).sum(axes).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    sixteen = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if sixteen else x  # a proxy has no dtype
