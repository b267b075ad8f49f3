"""Mini-batch steps and the full gradient of the last layer over given features."""

from typing import Any

import torch
from torch import Tensor

from .sgd import sgd_


@torch.no_grad()
def last_layer_step_(
    weight: Tensor,
    bias: Tensor | None,
    buffers: list[Tensor | None],
    h: Tensor,
    target: Tensor,
    *,
    loss: str,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Tensor:
    """Forward, loss, gradient and SGD update; returns the loss before the update.

    weight [m_y, m_H], bias [m_y], h [b, m_H]. loss: "cross_entropy" (target int64 [b]) or
    "squared_error" (target [b, m_y]), averaged over the b samples. buffers: [weight's, bias's].
    Raises ValueError for another loss.
    """
    value, *grads = last_layer_gradient(weight, bias, h, target, loss=loss)
    params = [weight] if bias is None else [weight, bias]
    sgd_(
        params,
        grads[: len(params)],
        buffers,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
    )
    return value


@torch.no_grad()
def last_layer_gradient(
    weight: Tensor, bias: Tensor | None, h: Tensor, target: Tensor, *, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss, its gradient by the weight, by the bias), arguments as of last_layer_step_."""
    b = len(h)
    q = h @ weight.T if bias is None else h @ weight.T + bias
    if loss == "cross_entropy":
        log_p = q - torch.logsumexp(q, 1, keepdim=True)
        value = -log_p.gather(1, target[:, None]).mean()
        one_hot = torch.nn.functional.one_hot(target, q.shape[1])
        delta = (log_p.exp() - one_hot) / b
    elif loss == "squared_error":
        value = (q - target).square().sum(1).mean()
        delta = 2 * (q - target) / b
    else:
        raise ValueError(f"loss: expected 'cross_entropy' or 'squared_error', got {loss!r}")
    return value, delta.T @ h, delta.sum(0)


def last_layer_epoch_(
    weight: Tensor,
    bias: Tensor | None,
    buffers: list[Tensor | None],
    h: Tensor,
    target: Tensor,
    batches: list[Tensor],
    *,
    lr: list[float],
    **rule: Any,
) -> Tensor:
    """last_layer_step_ on the samples of each of `batches` in turn, with its lr; the losses."""
    losses = [
        last_layer_step_(weight, bias, buffers, h[i], target[i], lr=rate, **rule)
        for i, rate in zip(batches, lr, strict=True)
    ]
    return torch.stack(losses)
