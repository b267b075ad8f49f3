"""Losses that satisfy Assumption 2: differentiable and convex in the output, Lipschitz gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ConvexLoss:
    """A loss averaged over samples, declared convex in the output by whoever builds it.

    function: (outputs [b, m_y], targets [b, ...]) -> 0-d tensor, the mean over the b samples.
    smoothness: L_ell, the Lipschitz constant of the gradient of one sample's loss in the 2-norm
    (Assumption 2), > 0. name appears in logs.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    smoothness: float
    name: str = "custom"

    def __post_init__(self) -> None:
        """Check the declaration."""
        if not callable(self.function):
            raise TypeError(f"function: expected a callable, got {type(self.function).__name__}")
        if not (isinstance(self.smoothness, int | float) and 0 < self.smoothness < float("inf")):
            raise ValueError(f"smoothness: expected a number L_ell > 0, got {self.smoothness!r}")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch."""
        return self.function(outputs, targets)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The paper's ||q - y||^2: summed over outputs, averaged over samples (L_ell = 2)."""
    return (outputs - targets).square().flatten(1).sum(1).mean()


CROSS_ENTROPY = ConvexLoss(F.cross_entropy, 0.5, "cross_entropy")
SQUARED_ERROR = ConvexLoss(squared_error, 2.0, "squared_error")
_NAMED = {loss.name: loss for loss in (CROSS_ENTROPY, SQUARED_ERROR)}


def resolve_loss(loss: Any) -> ConvexLoss:
    """The loss named or declared by the argument `loss` of the Trainer.

    Raises ValueError for an unknown name or a callable that was not declared convex.
    """
    if isinstance(loss, ConvexLoss):
        return loss
    if isinstance(loss, str):
        if loss in _NAMED:
            return _NAMED[loss]
        raise ValueError(f"loss: expected one of {sorted(_NAMED)} or a ConvexLoss, got {loss!r}")
    raise ValueError(
        f"loss: {getattr(loss, '__name__', type(loss).__name__)} is not declared convex in the "
        "output, which the guarantee needs (Assumption 2). If it is, wrap it: "
        "tp.ConvexLoss(function, smoothness=L_ell)"
    )


def prepare_targets(
    loss: ConvexLoss, y: Tensor, outputs: int, name: str, indices: list[int] | None = None
) -> Tensor:
    """Targets in the form that the loss takes: int64 labels, or float [n, m_y].

    Raises TypeError for labels that are not integers, ValueError for labels outside
    [0, outputs) (the first such sample is named) or a target of another shape. indices: the
    samples' numbers where y holds only some of them.
    """
    if loss is CROSS_ENTROPY:
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"{name}: expected integer class labels, got {y.dtype}")
        if y.dim() == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.dim() != 1:
            raise ValueError(f"{name}: expected labels of shape [n], got {list(y.shape)}")
        y = y.long()  # before the comparison: `outputs` need not fit into uint8
        wrong = ((y < 0) | (y >= outputs)).nonzero()
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(
                f"{name}: expected labels in 0..{outputs - 1} (the last layer has {outputs} "
                f"outputs), got {int(y[i])} at sample "
                f"{indices[i] if indices else i} ({len(wrong)} such samples)"
            )
        return y
    if y.dim() == 1 and outputs == 1:
        y = y[:, None]
    if loss is SQUARED_ERROR:
        if y.dim() != 2 or y.shape[1] != outputs:
            raise ValueError(
                f"{name}: expected targets of shape [n, {outputs}] for squared_error, got "
                f"{list(y.shape)}"
            )
        if not y.is_floating_point():
            y = y.to(torch.get_default_dtype())
    return y
