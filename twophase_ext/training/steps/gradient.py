"""The full gradient of the last layer over fixed features, and what rounding can do to a step."""

import math

import torch
from torch import Tensor, nn

from ... import ops
from ...model.losses import CROSS_ENTROPY, SQUARED_ERROR, ConvexLoss
from ..data.samples import BATCH
from ..features.cache import Features
from .sharded import ShardedFeatures


@torch.no_grad()
def full_gradient(
    features: Features, layer: nn.Linear, loss: ConvexLoss
) -> tuple[float, Tensor, Tensor]:
    """(mean loss, its gradient by the weight [k, m], by the bias [k]) over all rows.

    The loss is added up in float64; gradients are in the weight's dtype. h itself in memory is read
    by one call, anything else block by block.
    """
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if isinstance(features, ShardedFeatures):
        return features.gradient(layer, loss)
    if features.hidden is not None and loss in (CROSS_ENTROPY, SQUARED_ERROR):
        value, by_weight, by_bias = ops.last_layer_gradient(
            weight, bias, *features.hidden, loss=loss.name
        )
        return float(value), by_weight, by_bias
    values = []
    sums = [weight.new_zeros(shape, dtype=torch.float64) for shape in (weight.shape, len(weight))]
    for h, y in features.in_order(BATCH):
        share = len(y) / features.n
        if loss in (CROSS_ENTROPY, SQUARED_ERROR):
            value, *parts = ops.last_layer_gradient(weight, bias, h, y, loss=loss.name)
        else:
            value, *parts = _by_autograd(weight, bias, h, y, loss)
        values.append(float(value) * share)
        for total, part in zip(sums, parts, strict=True):
            total.add_(part, alpha=share)
    by_weight, by_bias = (total.to(weight.dtype) for total in sums)
    return math.fsum(values), by_weight, by_bias


def _by_autograd(
    weight: Tensor, bias: Tensor | None, h: Tensor, y: Tensor, loss: ConvexLoss
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        outputs = nn.functional.linear(h, weight, bias).requires_grad_()
        value = loss(outputs, y)
        (delta,) = torch.autograd.grad(value, outputs)
    return value.detach(), delta.T @ h, delta.sum(0)


@torch.no_grad()
def row_norms(features: Features) -> Tensor:
    """||[h_i, 1]||_2, float64 [n], within (m + 4) 2^-53 of exact; a fixed bias counts too."""
    squares = [h.double().square().sum(1) for h, _ in features.in_order(BATCH)]
    return (torch.cat(squares) + 1).sqrt()


class Rounding:
    """By how much rounding alone can raise the loss in a step of gradient descent.

    The theorem's step never raises it. Here a logit of sample i errs by at most
    e_i = c u ||[h_i, 1]|| size, c of `ops.logit_error_constant` and size the longest row
    [w_j, b_j], which bounds the errors of loss and gradient.
    """

    def __init__(self, norms: Tensor, layer: nn.Linear, loss: ConvexLoss) -> None:
        """norms: `row_norms`; loss: cross-entropy or squared error."""
        dtype = layer.weight.dtype
        self.u = torch.finfo(dtype).eps / 2
        constant = ops.logit_error_constant(layer.in_features, dtype, k=layer.out_features)
        self.logit = constant * self.u
        self.mean, self.square = float(norms.mean()), float(norms.square().mean())
        self.n, self.outputs, self.loss = len(norms), layer.out_features, loss

    def of_loss(self, value: float, size: float) -> float:
        """Error of the computed loss `value`."""
        error = self.logit * size
        if self.loss is CROSS_ENTROPY:  # 1-Lipschitz in the largest logit and in the label's
            return 2 * error * self.mean + (1e-14 + self.outputs * 2.0**-53) * (value + 1)
        square = self.outputs * self.square * error * error
        return 2 * math.sqrt(value * square) + square + 1e-14 * value

    def of_gradient(self, value: float, size: float) -> float:
        """Error of the computed gradient in the Frobenius norm: logits, delta, the sum over n."""
        of_delta = self.loss.smoothness * math.sqrt(self.outputs) * self.logit * size * self.square
        deltas = 2.0 if self.loss is CROSS_ENTROPY else 4 * value  # bounds mean ||delta_i||^2
        return of_delta + (self.n + 2) * self.u * math.sqrt(deltas * self.square)

    def of_step(
        self, value: float, size: float, norm: float, step: float, weight: float, smoothness: float
    ) -> float:
        """Rise of the loss by the rounding of w - step g; norm = ||g||_F, weight = ||w||_F.

        The exact step ends where the gradient is no longer than at its start; being off by e from
        there raises the loss by at most ||g|| ||e|| + L_H ||e||^2 / 2.
        """
        of_gradient = self.of_gradient(value, size)
        e = step * of_gradient + 2 * self.u * (weight + step * norm)
        return (norm + of_gradient) * e + smoothness * e**2 / 2
