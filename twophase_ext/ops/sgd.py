"""One step of SGD on many tensors in one pass over memory."""

from collections.abc import MutableSequence, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ._arguments import numbers, require_tensor

_ops = torch.ops.twophase
# The overload past its Python call, below autograd: a small network's step is mostly such calls.
_step = _ops.sgd_.default._op
_below_autograd = torch._C._AutoDispatchBelowAutograd


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    nu: Sequence[int] | None = None,
) -> None:
    """Update params in place by torch.optim.SGD's rule, with eta_t = lr * nu as in Algorithm 1.

        g <- -g if maximize;  g <- g + weight_decay * p
        b <- g on a tensor's first step, else momentum * b + (1 - dampening) * g
        p <- p - lr * (g + momentum * b if nesterov, else b; without momentum g)

    params, grads: float32 or float64 tensors, pairwise of the same shape, dtype and device.
    momentum_buffers: a list as long; None where a tensor has made no step yet, and then filled with
    a new buffer. Ignored where momentum is 0. nu: 0 or 1 for each tensor (default 1); 0 leaves the
    parameter and its buffer as they are, weight decay and momentum included.

    The result has the bits of torch.optim.SGD (foreach=False) where torch's own kernels use fused
    multiply-add, as on every x86 processor with AVX2; a gradient that is expanded along its last
    dimension is the exception, torch itself rounds some of its elements twice.
    Raises TypeError for float16 and bfloat16 parameters, other dtypes and sparse gradients;
    ValueError for lists, shapes, dtypes or devices that do not match. Everything is checked before
    any tensor is changed.
    """
    if not isinstance(params, Sequence):
        raise TypeError(f"params: expected a list of tensors, got {type(params).__name__}")
    if momentum != 0 and not isinstance(momentum_buffers, MutableSequence):
        kind = type(momentum_buffers).__name__
        raise TypeError(f"momentum_buffers: expected a list, which is filled, got {kind}")
    rule = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    rates = numbers(**rule)
    scalars = rates[0], rates[1], rates[2], rates[3], bool(nesterov), bool(maximize)
    nu = [1] * len(params) if nu is None else nu
    buffers = momentum_buffers if scalars[1] else [None] * len(params)
    check_sgd(params, grads, buffers, nu)
    moving = [i for i, mask in enumerate(nu) if mask]
    updated = apply_sgd(
        [params[i] for i in moving],
        [grads[i] for i in moving],
        [buffers[i] for i in moving],
        scalars,
    )
    for i, buffer in zip(moving, updated, strict=False):
        momentum_buffers[i] = buffer


def check_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    nu: Sequence[int],
) -> None:
    """Raise what `sgd_` raises for lists that it cannot take."""
    for name, items in (("grads", grads), ("momentum_buffers", momentum_buffers), ("nu", nu)):
        if not isinstance(items, Sequence):
            raise TypeError(f"{name}: expected a list, got {type(items).__name__}")
        if len(items) != len(params):
            raise ValueError(f"{name}: expected {len(params)} entries, got {len(items)}")
    for i, (p, g, b) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        require_tensor(p, f"params[{i}]", written=True)
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"params[{i}]: expected float32 or float64, got {p.dtype}: a small step on a "
                "16-bit weight rounds away; keep master weights in float32 and step those"
            )
        _check_like(p, f"params[{i}]", g, f"grads[{i}]")
        if b is not None:
            _check_like(p, f"params[{i}]", b, f"momentum_buffers[{i}]", written=True)
        if nu[i] not in (0, 1):
            raise ValueError(f"nu[{i}]: expected 0 or 1, got {nu[i]}")


def _check_like(p: Tensor, p_name: str, t: Tensor, t_name: str, *, written: bool = False) -> None:
    require_tensor(t, t_name, written=written)
    for what, wanted, got in (
        ("shape", p.shape, t.shape),
        ("dtype", p.dtype, t.dtype),
        ("device", p.device, t.device),
    ):
        if wanted != got:
            raise ValueError(f"{t_name}: expected {what} {wanted} of {p_name}, got {got}")


def apply_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    scalars: tuple[float, float, float, float, bool, bool],
) -> Sequence[Tensor]:
    """The step, in one call for each device; returns the buffers, if any.

    scalars: lr, momentum, dampening, weight_decay, nesterov, maximize. momentum_buffers: None where
    a tensor has made no step yet. Raises as `check_sgd`: before anything has changed where all
    tensors are on one device. Only then are they looked at here, as that costs more than a step.
    """
    if not params:
        return []
    # Empty lists stand for "none is masked" and "no tensor's first step": they cost nothing.
    is_first_step: list[int] = []
    buffers: Sequence[Tensor] = []
    if scalars[1]:
        is_first_step = [int(b is None) for b in momentum_buffers]
        if any(is_first_step):
            buffers = [
                torch.empty_like(p) if b is None else b
                for p, b in zip(params, momentum_buffers, strict=True)
            ]
        else:
            is_first_step, buffers = [], cast("Sequence[Tensor]", momentum_buffers)
    try:
        if is_compiling():
            if _on_several_devices(params):
                return _device_by_device(params, grads, momentum_buffers, scalars)
            with torch.no_grad():
                _ops.sgd_(params, grads, buffers, [], is_first_step, *scalars)
        else:
            with _below_autograd():
                _step(params, grads, buffers, [], is_first_step, *scalars)
    except (RuntimeError, TypeError, ValueError):
        check_sgd(params, grads, momentum_buffers, [1] * len(params))
        if _on_several_devices(params):
            return _device_by_device(params, grads, momentum_buffers, scalars)
        raise
    torch.autograd.graph.increment_version([*params, *buffers])
    return buffers


def _on_several_devices(tensors: Sequence[Tensor]) -> bool:
    return len({t.device for t in tensors}) > 1


def _device_by_device(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    scalars: tuple[float, float, float, float, bool, bool],
) -> Sequence[Tensor]:
    """`apply_sgd` for each device; the lists are checked already."""
    buffers: dict[int, Tensor] = {}
    for device in {p.device for p in params}:
        chosen = [i for i, p in enumerate(params) if p.device == device]
        updated = apply_sgd(
            [params[i] for i in chosen],
            [grads[i] for i in chosen],
            [momentum_buffers[i] for i in chosen],
            scalars,
        )
        buffers.update(zip(chosen, updated, strict=False))
    return [buffers[i] for i in sorted(buffers)]


@torch.library.register_fake("twophase::sgd_")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    nu: list[int],
    is_first_step: list[int],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    if _on_several_devices([*params, *grads, *buffers]):  # as the kernels; meta tensors come here
        raise ValueError("params: expected tensors of one device")
