"""One step of SGD on many tensors in one pass over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase

_ops = torch.ops.twophase


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

    The result has the bits of torch.optim.SGD where torch's own kernels use fused multiply-add.
    Raises TypeError for float16 and bfloat16 parameters, other dtypes and sparse gradients;
    ValueError for lists, shapes, dtypes or devices that do not match. Everything is checked before
    any tensor is changed.
    """
    nu = [1] * len(params) if nu is None else nu
    check_sgd(params, grads, momentum_buffers if momentum else [None] * len(params), nu)
    with torch.no_grad():
        update_checked(
            [i for i, mask in enumerate(nu) if mask],
            params,
            grads,
            momentum_buffers,
            (lr, momentum, dampening, weight_decay, nesterov, maximize),
        )


def check_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    nu: Sequence[int],
) -> None:
    """Raise what `sgd_` raises for lists that it cannot take."""
    for name, items in (("grads", grads), ("momentum_buffers", momentum_buffers), ("nu", nu)):
        if len(items) != len(params):
            raise ValueError(f"{name}: expected {len(params)} entries, got {len(items)}")
    for i, (p, g, b) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"params[{i}]: expected float32 or float64, got {p.dtype}: a small step on a "
                "16-bit weight rounds away; keep master weights in float32 and step those"
            )
        _check_like(p, f"params[{i}]", g, f"grads[{i}]")
        if b is not None:
            _check_like(p, f"params[{i}]", b, f"momentum_buffers[{i}]")
        if nu[i] not in (0, 1):
            raise ValueError(f"nu[{i}]: expected 0 or 1, got {nu[i]}")


def _check_like(p: Tensor, p_name: str, t: Tensor, t_name: str) -> None:
    if t.layout != torch.strided:
        raise TypeError(f"{t_name}: expected a dense tensor, got layout {t.layout}")
    for what, wanted, got in (
        ("shape", p.shape, t.shape),
        ("dtype", p.dtype, t.dtype),
        ("device", p.device, t.device),
    ):
        if wanted != got:
            raise ValueError(f"{t_name}: expected {what} {wanted} of {p_name}, got {got}")


@torch.library.register_fake("twophase::sgd_")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    nu: list[int],
    fresh: list[int],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    return None
