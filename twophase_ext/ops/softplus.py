"""The exact softplus, log(1 + exp(beta x)) / beta, for every x, differentiable to any order.

Derivatives are taken from the output y alone (s = sigmoid(beta x) = 1 - exp(-beta y)), so nothing
but y is kept for the backward pass and the in-place form is possible.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase

_ops = torch.ops.twophase


def softplus(x: Tensor, beta: float = 100.0) -> Tensor:
    """Softplus max(x, 0) + log1p(exp(-beta |x|)) / beta, elementwise, without a threshold.

    x: floating-point tensor (float16, bfloat16, float32, float64) of any shape and strides; the
    result has its shape, dtype and, where x is dense, its strides. 16-bit types are computed in
    float32 and rounded once. NaN propagates, +inf gives +inf; in float32 (float64) a result below
    2^-126 (2^-1022) is that number, so that no subnormal is ever produced. beta: 1e-30 to 1e30.

    Works under autograd to any order, torch.func (vmap, grad, jvp), torch.compile and autocast.
    Raises ValueError for another dtype or a beta out of range.
    """
    if torch.compiler.is_compiling():
        return _ops.softplus(x, beta)
    return _Softplus.apply(x, beta)


def softplus_(x: Tensor, beta: float = 100.0) -> Tensor:
    """Softplus in place: as `softplus`, overwrites x and returns it; only the output is kept."""
    if torch.compiler.is_compiling():
        return x.copy_(_ops.softplus(x, beta))
    return _SoftplusInPlace.apply(x, beta)


def _one_batch_size(info: Any, dims: tuple, *tensors: Tensor) -> list[Tensor]:
    """Put vmap's dimension in front of every tensor, added where it is missing."""
    return [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=False)
    ]


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, beta: float) -> Tensor:
        return _ops.softplus(x, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.beta = inputs[1]
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SoftplusBackward.apply(grad, ctx.saved_tensors[0], ctx.beta), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _SoftplusBackward.apply(tangent, ctx.saved_tensors[0], ctx.beta)

    @staticmethod
    def vmap(info: Any, dims: tuple, x: Tensor, beta: float) -> tuple[Tensor, int]:
        return _Softplus.apply(x, beta), dims[0]


class _SoftplusInPlace(_Softplus):
    @staticmethod
    def forward(x: Tensor, beta: float) -> Tensor:
        _ops.softplus_(x, beta)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_dirty(inputs[0])
        _Softplus.setup_context(ctx, inputs, output)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        # forward AD asks an in-place function to change the tangent in place too
        return tangent.copy_(_SoftplusBackward.apply(tangent, ctx.saved_tensors[0], ctx.beta))

    @staticmethod
    def vmap(info: Any, dims: tuple, x: Tensor, beta: float) -> tuple[Tensor, int]:
        return _SoftplusInPlace.apply(x, beta), dims[0]


class _SoftplusBackward(torch.autograd.Function):
    """(grad, y) -> grad * s(y), s = 1 - exp(-beta y)."""

    @staticmethod
    def forward(grad: Tensor, y: Tensor, beta: float) -> Tensor:
        return _ops.softplus_backward(grad, y, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        grad, y, ctx.beta = inputs
        ctx.save_for_backward(grad, y)
        ctx.save_for_forward(grad, y)

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_SoftplusDoubleBackward.apply(grad_grad, *ctx.saved_tensors, ctx.beta), None

    @staticmethod
    def jvp(ctx: Any, grad_tangent: Tensor, y_tangent: Tensor, _: None) -> Tensor:
        grad, y = ctx.saved_tensors
        s_part = _SoftplusBackward.apply(grad_tangent, y, ctx.beta)
        return s_part + _SoftplusDoubleBackward.apply(y_tangent, grad, y, ctx.beta)[1]

    @staticmethod
    def vmap(info: Any, dims: tuple, grad: Tensor, y: Tensor, beta: float) -> tuple[Tensor, int]:
        return _SoftplusBackward.apply(*_one_batch_size(info, dims, grad, y), beta), 0


class _SoftplusDoubleBackward(torch.autograd.Function):
    """(gg, grad, y) -> (gg * s, gg * grad * beta * (1 - s)): the derivatives by grad and by y."""

    @staticmethod
    def forward(gg: Tensor, grad: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        return _ops.softplus_double_backward(gg, grad, y, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        gg, grad, y, ctx.beta = inputs
        ctx.save_for_backward(gg, grad, y)
        ctx.save_for_forward(gg, grad, y)

    # Third derivatives and beyond are rare: plain torch operations of y, themselves differentiable.
    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gg, grad, y = ctx.saved_tensors
        rest = torch.exp(-ctx.beta * y)  # 1 - s
        b_slope = b * ctx.beta * rest
        y_part = ctx.beta * rest * (a * gg - b * gg * grad * ctx.beta)
        return a * (1 - rest) + b_slope * grad, b_slope * gg, y_part, None

    @staticmethod
    def jvp(ctx: Any, gg_t: Tensor, grad_t: Tensor, y_t: Tensor, _: None) -> tuple[Tensor, Tensor]:
        gg, grad, y = ctx.saved_tensors
        rest = torch.exp(-ctx.beta * y)
        first = gg_t * (1 - rest) + gg * y_t * ctx.beta * rest
        second = (gg_t * grad + gg * grad_t - ctx.beta * gg * grad * y_t) * ctx.beta * rest
        return first, second

    @staticmethod
    def vmap(
        info: Any, dims: tuple, gg: Tensor, grad: Tensor, y: Tensor, beta: float
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        tensors = _one_batch_size(info, dims, gg, grad, y)
        return _SoftplusDoubleBackward.apply(*tensors, beta), (0, 0)


# The raw operators: what torch.compile traces, with a gradient for whoever calls them directly.
@torch.library.register_fake("twophase::softplus")
def _(x: Tensor, beta: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("twophase::softplus_")
def _(x: Tensor, beta: float) -> None:
    return None


@torch.library.register_fake("twophase::softplus_backward")
def _(grad: Tensor, y: Tensor, beta: float) -> Tensor:
    return torch.empty_like(y)


@torch.library.register_fake("twophase::softplus_double_backward")
def _(grad_grad: Tensor, grad: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(y)


def _save_output(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.beta = inputs[1]
    ctx.save_for_backward(output)


def _raw_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _ops.softplus_backward(grad, ctx.saved_tensors[0], ctx.beta), None


def _raw_double_backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_ops.softplus_double_backward(grad_grad, *ctx.saved_tensors, ctx.beta), None


torch.library.register_autograd("twophase::softplus", _raw_backward, setup_context=_save_output)
torch.library.register_autograd(
    "twophase::softplus_backward",
    _raw_double_backward,
    setup_context=_SoftplusBackward.setup_context,
)
