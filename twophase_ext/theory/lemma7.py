"""Lemma 7 evaluated at a network's weights, in float64."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.groups import Grouping, firsts
from ..model.losses import CROSS_ENTROPY, SQUARED_ERROR, ConvexLoss
from ..model.network import Network
from .ntk import float64_copy


def lemma7(
    network: Network, batches: Iterable[tuple[Tensor, Tensor]], loss: ConvexLoss
) -> dict[str, Any] | None:
    """Lemma 7 at the network's weights w: L(w) <= L_w(v) + ||nu * w - v|| ||grad L(w)||.

    v moves the last layer alone (nu is 1 there), so that L_w(v) is the loss of the outputs M V.
    Any v gives a valid bound. Squared error: the interpolator nearest to w. Cross-entropy: the
    interpolator of the logits s (one-hot - 1/m_y), s minimising the right side. Of equal inputs,
    both interpolate the mean target. None for another loss. batches: all (x, y) in index order.
    M = [h_X, 1], of rank N for N distinct inputs, is held in float64 in RAM, and all is
    evaluated in float64 on a copy, without bounds on its rounding. Returns loss, comparator (which
    v), comparator_loss, distance, gradient_norm and bound.
    """
    if loss not in (SQUARED_ERROR, CROSS_ENTROPY):
        return None
    batches = list(batches)
    n = sum(len(y) for _, y in batches)
    model, last = float64_copy(network)
    hidden: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden.append((args[0] if args else kwargs["input"]).detach())

    last.register_forward_pre_hook(keep, with_kwargs=True)
    values, outputs, targets = [], [], []
    with torch.enable_grad():
        for x, y in batches:
            out = model(x.double() if x.is_floating_point() else x)
            target = y.double() if y.is_floating_point() else y
            value = loss(out, target) * (len(y) / n)
            value.backward()
            values.append(float(value.detach()))
            outputs.append(out.detach())
            targets.append(target)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in gradients))
    matrix, now, y = torch.cat(hidden), torch.cat(outputs), torch.cat(targets)
    if last.bias is not None and last.bias.requires_grad:
        matrix = torch.cat([matrix, matrix.new_ones(n, 1)], 1)
    grouping = Grouping()
    for x, _ in batches:
        grouping.add(x)
    group = grouping.index()
    first, group = firsts(group).to(now.device), group.to(now.device)
    distinct = now[first]
    q, r = torch.linalg.qr(matrix[first].T)

    def nearest(change: Tensor) -> Tensor:
        """The least displacement of the last layer that changes these outputs by `change`."""
        return q @ torch.linalg.solve_triangular(r.T, change, upper=False)

    def mean(target: Tensor) -> Tensor:
        """Over each group of equal inputs, [N, m_y]."""
        return torch.zeros_like(distinct).index_add_(0, group, target) / group.bincount()[:, None]

    if loss is SQUARED_ERROR:
        name = "the nearest interpolator"
        move = nearest(mean(y) - distinct)
    else:
        classes = now.shape[1]
        wish = mean(F.one_hot(y, classes).double() - 1 / classes)
        up = nearest(wish)
        down = nearest(distinct - distinct.mean(1, keepdim=True))
        # |s up - down|^2 as a quadratic in s
        scales = torch.logspace(-2, 2, 200, dtype=torch.float64, device=now.device)
        squares = scales**2 * up.square().sum() - 2 * scales * (up * down).sum()
        squares += down.square().sum()
        losses = torch.stack([loss(s * wish[group], y) for s in scales])
        right = losses + norm * squares.clamp(0).sqrt()
        scale = scales[right.argmin()]
        name = f"the interpolator of logits {float(scale):.3g} (one-hot - 1/m_y)"
        move = scale * up - down
    reached, distance = float(loss(now + matrix @ move, y)), float(move.norm())
    return {
        "loss": math.fsum(values),
        "comparator": name,
        "comparator_loss": reached,
        "distance": distance,
        "gradient_norm": norm,
        "bound": reached + distance * norm,
    }
