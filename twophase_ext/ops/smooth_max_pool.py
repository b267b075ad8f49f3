"""The smooth maximum over pooling windows, log(sum exp(beta x)) / beta, and its derivatives.

Its gradient shares what comes back to a window among its numbers as their softmax. With P(x) the
pooled values, B(g, x) their vector-Jacobian product and T(x, v) their derivative along v,
  d <B(g, x), v> / dg = T(x, v),   d <B(g, x), v> / dx = beta (v B(g, x) - B(g T(x, v), x)):
P and B are kernels, T is torch's operators, and every order is made of the three.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ..core.dynamo import allowed_in_graph
from ._arguments import number, require_tensor
from ._inductor import keep_whole
from ._windows import Windows, formula, tangent, windows_of

_ops = torch.ops.twophase
_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active


def smooth_max_pool(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    axes: int = 2,
    beta: float = 100.0,
) -> Tensor:
    """log(sum exp(beta x)) / beta over the windows of torch's max pooling of `axes` dimensions.

    x: [c, ...] or [b, c, ...] with `axes` dimensions behind (1, 2 or 3), of float16, bfloat16,
    float32 or float64. Settings as of torch.nn.MaxPool1d, 2d and 3d; what lies in the padding is
    absent. The result is between a window's maximum and log(its numbers) / beta above it, has the
    shape of torch's and x's dtype and memory format (channels_last too). 16-bit types are computed
    in float32 and rounded once. beta: 1e-30 to 1e30. With u the unit roundoff and k a window's
    numbers, the result is off by u |y| + (k + 16 + 12 log k) u / beta at most.

    A window with a NaN gives NaN, one with +inf +inf, one of nothing but -inf that; where the
    largest number is infinite, the gradient is NaN. Weights below 2^-64 of the window's largest
    (2^-512 in float64) count as 0 in sums and gradients.

    Works under autograd to any order, torch.func (vmap, grad, jvp) and torch.compile; forward
    differentiation runs torch's own operators. Raises TypeError for anything but a tensor and a
    number, ValueError for another dtype or shape and for settings that torch's pooling refuses.
    """
    if is_compiling():
        windows = windows_of(kernel_size, stride, padding, dilation, ceil_mode, axes, beta)
        return _traced(x, *windows.arguments)
    if has_torch_function_unary(x):  # torch.fx's proxies, tensor subclasses
        arguments = (x, kernel_size, stride, padding, dilation, ceil_mode)
        return handle_torch_function(smooth_max_pool, (x,), *arguments, axes=axes, beta=beta)
    require_tensor(x, "x")
    if axes not in (1, 2, 3):
        raise ValueError(f"axes: expected 1, 2 or 3, got {axes}")
    beta = number(beta, "beta")
    windows = windows_of(kernel_size, stride, padding, dilation, ceil_mode, axes, beta)
    if len(windows.kernel) != axes:
        raise ValueError(
            f"kernel_size: expected one number or {axes}, one a dimension, got {kernel_size}"
        )
    return _apply(x, windows)


def _apply(x: Tensor, windows: Windows) -> Tensor:
    return formula(x, windows) if _forward_mode() else _SmoothMaxPool.apply(x, windows)


def _forward_mode() -> bool:
    """Is forward differentiation under way? What a Function's jvp computes has no tangents of the
    outer levels; torch's operators have.
    """
    if forward_ad._current_level >= 0:
        return True
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in levels)


class _SmoothMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, windows: Windows) -> Tensor:
        return _ops.smooth_max_pool(x, *windows.arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.windows = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled() or _functorch_active():
            return _SmoothMaxPoolBackward.apply(grad, x, ctx.windows), None
        with _below_autograd():
            return _ops.smooth_max_pool_backward(grad, x, *ctx.windows.arguments), None

    @staticmethod
    def vmap(info: Any, dims: tuple, x: Tensor, windows: Windows) -> tuple[Tensor, int]:
        (x,), outer = _images(info, dims[:1], (x,), windows)
        return _SmoothMaxPool.apply(x, windows).unflatten(0, outer), 0


class _SmoothMaxPoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, x: Tensor, windows: Windows) -> Tensor:
        return _ops.smooth_max_pool_backward(grad, x, *windows.arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        grad, x, ctx.windows = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, None]:
        grad, x = ctx.saved_tensors
        return *_second_order(_SmoothMaxPoolBackward.apply, v, grad, x, ctx.windows), None

    @staticmethod
    def vmap(
        info: Any, dims: tuple, grad: Tensor, x: Tensor, windows: Windows
    ) -> tuple[Tensor, int]:
        (grad, x), outer = _images(info, dims[:2], (grad, x), windows)
        return _SmoothMaxPoolBackward.apply(grad, x, windows).unflatten(0, outer), 0


def _second_order(
    first: Any, v: Tensor, grad: Tensor, x: Tensor, windows: Windows
) -> tuple[Tensor, Tensor]:
    """The derivatives of B(grad, x), times v, by grad and by x; first: B."""
    along = tangent(x, v, windows)
    by_x = windows.beta * (v * first(grad, x, windows) - first(grad * along, x, windows))
    return along, by_x


def _images(
    info: Any, dims: tuple, tensors: tuple[Tensor, ...], windows: Windows
) -> tuple[list[Tensor], tuple[int, ...]]:
    """vmap's dimension in front of every tensor, joined with that of the batch where there is one;
    and what the first dimension is to be parted into again.
    """
    size = info.batch_size
    found = [
        tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
    if found[0].dim() == windows.axes + 2:
        return found, (size,)
    return [tensor.flatten(0, 1) for tensor in found], (size, found[0].shape[1])


@allowed_in_graph
def _traced(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    beta: float,
) -> Tensor:
    # Kept whole by dynamo, traced by AOTAutograd: transforms inside a compiled function meet the
    # Functions above, which know their derivatives, and not the raw operators.
    return _apply(x, _windows((kernel, stride, padding, dilation, ceil_mode, beta)))


def _windows(arguments: Sequence[Any]) -> Windows:
    """Of the operators' arguments."""
    kernel, stride, padding, dilation, ceil_mode, beta = arguments
    lists = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
    return Windows(*lists, ceil_mode, beta)


