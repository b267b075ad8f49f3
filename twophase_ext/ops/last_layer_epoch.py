"""Many SGD steps of the last layer over cached features, in one call."""

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from operator import index
from typing import Any

import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ._arguments import number, numbers, require_last_layer
from .last_layer_step import checked_loss

_ops = torch.ops.twophase


@torch.no_grad()
def last_layer_epoch_(
    weight: Tensor,
    bias: Tensor | None,
    weight_buffer: Tensor | None,
    bias_buffer: Tensor | None,
    h: Tensor,
    target: Tensor,
    order: Tensor,
    *,
    batch_size: int | None = None,
    bounds: Sequence[int] | None = None,
    loss: str = "cross_entropy",
    lr: float | Sequence[float],
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    is_first_step: bool = False,
    mapped: bool = False,
) -> Tensor:
    """Step s is `last_layer_step_` on the rows order[bounds[s] : bounds[s + 1]] of h and target.

    Mini-batch SGD itself: an epoch by its permutation, several epochs, or draws with replacement.
    order: int64 indices on the CPU. bounds: ascending from 0 to len(order); or batch_size: batches
    of so many, the last one of what is left. lr: one for all steps or one a step.

    weight [k, m], bias [k] or None and, where momentum is not 0, their momentum buffers are updated
    in place: float32 or float64, contiguous. h: [n, m] of weight's dtype, of any row stride, or
    bfloat16 beside a float32 weight, widened as it is read. target: int64 [n] or weight's dtype
    [n, k]. The other arguments are those of last_layer_step_; is_first_step: the buffers hold
    nothing before the first of these. mapped: h lies in a file; the rows of the next step are asked
    for ahead.

    Returns the loss of each step before its update, float64 [steps]. No Python and no allocation
    per step. On the CPU the same bits for any number of threads, and where a call is split in two;
    on a GPU the order of additions depends on shapes and device alone.

    Raises TypeError for a wrong dtype and ValueError for a wrong shape, value, index or label,
    before anything has changed.
    """
    if (batch_size is None) == (bounds is None):
        raise ValueError("batch_size: expected either batch_size or bounds")
    require_last_layer(weight, bias, weight_buffer, bias_buffer, h=h, target=target, order=order)
    if order.dim() != 1 or order.device.type != "cpu":
        raise ValueError(
            f"order: expected indices [total] on the CPU, got {list(order.shape)} on {order.device}"
        )
    if bounds is None:
        if not isinstance(batch_size, Integral) or isinstance(batch_size, bool):
            raise TypeError(f"batch_size: expected an int, got {type(batch_size).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        bounds = [*range(0, len(order), batch_size), len(order)] if len(order) else [0]
    code = checked_loss(loss, weight, "weight", target)
    if order.dtype != torch.int64:
        raise TypeError(f"order: expected int64, got {order.dtype}")
    if h.dtype != weight.dtype and (h.dtype, weight.dtype) != (torch.bfloat16, torch.float32):
        raise TypeError(f"h: expected {weight.dtype} or bfloat16 beside float32, got {h.dtype}")
    result = _ops.last_layer_epoch_(
        weight,
        bias,
        weight_buffer,
        bias_buffer,
        h,
        target,
        order,
        _integers(bounds),
        code,
        _rates(lr),
        *numbers(momentum=momentum, dampening=dampening, weight_decay=weight_decay),
        nesterov,
        is_first_step,
        mapped,
    )
    changed = (weight, bias, weight_buffer, bias_buffer)
    torch.autograd.graph.increment_version([t for t in changed if t is not None])
    return result


def _integers(bounds: Any) -> list[int]:
    try:
        found = [index(bound) for bound in bounds]
    except TypeError as error:
        raise TypeError(f"bounds: expected integers: {error}") from error
    if any(not 0 <= bound < 2**63 for bound in found):
        raise ValueError(f"bounds: expected integers >= 0 of 64 bits, got {found}")
    return found


def _rates(lr: Any) -> list[float]:
    if isinstance(lr, Real) or (isinstance(lr, Tensor) and lr.dim() == 0):
        return [number(lr, "lr")]
    if not isinstance(lr, Iterable):
        raise TypeError(f"lr: expected a number or one for each step, got {type(lr).__name__}")
    return [number(rate, "lr") for rate in lr]


@torch.library.register_fake("twophase::last_layer_epoch_")
def _(
    weight: Tensor,
    bias: Tensor | None,
    weight_buffer: Tensor | None,
    bias_buffer: Tensor | None,
    h: Tensor,
    target: Tensor,
    order: Tensor,
    bounds: list[int],
    loss: int,
    lr: list[float],
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    is_first_step: bool,
    mapped: bool,
) -> Tensor:
    return h.new_empty(len(bounds) - 1, dtype=torch.float64)
