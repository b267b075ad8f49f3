"""A step of the last layer in two calls, for the holder of some columns of features and weight."""

import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ._arguments import number, require_last_layer
from .last_layer_step import checked_loss

_ops = torch.ops.twophase


@torch.no_grad()
def last_layer_logits(weight: Tensor, h: Tensor, index: Tensor) -> Tensor:
    """h[index] @ weight^T, float64 [b, k]: what these columns add to the logits.

    weight: [k, m], float32 or float64. h: [n, m] on the CPU, of weight's dtype, of any row stride,
    or bfloat16 beside a float32 weight. index: int64 [b] on the CPU, b >= 1. The columns are summed
    in slices, which are added up in float64: the same bits for any number of threads. Raises
    TypeError for a wrong dtype, ValueError for a wrong shape or index.
    """
    require_last_layer(weight, None, None, None, h=h, index=index)
    _check(weight, h, index)
    return _ops.last_layer_logits(weight, h, index)


@torch.no_grad()
def last_layer_update_(
    weight: Tensor,
    bias: Tensor | None,
    weight_buffer: Tensor | None,
    bias_buffer: Tensor | None,
    h: Tensor,
    index: Tensor,
    logits: Tensor,
    target: Tensor,
    *,
    loss: str = "cross_entropy",
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    fresh: bool = False,
) -> Tensor:
    """`last_layer_step_` on the rows h[index], from logits that are known; returns the mean loss.

    logits: float64 [b, k], of all columns together and without the bias, which is added here; with
    `last_layer_logits` of one holder of all columns the two calls are one step. target: of the b
    rows. The columns of weight [k, m] and of its momentum buffer are updated in place, the bias and
    its buffer too, as every holder does. On the CPU; the other arguments are those of
    last_layer_step_. The loss is that before the update, float64, 0-d.

    Raises TypeError for a wrong dtype and ValueError for a wrong shape, value, index or label,
    before anything has changed.
    """
    require_last_layer(
        *(weight, bias, weight_buffer, bias_buffer), h=h, index=index, logits=logits, target=target
    )
    _check(weight, h, index)
    code = checked_loss(loss, weight, "weight", target)
    if logits.dtype != torch.float64:
        raise TypeError(f"logits: expected float64, got {logits.dtype}")
    result = _ops.last_layer_update_(
        weight,
        bias,
        weight_buffer,
        bias_buffer,
        h,
        index,
        logits,
        target,
        code,
        number(lr, "lr"),
        number(momentum, "momentum"),
        number(dampening, "dampening"),
        number(weight_decay, "weight_decay"),
        nesterov,
        fresh,
    )
    changed = (weight, bias, weight_buffer, bias_buffer)
    torch.autograd.graph.increment_version([t for t in changed if t is not None])
    return result


def _check(weight: Tensor, h: Tensor, index: Tensor) -> None:
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight: expected float32 or float64, got {weight.dtype}")
    if h.dtype != weight.dtype and (h.dtype, weight.dtype) != (torch.bfloat16, torch.float32):
        raise TypeError(f"h: expected {weight.dtype} or bfloat16 beside float32, got {h.dtype}")
    if index.dtype != torch.int64:
        raise TypeError(f"index: expected int64, got {index.dtype}")


@torch.library.register_fake("twophase::last_layer_logits")
def _(weight: Tensor, h: Tensor, index: Tensor) -> Tensor:
    return weight.new_empty((index.shape[0], weight.shape[0]), dtype=torch.float64)


@torch.library.register_fake("twophase::last_layer_update_")
def _(
    weight: Tensor,
    bias: Tensor | None,
    weight_buffer: Tensor | None,
    bias_buffer: Tensor | None,
    h: Tensor,
    index: Tensor,
    logits: Tensor,
    target: Tensor,
    loss: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    fresh: bool,
) -> Tensor:
    return logits.new_empty(())
