"""The exact softplus, log(1 + exp(beta x)) / beta, for every x, differentiable to any order.

Derivatives are taken from the output y alone (s = sigmoid(beta x) = 1 - exp(-beta y)), so nothing
but y is kept for the backward pass and the in-place form is possible.
"""

from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import register_decomposition
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ..core.arrays import as_tensor
from ..core.dynamo import allowed_in_graph
from ..core.sharded import is_sharded
from ._arguments import require_tensor
from ._inductor import keep_whole
from ._sharding import register
from ._softplus_terms import Term, Terms, batch_first, evaluate

_ops = torch.ops.twophase
# What costs a small tensor's call the least: overloads past their Python call, below autograd.
_forward, _forward_ = _ops.softplus.default._op, _ops.softplus_.default._op
_backward = _ops.softplus_backward.default._op
_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active


def softplus(x: Any, beta: float = 100.0) -> Tensor:
    """Softplus max(x, 0) + log1p(exp(-beta |x|)) / beta, elementwise, without a threshold.

    x: floating-point tensor (float16, bfloat16, float32, float64) of any shape and strides, or a
    NumPy, CuPy or other DLPack array, whose memory is shared. The result is a tensor of its shape,
    dtype and, where x is dense, strides. 16-bit types are computed in float32 and rounded once.
    NaN propagates, +inf gives +inf; in float32 (float64) the result is 2^-126 (2^-1022) where it or
    exp(-beta |x|) would be smaller, so that no subnormal is ever produced. beta: 1e-30 to 1e30.

    Works under autograd to any order, torch.func (vmap, grad, jvp), torch.compile and autocast.
    Raises ValueError for another dtype or a beta out of range, TypeError for anything but an array
    and a number.
    """
    if is_compiling():
        return _traced(x, beta)
    if has_torch_function_unary(x):  # torch.fx's proxies, tensor subclasses
        return handle_torch_function(softplus, (x,), x, beta)
    if type(x) is not Tensor and is_sharded(x):
        return _sharded(x, beta)
    if type(beta) is not float:
        _check_beta(beta)
    if not isinstance(x, Tensor):
        x = as_tensor(x, name="x")
    if _functorch_active() or forward_ad._current_level >= 0:
        return _Softplus.apply(x, beta)
    if x.requires_grad and torch.is_grad_enabled():
        return _eager(x, beta)
    with _below_autograd():
        return _forward(x, beta)


def softplus_(x: Tensor, beta: float = 100.0) -> Tensor:
    """Softplus in place: as `softplus`, overwrites x and returns it; only the output is kept.

    x must be a torch.Tensor. Raises also RuntimeError where x is a leaf that requires grad (or a
    view of one), and ValueError where elements of x share memory (an expanded tensor) or x is
    a negated view; x is then as it was.
    """
    if is_compiling():
        return x.copy_(_traced(x, beta))
    if has_torch_function_unary(x):
        return handle_torch_function(softplus_, (x,), x, beta)
    if type(x) is not Tensor and is_sharded(x):
        return x.copy_(_sharded(x.clone(), beta))
    require_tensor(x, "x", written=True)
    _check_beta(beta)
    # copy_ carries batching and tangents through every nesting of transforms; a Function that
    # writes its input cannot. The clone: copy_ overwrites x's tangent, which is still needed to
    # differentiate the new one.
    if _transformed():
        return x.copy_(_Softplus.apply(x.clone(), beta))
    if torch.is_grad_enabled() and x.requires_grad:
        _refuse_leaf(x)
    return _SoftplusInPlace.apply(x, beta)


def _sharded(x: Tensor, beta: float) -> Tensor:
    _check_beta(beta)
    register()
    result: Tensor = _Softplus.apply(x, float(beta))
    return result


def _transformed() -> bool:
    """Is vmap, grad, jvp or forward differentiation under way?"""
    return _functorch_active() or forward_ad._current_level >= 0


def _check_beta(beta: Any) -> None:
    if not isinstance(beta, Real):
        raise TypeError(f"beta: expected a number, got {type(beta).__name__}")


def _refuse_leaf(x: Tensor) -> None:
    # torch says so only after the forward has overwritten x
    source = x._base if x._is_view() else x
    if source is not None and source.is_leaf and source.requires_grad:
        kind = "a leaf" if source is x else "a view of a leaf"
        raise RuntimeError(f"x: {kind} Variable that requires grad cannot be overwritten in place")


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


