"""The full gradient of the last layer over cached features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ._arguments import require_last_layer
from .last_layer_step import checked_loss

_ops = torch.ops.twophase
_MANY_OUTPUTS = 32  # kManyOutputs of csrc/cpu/kernels/last_layer_panels.h
_ROWS = 4096  # of h at once on a GPU: its logits and their derivatives are small


@torch.no_grad()
def last_layer_gradient(
    weight: Tensor, bias: Tensor | None, h: Tensor, target: Tensor, *, loss: str = "cross_entropy"
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss, its gradient by weight [k, m], by bias [k]) of q = h W^T + b over all rows.

    weight [k, m] and bias [k] (or None), float32 or float64; h [n, m], n >= 1, of that dtype or
    bfloat16 beside float32, of any row stride; loss and target as of `last_layer_step_`. The loss
    is float64, 0-d, and added up in float64. Both passes over h take 64 rows at a time, so that the
    second finds them in the cache. On the CPU the bits do not depend on the number of threads. The
    gradient by the bias is given without a bias too.

    Raises TypeError for a wrong dtype and ValueError for a wrong shape, value or label.
    """
    require_last_layer(weight, bias, None, None, h=h, target=target)
    code = checked_loss(loss, weight, "weight", target)
    if h.dtype != weight.dtype and (h.dtype, weight.dtype) != (torch.bfloat16, torch.float32):
        raise TypeError(f"h: expected {weight.dtype} or bfloat16 beside float32, got {h.dtype}")
    if not h.is_cuda:
        return _ops.last_layer_gradient(weight, bias, h, target, code)
    by_weight, by_bias = torch.zeros_like(weight), weight.new_zeros(len(weight))
    total = weight.new_zeros((), dtype=torch.float64)
    for rows, part in zip(h.split(_ROWS), target.split(_ROWS), strict=True):
        rows = rows.to(weight.dtype)
        outputs = F.linear(rows, weight, bias).double()
        if loss == "cross_entropy":
            total += F.cross_entropy(outputs, part, reduction="sum")
            delta = outputs.softmax(1) - F.one_hot(part, len(weight))
        else:
            delta = 2 * (outputs - part)
            total += (outputs - part).square().sum()
        delta = (delta / len(h)).to(weight.dtype)
        by_weight.addmm_(delta.T, rows)
        by_bias += delta.sum(0)
    return total / len(h), by_weight, by_bias


def logit_error_constant(m: int, dtype: torch.dtype, device: str = "cpu", k: int = 1) -> int:
    """c: a computed logit errs by at most c u (sum_i |h_i||w_i| + |b|), u the dtype's roundoff.

    On the CPU m features are cut into at most 32 slices (last_layer_passes.h); a slice is added up
    in at least 4 (float32) or 2 (float64) chains, which are then added in at most 4 rounds, or, for
    32 outputs k and more (last_layer_panels.h), in chains of 256 which are added in their order;
    slices and bias are added in float64. On a GPU the order of the m additions is the library's.
    """
    if device != "cpu":
        return m + 2
    chains = 4 if dtype == torch.float32 else 2
    slice_ = min(max(m, 1), max(256, 16 * math.ceil(math.ceil(m / 32) / 16)))
    if k < _MANY_OUTPUTS:
        roundings = math.ceil(slice_ / chains) + 1 + 4
    else:
        roundings = min(slice_, 256) + 1 + math.ceil(slice_ / 256)
    return roundings + (2 if dtype == torch.float32 else 36)


@torch.library.register_fake("twophase::last_layer_gradient")
def _(
    weight: Tensor, bias: Tensor | None, h: Tensor, target: Tensor, loss: int
) -> tuple[Tensor, Tensor, Tensor]:
    scalar = weight.new_empty((), dtype=torch.float64)
    return scalar, torch.empty_like(weight), weight.new_empty(len(weight))
