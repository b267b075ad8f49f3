"""One SGD step of the last layer on one mini-batch of features, in one call."""

import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ._arguments import numbers, require_last_layer

_ops = torch.ops.twophase
_LOSSES = {"cross_entropy": 0, "squared_error": 1}  # enum Loss of csrc/math/loss.h
_DTYPES = (torch.float32, torch.float64)


def checked_loss(loss: str, like: Tensor, name: str, target: Tensor) -> int:
    """The loss as the kernels know it; ValueError for an unknown one, TypeError for the dtypes."""
    if not isinstance(loss, str) or loss not in _LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(_LOSSES)}, got {loss!r}")
    if like.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float32 or float64, got {like.dtype}")
    expected = torch.int64 if loss == "cross_entropy" else like.dtype
    if target.dtype != expected:
        raise TypeError(f"target: expected {expected}, got {target.dtype}")
    return _LOSSES[loss]


@torch.no_grad()
def last_layer_step_(
    weight: Tensor,
    bias: Tensor | None,
    weight_buffer: Tensor | None,
    bias_buffer: Tensor | None,
    h: Tensor,
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
    """Forward, loss, gradient and torch.optim.SGD's update of q = h W^T + b; returns the loss.

    weight [k, m] and bias [k] (or None) are updated in place, and where momentum is not 0 their
    momentum buffers of the same shapes; is_first_step: the buffers hold nothing yet. h: features
    [b, m], b >= 1, of any row stride. All of one dtype, float32 or float64, and one device; weight
    and buffers contiguous.

    loss: "cross_entropy" (softmax; target int64 [b], labels from 0 to k - 1; mean over the samples)
    or "squared_error" (target [b, k], h's dtype; ||q - y||^2 summed over outputs, mean over
    samples). The result is the loss of the weights before the update, 0-d, in h's dtype,
    accumulated in float64. The gradient of the weight is never held in memory. Results do not
    depend on the number of threads. A loss that is not finite is returned, and the update done, as
    torch would.

    Raises TypeError for a wrong dtype and ValueError for a wrong shape, value or label, both before
    anything has changed. On CUDA labels are copied to the host for that, which waits for the device
    (8 bytes a sample); under a CUDA graph's capture a label out of range makes the results NaN.
    """
    require_last_layer(weight, bias, weight_buffer, bias_buffer, h=h, target=target)
    code = checked_loss(loss, h, "h", target)
    updated = {
        "weight": weight,
        "bias": bias,
        "weight_buffer": weight_buffer,
        "bias_buffer": bias_buffer,
    }
    for name, tensor in updated.items():
        if tensor is not None and tensor.dtype != h.dtype:
            raise TypeError(f"{name}: expected the dtype of h, {h.dtype}, got {tensor.dtype}")
    result = _ops.last_layer_step_(
        weight,
        bias,
        weight_buffer,
        bias_buffer,
        h,
        target,
        code,
        *numbers(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay),
        nesterov,
        is_first_step,
    )
    changed = (weight, bias, weight_buffer, bias_buffer)
    torch.autograd.graph.increment_version([t for t in changed if t is not None])
    return result


@torch.library.register_fake("twophase::last_layer_step_")
def _(
    weight: Tensor,
    bias: Tensor | None,
    weight_buffer: Tensor | None,
    bias_buffer: Tensor | None,
    h: Tensor,
    target: Tensor,
    loss: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    is_first_step: bool,
) -> Tensor:
    return h.new_empty(())
