"""SGD as torch.optim.SGD defines it, with the paper's mask nu."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: list[Tensor | None],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    nu: Sequence[int] | None = None,
) -> None:
    """w <- w - (eta * nu) * g, g the momentum rule; where nu is 0 nothing changes.

    buffers: momentum buffers, None before the first step; replaced in the list.
    """
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if nu is not None and nu[i] == 0:
            continue
        g = -grad if maximize else grad
        if weight_decay != 0:
            g = g.add(param, alpha=weight_decay)
        if momentum != 0:
            buffer = buffers[i]
            buffer = (
                g.clone() if buffer is None else buffer.mul_(momentum).add_(g, alpha=1 - dampening)
            )
            buffers[i] = buffer
            g = g.add(buffer, alpha=momentum) if nesterov else buffer
        param.add_(g, alpha=-lr)