class _EagerSoftplus(torch.autograd.Function):
    """Without transforms: a forward that takes ctx, as for one with setup_context torch inspects
    its Python signature at every call, which costs more than a small tensor's whole step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:
        with _below_autograd():
            y = _forward(x, beta)
        ctx.beta = beta
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled() or _transformed():
            return _SoftplusBackward.apply(grad, y, ctx.beta), None
        with _below_autograd():
            return _backward(grad, y, ctx.beta), None


# Past Function.apply, which asks for transforms once more.
_eager = super(torch.autograd.Function, _EagerSoftplus).apply


class _SoftplusInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:
        ctx.mark_dirty(x)
        _forward_(x, beta)
        ctx.beta = beta
        ctx.save_for_backward(x)
        return x

    backward = _EagerSoftplus.backward


def _first_order(beta: float) -> Terms:
    """grad * s, of the tensors (grad,)."""
    return Terms(beta, (Term(1.0, 1, 0, (0,)),))


def _second_order(beta: float) -> tuple[Terms, Terms]:
    """(gg * s, gg * grad * beta * r), of the tensors (gg, grad)."""
    return _first_order(beta), Terms(beta, (Term(beta, 0, 1, (0, 1)),))


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
        return _first_order(ctx.beta).tangent(y, (grad,), y_tangent, grad_tangent)

    @staticmethod
    def vmap(info: Any, dims: tuple, grad: Tensor, y: Tensor, beta: float) -> tuple[Tensor, int]:
        return _SoftplusBackward.apply(*batch_first(info, dims[:2], (grad, y)), beta), 0


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

    # Third derivatives and beyond are rare: plain torch operations.
    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gg, grad, y = ctx.saved_tensors
        first, second = _second_order(ctx.beta)
        tensors = (gg, grad, a, b)
        by = (
            first.by_factor(0, 2) + second.by_factor(0, 3),
            second.by_factor(1, 3),
            first.by_y(2) + second.by_y(3),
        )
        by_gg, by_grad, by_y = (evaluate(ctx.beta, terms, y, *tensors) for terms in by)
        return by_gg, by_grad, by_y, None

    @staticmethod
    def jvp(
        ctx: Any, gg_tangent: Tensor, grad_tangent: Tensor, y_tangent: Tensor, _: None
    ) -> tuple[Tensor, Tensor]:
        gg, grad, y = ctx.saved_tensors
        tangents = (y_tangent, gg_tangent, grad_tangent)
        first, second = _second_order(ctx.beta)
        return first.tangent(y, (gg, grad), *tangents), second.tangent(y, (gg, grad), *tangents)

    @staticmethod
    def vmap(
        info: Any, dims: tuple, gg: Tensor, grad: Tensor, y: Tensor, beta: float
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        tensors = batch_first(info, dims[:3], (gg, grad, y))
        return _SoftplusDoubleBackward.apply(*tensors, beta), (0, 0)


@allowed_in_graph
def _traced(x: Tensor, beta: float) -> Tensor:
    # Kept whole by dynamo, traced by AOTAutograd: transforms inside a compiled function meet the
    # Functions above, which know their derivatives, and not the raw operators.
    return _Softplus.apply(x, beta)


# The raw operators: what torch.compile traces, with a gradient for whoever calls them directly.
@torch.library.register_fake("twophase::softplus")
def _(x: Tensor, beta: float) -> Tensor:
    keep_whole(_ops.softplus.default)
    return torch.empty_like(x)


# For exporters (torch.onnx takes all that are registered) and ExportedProgram.run_decompositions
# with get_decompositions. Beyond beta x = 40 x is softplus, rounded, in float64 too.
@register_decomposition(_ops.softplus.default)
def _decomposed(x: Tensor, beta: float) -> Tensor:
    return F.softplus(x, beta, threshold=40.0)


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


def _save_inputs(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.beta = inputs
    ctx.save_for_backward(*tensors)


def _raw_double_backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_ops.softplus_double_backward(grad_grad, *ctx.saved_tensors, ctx.beta), None


torch.library.register_autograd("twophase::softplus", _raw_backward, setup_context=_save_output)
torch.library.register_autograd(
    "twophase::softplus_backward", _raw_double_backward, setup_context=_save_inputs
)
torch.library.register_autograd(
    "twophase::softplus_double_backward",
    _SoftplusDoubleBackward.backward,
    setup_context=_save_inputs,
)
