"""torch's losses with a weight for each sample: the mean sum_i c_i g_i(q_i) / sum_i c_i d_i.

It is the mean, not the sum over n: a factor of all c_i changes neither the loss nor a step size,
whole numbers c_i are samples that stand c_i times, and with class weights it is torch's mean of the
repeated samples (`torch_losses`: g_i, d_i). Targets carry the weights, as their last column.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .convex import ConvexLoss
from .torch_losses import IGNORED, SoftmaxLoss, TorchLoss


@dataclass(frozen=True, eq=False)
class WeightedLoss(TorchLoss):
    """c_i g_i in the place of g_i, c_i d_i in that of d_i; targets [n, ... + 1], see `packed`."""

    base: TorchLoss | None = None

    @property
    def unweighted(self) -> TorchLoss:
        """The loss of g_i."""
        if self.base is None:
            raise RuntimeError("a weighted loss without the loss that it weights")
        return self.base

    def checked(self, y: Tensor, outputs: int, name: str, indices: Any) -> Tensor:
        """Targets with their weights, those of the loss itself checked."""
        t, c = split(self, y)
        return packed(self.unweighted.checked(t, outputs, name, indices), c)

    def divisor(self, y: Tensor) -> Tensor:
        """c_i d_i."""
        t, c = split(self, y)
        return c.double() * self.unweighted.divisor(t)

    def curvature(self, y: Tensor, outputs: int) -> Tensor:
        """c_i times that of g_i."""
        t, c = split(self, y)
        return c.double() * self.unweighted.curvature(t, outputs)

    def total(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The sum of c_i g_i."""
        return _total(self.unweighted, outputs, y)


def _total(base: TorchLoss, outputs: Tensor, y: Tensor) -> Tensor:
    t, c = _split(base, y)
    return (c * base.each(outputs, t)).sum()


def _mean(base: TorchLoss, outputs: Tensor, y: Tensor) -> Tensor:
    """Of a batch alone, torch's semantics: divided by its own sum of c_i d_i."""
    t, c = _split(base, y)
    return _total(base, outputs, y) / (c.double() * base.divisor(t)).sum()


def weighted(loss: ConvexLoss) -> WeightedLoss:
    """`loss` with a weight for each sample; ValueError for a loss that is declared."""
    if not isinstance(loss, TorchLoss):
        raise ValueError(
            f"loss: {loss.name} is known as a mean over samples alone: sample weights need one of "
            "torch's losses, or let its own targets hold them"
        )
    name = f"weighted {loss.name}"
    return WeightedLoss(partial(_mean, loss), loss.smoothness, name, base=loss)


def packed(y: Tensor, c: Tensor) -> Tensor:
    """Prepared targets y and weights c [n] in one floating tensor [n, ... + 1].

    Labels that the loss ignores get the weight 0: then the weight alone tells which samples count.
    """
    if not y.is_floating_point():
        c = torch.where(y == IGNORED, 0.0, c)
    dtype = y.dtype if y.is_floating_point() else c.dtype
    columns = y[:, None] if y.dim() == 1 else y
    return torch.cat([columns.to(dtype), c[:, None].to(dtype)], 1)


def split(loss: ConvexLoss, y: Tensor) -> tuple[Tensor, Tensor]:
    """(targets of the loss itself, weights [n]) of what `packed` made."""
    if not isinstance(loss, WeightedLoss):
        return y, y.new_ones(len(y), dtype=torch.float64)
    return _split(loss.unweighted, y)


def _split(base: TorchLoss, y: Tensor) -> tuple[Tensor, Tensor]:
    t, c = y[:, :-1], y[:, -1]
    # one column of probabilities is no target of cross-entropy: these are labels
    return (t[:, 0].long() if isinstance(base, SoftmaxLoss) and t.shape[1] == 1 else t), c


def unweighted(loss: ConvexLoss) -> ConvexLoss:
    """The loss without the weights of samples."""
    return loss.unweighted if isinstance(loss, WeightedLoss) else loss