# The raw operators: what torch.compile traces, with a gradient for whoever calls them directly.
def _format(x: Tensor, axes: int) -> torch.memory_format:
    """As `is_channels_last` of csrc/smooth_max_pool.h."""
    if axes == 1 or x.dim() != axes + 2 or x.is_contiguous():
        return torch.contiguous_format
    reached = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        size, stride = x.shape[d], x.stride(d)
        if size == 0 or stride == 0 or stride < reached or (d == 0 and reached == x.stride(1)):
            return torch.contiguous_format
        reached = stride * size
    return torch.channels_last if axes == 2 else torch.channels_last_3d


@torch.library.register_fake("twophase::smooth_max_pool")
def _(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    beta: float,
) -> Tensor:
    keep_whole(_ops.smooth_max_pool.default)
    windows = _windows((kernel, stride, padding, dilation, ceil_mode, beta))
    shape = [*x.shape[: -windows.axes], *windows.counts(x.shape[-windows.axes :])]
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    return y.to(memory_format=_format(x, windows.axes))


@torch.library.register_fake("twophase::smooth_max_pool_backward")
def _(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    beta: float,
) -> Tensor:
    return torch.empty_like(x, memory_format=_format(x, len(kernel)))


# For exporters (torch.onnx takes all that are registered) and ExportedProgram.run_decompositions
# with get_decompositions.
@register_decomposition(_ops.smooth_max_pool.default)
def _decomposed(x: Tensor, *arguments: Any) -> Tensor:
    return formula(x, _windows(arguments))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tensors = [v for v in inputs if isinstance(v, Tensor)]
    ctx.windows = _windows(inputs[len(tensors) :])
    ctx.save_for_backward(*tensors)


def _raw_first(grad: Tensor, x: Tensor, windows: Windows) -> Tensor:
    return _ops.smooth_max_pool_backward(grad, x, *windows.arguments)


def _raw_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return _raw_first(grad, x, ctx.windows), *[None] * 6


def _raw_double_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    return *_second_order(_raw_first, v, grad, x, ctx.windows), *[None] * 6


torch.library.register_autograd("twophase::smooth_max_pool", _raw_backward, setup_context=_save)
torch.library.register_autograd(
    "twophase::smooth_max_pool_backward", _raw_double_backward, setup_context=_save
)
