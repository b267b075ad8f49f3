"""The second half of a step of the last layer: the update of some columns, from all logits."""

import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ._arguments import numbers, require_last_layer
from .last_layer_logits import require_rows
from .last_layer_step import checked_loss

_ops = torch.ops.twophase


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
    is_first_step: bool = False,
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
    require_rows(weight, h, index)
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
        *numbers(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay),
        nesterov,
        is_first_step,
    )
    changed = (weight, bias, weight_buffer, bias_buffer)
    torch.autograd.graph.increment_version([t for t in changed if t is not None])
    return result


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
    is_first_step: bool,
) -> Tensor:
    return logits.new_empty(())
