"""The rounding of a user's own loss function, to first order.

An operation's result v, off by a few u |v|, changes the loss by |dL/dv| times that; a sum of N
terms t is off by N u sum |t|, which the terms' own |t dL/dt| measure. So the error of the computed
loss is at most (N + ULPS) u sum |v dL/dv| over outputs, targets and everything that torch calls
made on the way, N the largest tensor's size. Assumed: that each torch call errs by a few units of
its result or, as logistic losses do, by a few u of L_ell (1 + ||q||)^2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..model.losses import ConvexLoss

ULPS = 16
ASSUMED = "each of its torch calls errs by a few units of its result, to first order"


class _Kept(TorchFunctionMode):
    """Keeps the gradients of what torch calls return."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        keywords: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, Tensor) and result.requires_grad and not result.is_leaf:
            result.retain_grad()
            self.results.append(result)
        return result


def rounding_of(loss: ConvexLoss, outputs: Tensor, targets: Tensor) -> tuple[float, Tensor, float]:
    """(value, its gradient by the outputs, bound of the value's own error to first order).

    outputs float64 [b, k] without a graph; targets: as the loss takes them.
    """
    floating = targets.is_floating_point()
    for with_targets in (True, False) if floating else (False,):
        q = outputs.detach().clone().requires_grad_()
        y = targets.detach().clone().requires_grad_(with_targets)
        kept = _Kept()
        try:
            with torch.enable_grad():
                with kept:
                    value = loss(q, y)
                value.backward()
        except RuntimeError:
            if not with_targets:
                raise
            continue  # a loss that has no derivative by its targets
        break
    tensors = [q, *([y] if with_targets else []), *kept.results]
    largest = max(part.numel() for part in tensors)
    total = 0.0
    for part in tensors:
        if part.grad is not None:
            unit = torch.finfo(part.dtype).eps / 2
            sizes = (part.detach().double() * part.grad.double()).abs()
            total += unit * float(sizes.sum())
    logistic = 8 * 2.0**-53 * loss.smoothness * float((1 + q.detach().norm(dim=1)).square().mean())
    slope = torch.zeros_like(q) if q.grad is None else q.grad
    return float(value.detach()), slope, (largest + ULPS) * total + logistic
