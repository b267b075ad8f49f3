"""The first half of a step of the last layer: the logits that some columns of h give."""

import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ._arguments import require_last_layer

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
    require_rows(weight, h, index)
    return _ops.last_layer_logits(weight, h, index)


def require_rows(weight: Tensor, h: Tensor, index: Tensor) -> None:
    """Raise TypeError unless the dtypes are those of a step over h[index]."""
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight: expected float32 or float64, got {weight.dtype}")
    if h.dtype != weight.dtype and (h.dtype, weight.dtype) != (torch.bfloat16, torch.float32):
        raise TypeError(f"h: expected {weight.dtype} or bfloat16 beside float32, got {h.dtype}")
    if index.dtype != torch.int64:
        raise TypeError(f"index: expected int64, got {index.dtype}")


@torch.library.register_fake("twophase::last_layer_logits")
def _(weight: Tensor, h: Tensor, index: Tensor) -> Tensor:
    return weight.new_empty((index.shape[0], weight.shape[0]), dtype=torch.float64)
