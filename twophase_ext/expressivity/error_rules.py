"""One rule for each operation: how a bound of the error passes through it.

An operation f with Lipschitz constant K, whose computed result on the computed input is off by r,
turns a bound e into K e + r. r is bounded as in Higham (2002), section 3: sums of k products in any
order are off by gamma_k times the sum of the absolute values.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..linalg.bounds import SLACK, UNIT_ROUNDOFF, gamma
from ..linalg.norms import frobenius_upper
from .bounded import ULPS, Bounded, bounded, constant, refuse, rounded, sample_norms
from .operator_norms import OperatorNorms, conv_norms, convolve, linear_norms, pool_norm


def _tuple(value: Any, length: int) -> tuple[int, ...]:
    return (value,) * length if isinstance(value, int) else tuple(value)


class Rules:
    """The rules, with parameters named as torch names them; norms of weights are kept.

    Every method takes and returns `Bounded`, and raises `Unbounded` where its bound does not hold.
    """

    def __init__(self) -> None:
        """Norms are computed at a weight's first use: change no weight while this object lives."""
        self._norms: dict[Any, tuple[Tensor, OperatorNorms]] = {}

    def _norms_of(
        self, weight: Tensor, key: tuple[Any, ...], compute: Callable[[Tensor], OperatorNorms]
    ) -> OperatorNorms:
        # the tensor is kept beside its norms: its id is not given to another one
        found = self._norms.get((id(weight), key))
        if found is None:
            found = weight, compute(weight.detach().double())
            self._norms[id(weight), key] = found
        return found[1]

    def _affine(
        self, x: Bounded, value: Tensor, norms: OperatorNorms, terms: int, bias: Tensor | None
    ) -> Bounded:
        channels = value.shape[1] if bias is None else len(bias)
        copies = math.prod(value.shape[1:]) // channels
        shift = 0.0 if bias is None else math.sqrt(copies) * frobenius_upper(bias)
        rounding = gamma(terms + 2) * (norms.absolute * x.norm + shift)
        return bounded(value, norms.plain * x.error, rounding)

    def linear(self, input: Bounded, weight: Tensor, bias: Tensor | None = None) -> Bounded:
        """x W^T + b: ||W||_2 error + gamma_(k+2) (|| |W| ||_2 ||x||_2 + ||b||_2)."""
        norms = self._norms_of(weight, (), linear_norms)
        bias = None if bias is None else bias.double()
        value = F.linear(input.value, weight.double(), bias)
        return self._affine(input, value, norms, weight.shape[1], bias)

    def conv2d(
        self,
        input: Bounded,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Bounded:
        """Convolution with zero padding, as `linear` with the norms of operator_norms.py."""
        return self._conv(input, weight, bias, stride, padding, dilation, groups, 2)

    def conv1d(
        self,
        input: Bounded,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Bounded:
        """A convolution of images one pixel high."""
        out = self._conv(
            Bounded(input.value.unsqueeze(2), input.error),
            *(weight, bias, stride, padding, dilation, groups, 1),
        )
        return Bounded(out.value.squeeze(2), out.error)

    def _conv(
        self,
        x: Bounded,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        axes: int,
    ) -> Bounded:
        if x.value.dim() != 4:
            refuse(f"expected a batch of {axes}-dimensional images with channels")
        high = (1,) * (2 - axes)  # a signal is an image one pixel high
        kernel = (*high, *weight.shape[2:])
        steps = (*high, *_tuple(stride, axes)), (*high, *_tuple(dilation, axes))
        if padding == "same":
            whole = [d * (k - 1) for d, k in zip(steps[1], kernel, strict=True)]
            margins = [(w // 2, w - w // 2) for w in whole]
        else:
            by_axis = _tuple(0 if padding == "valid" else padding, axes)
            margins = [(p, p) for p in ((0,) * len(high) + by_axis)]

        def image(w: Tensor) -> Tensor:
            return w.double().reshape(*w.shape[:2], *kernel)

        norms = self._norms_of(
            weight, (steps, groups), lambda w: conv_norms(image(w), *steps, groups)
        )
        bias = None if bias is None else bias.double()
        value = convolve(x.value, image(weight), bias, steps[0], margins, steps[1], groups)
        return self._affine(x, value, norms, weight[0].numel(), bias)

    def batch_norm(
        self,
        input: Bounded,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Bounded:
        """(x - mean) weight / sqrt(var + eps) + bias with the running statistics.

        With s the scale, computed as x s + (bias - mean s): six roundings at most of each of x s,
        mean s and bias, and |x s| <= |y| + |bias| + |mean s|.
        """
        if training or running_mean is None or running_var is None:
            return refuse("it uses the statistics of the batch")
        mean, variance = running_mean.double(), running_var.double()
        if not bool((variance >= 0).all()) or not eps > 0:
            return refuse("expected running_var >= 0 and eps > 0")
        scale = 1 / (variance + eps).sqrt()
        scale = scale if weight is None else scale * weight.double()
        offset = torch.zeros_like(mean) if bias is None else bias.double()
        spread = frobenius_upper(offset.abs() + (mean * scale).abs())
        channels = (-1, *[1] * (input.value.dim() - 2))
        value = torch.addcmul(
            (offset - mean * scale).view(channels), input.value, scale.view(channels)
        )
        result = Bounded(value, input.error)
        total = result.norm + 2 * math.sqrt(input.size // len(mean)) * spread
        result.error = bounded(
            value, float(scale.abs().max()) * SLACK * input.error, gamma(12) * total
        ).error
        return result

    def layer_norm(
        self,
        input: Bounded,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Bounded:
        """c / sqrt(||c||^2 / d + eps) * weight + bias, c = x - mean(x), over the last axes.

        c -> c / s, s(c) = sqrt(||c||^2 / d + eps), has the derivative (I - c c^T / (d s^2)) / s, of
        norm 1 / s at most, and s is 1 / sqrt(d)-Lipschitz: between the exact and the computed c, r
        apart, s >= s(computed) - r / sqrt(d). The computed c is off by the error of x and by the
        mean's rounding, sqrt(d) |computed mean - mean| <= gamma_d ||x||, and its own, u ||c||.
        """
        if not eps > 0:
            return refuse("expected eps > 0")
        dims = tuple(range(-len(normalized_shape), 0))
        d = math.prod(normalized_shape)
        x = input.value
        centred = x - x.mean(dims, keepdim=True)
        s = (centred.square().mean(dims, keepdim=True) + eps).sqrt()
        value = centred / s
        gain, shift = 1.0, 0.0
        if weight is not None:
            value, gain = value * weight.double(), float(weight.abs().max())
        if bias is not None:
            value = value + bias.double()
            shift = math.sqrt(input.size // d) * frobenius_upper(bias.double())
        off = (
            input.error + gamma(d + 2) * input.norm + 2 * UNIT_ROUNDOFF * sample_norms(centred)
        ) * SLACK
        smallest = s.flatten(1).amin(1) * (1 - gamma(d + 8)) / SLACK
        low = torch.maximum(smallest - off / math.sqrt(d) * SLACK, x.new_tensor(eps).sqrt() / SLACK)
        result = Bounded(value, off)
        rounding = gamma(d + 12) * (result.norm + 2 * shift)
        result.error = bounded(value, gain * off / low, rounding).error
        return result

    def _elementwise(
        self, x: Bounded, value: Tensor, lipschitz: float, of_output: float, of_input: float
    ) -> Bounded:
        """Errors of so many u times |output| and |input|, entry by entry."""
        result = Bounded(value, x.error)
        rounding = UNIT_ROUNDOFF * ((of_output * result.norm) + (of_input * x.norm))
        result.error = bounded(value, lipschitz * x.error, rounding).error
        return result

    def softplus(self, input: Bounded, beta: float = 100.0) -> Bounded:
        """The exact softplus: 1-Lipschitz, off by 8u |h| + 8u / beta."""
        value = ops.softplus(input.value, beta)
        result = Bounded(value, input.error)
        constant = 8 * UNIT_ROUNDOFF / beta * math.sqrt(input.size)
        terms = input.error, 8 * UNIT_ROUNDOFF * result.norm, constant
        result.error = bounded(value, *terms).error
        return result

    def relu(self, input: Bounded, inplace: bool = False) -> Bounded:
        """1-Lipschitz and computed exactly."""
        return Bounded(input.value.relu(), input.error)

    def sigmoid(self, input: Bounded) -> Bounded:
        """1/4-Lipschitz; 1 / (1 + exp(-x)) is off by 10u, exp by 8u of them."""
        return self._elementwise(input, input.value.sigmoid(), 0.25, 16, 0)

    def tanh(self, input: Bounded) -> Bounded:
        """1-Lipschitz, off by 8u."""
        return self._elementwise(input, input.value.tanh(), 1.0, 2 * ULPS, 0)

    def silu(self, input: Bounded, inplace: bool = False) -> Bounded:
        """x sigmoid(x): its derivative stays below 1.0999."""
        return self._elementwise(input, F.silu(input.value), 1.1, 16, 0)

    def gelu(self, input: Bounded, approximate: str = "none") -> Bounded:
        """x (1 + erf(x / sqrt 2)) / 2: derivative below 1.129; the factor errs by 6u, absolute."""
        if approximate != "none":
            return refuse("no rule for the tanh approximation of GELU; use approximate='none'")
        return self._elementwise(input, F.gelu(input.value), 1.13, 0, 16)

    def add(self, input: Any, other: Any, *, alpha: float = 1) -> Bounded:
        """Sum; a constant operand may be a scalar or a stored tensor."""
        return self._sum(input, other, 1) if alpha == 1 else refuse("no rule for alpha != 1")

    def sub(self, input: Any, other: Any, *, alpha: float = 1) -> Bounded:
        """Difference, as `add`."""
        return self._sum(input, other, -1) if alpha == 1 else refuse("no rule for alpha != 1")

    def _sum(self, a: Any, b: Any, sign: int) -> Bounded:
        if isinstance(a, Bounded) and isinstance(b, Bounded):
            if a.value.shape != b.value.shape:
                refuse(f"operands of shapes {tuple(a.value.shape)} and {tuple(b.value.shape)}")
            value = a.value + b.value if sign > 0 else a.value - b.value
            return rounded(value, a.error + b.error)
        if isinstance(a, Bounded):
            other = constant(b, a.value.shape, "the sum")
            return rounded(a.value + other if sign > 0 else a.value - other, a.error)
        other = constant(a, b.value.shape, "the sum")
        return rounded(other + b.value if sign > 0 else other - b.value, b.error)

    def neg(self, input: Bounded) -> Bounded:
        """Exact."""
        return Bounded(-input.value, input.error)

    def mul(self, input: Any, other: Any) -> Bounded:
        """Product with a scalar or a stored tensor."""
        x, by = (input, other) if isinstance(input, Bounded) else (other, input)
        if isinstance(by, Bounded):
            return refuse("no rule for a product of two activations")
        factor = constant(by, x.value.shape, "the product")
        largest = float(torch.as_tensor(factor, device="cpu").abs().max())
        return rounded(x.value * factor, largest * x.error)

    def div(self, input: Any, other: Any, *, rounding_mode: str | None = None) -> Bounded:
        """Quotient by a scalar."""
        plain = isinstance(other, int | float) and other != 0 and isinstance(input, Bounded)
        if rounding_mode is not None or not plain:
            return refuse("no rule for this quotient; a division by a number has one")
        return rounded(input.value / other, input.error / abs(other))

    def mean(
        self, input: Bounded, dim: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> Bounded:
        """Mean of c numbers: norm 1 / sqrt(c)."""
        dims, count = self._reduced(input, dim, dtype)
        value = input.value.mean(dims, keepdim=keepdim)
        return self._reduction(input, value, 1 / math.sqrt(count), count)

    def sum(
        self, input: Bounded, dim: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> Bounded:
        """Sum of c numbers: norm sqrt(c)."""
        dims, count = self._reduced(input, dim, dtype)
        value = input.value.sum(dims, keepdim=keepdim)
        return self._reduction(input, value, math.sqrt(count), count)

    def _reduced(self, x: Bounded, dim: Any, dtype: Any) -> tuple[list[int], int]:
        if dim is None or dtype not in (None, torch.float64):
            refuse("it mixes the samples, or changes the dtype")
        dims = [d % x.value.dim() for d in ([dim] if isinstance(dim, int) else dim)]
        if 0 in dims or not dims:
            refuse("it mixes the samples")
        return dims, math.prod(x.value.shape[d] for d in dims)

    def _reduction(self, x: Bounded, value: Tensor, norm: float, terms: int) -> Bounded:
        """A non-negative operator of that norm, `terms` summands to a number."""
        if value.dim() < 2:
            refuse("it leaves one number for a sample; keep a dimension (keepdim=True)")
        return bounded(value, norm * SLACK * x.error, gamma(terms + 2) * norm * x.norm)

    def avg_pool2d(
        self,
        input: Bounded,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Bounded:
        """Averages over windows; a non-negative operator, bounded by `pool_norm`."""
        kernel, padding = _tuple(kernel_size, 2), _tuple(padding, 2)
        stride = _tuple(stride, 2) if stride else kernel
        if ceil_mode or divisor_override or (any(padding) and not count_include_pad):
            return refuse("no rule for ceil_mode, divisor_override or count_include_pad=False")
        if input.value.dim() != 4:
            return refuse("expected images [b, c, h, w]")
        value = F.avg_pool2d(input.value, kernel, stride, padding)
        sizes = [s + 2 * p for s, p in zip(input.value.shape[2:], padding, strict=True)]
        windows = [
            [range(i * s, i * s + k) for i in range(count)]
            for k, s, count in zip(kernel, stride, value.shape[2:], strict=True)
        ]
        return self._reduction(input, value, pool_norm(sizes, windows), math.prod(kernel))

    def adaptive_avg_pool2d(self, input: Bounded, output_size: Any) -> Bounded:
        """Averages over windows floor(i s / o) to ceil((i + 1) s / o) of s pixels for o outputs."""
        if input.value.dim() != 4:
            return refuse("expected images [b, c, h, w]")
        value = F.adaptive_avg_pool2d(input.value, output_size)
        sizes = input.value.shape[2:]
        windows = [
            [range(i * s // o, -(-(i + 1) * s // o)) for i in range(o)]
            for s, o in zip(sizes, value.shape[2:], strict=True)
        ]
        return self._reduction(input, value, pool_norm(sizes, windows), math.prod(sizes))

    def cat(self, tensors: Sequence[Any], dim: int = 0) -> Bounded:
        """Side by side within each sample: the errors add up."""
        if not all(isinstance(t, Bounded) for t in tensors) or dim % tensors[0].value.dim() == 0:
            return refuse("it mixes the samples, or joins activations with constants")
        error = torch.stack([t.error for t in tensors]).sum(0)
        return bounded(torch.cat([t.value for t in tensors], dim), error)

    def pad(
        self, input: Bounded, pad: Sequence[int], mode: str = "constant", value: float | None = None
    ) -> Bounded:
        """Zeros around, or a part cut off."""
        if mode != "constant" or value:
            return refuse("no rule for this padding; zeros have one")
        if len(pad) // 2 >= input.value.dim():
            return refuse("it pads the samples")
        return Bounded(F.pad(input.value, list(pad)), input.error)
