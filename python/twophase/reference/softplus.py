"""sigma(x) = ln(1 + exp(beta x)) / beta (section 5.2), without overflow and without a threshold."""

import torch
from torch import Tensor


def softplus(x: Tensor, beta: float = 100.0) -> Tensor:
    """max(x, 0) + log1p(exp(-beta |x|)) / beta."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-beta * x.abs())) / beta


def softplus_backward(grad: Tensor, y: Tensor, beta: float = 100.0) -> Tensor:
    """grad * s, s = sigmoid(beta x) = 1 - exp(-beta y) from the output y."""
    return grad * -torch.expm1(-beta * y)


def softplus_double_backward(
    grad_grad: Tensor, grad: Tensor, y: Tensor, beta: float = 100.0
) -> tuple[Tensor, Tensor]:
    """The derivatives of `softplus_backward` by grad and by y, times grad_grad."""
    s = -torch.expm1(-beta * y)
    return grad_grad * s, grad_grad * grad * beta * torch.exp(-beta * y)
