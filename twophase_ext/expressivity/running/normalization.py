"""Batch, layer, group and instance normalization."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...linalg.bounds import SLACK
from ..bounded import refuse
from .call import Call, Result
from .operand import Operand

Rule = Callable[[Call], list[Result]]


def _normalized(
    call: Call, x: Operand, rows: Tensor, by: Callable[[Tensor], Tensor], eps: float
) -> Tensor:
    """The error of c / sqrt(||c||^2 / d + eps), c = x - mean(x), over rows [r, d].

    by: the least of [r] for each index along x's samples. c -> c / s has a derivative of norm 1 / s
    at most, and s is 1 / sqrt(d)-Lipschitz: s >= s(computed) - r / sqrt(d), r the error of c. The
    computed c is off by the error of x, by the mean's rounding and its own.
    """
    d = rows.shape[1]
    centred = rows - rows.mean(1, keepdim=True)
    s = (centred.square().mean(1) + eps).sqrt()
    least = x.by_sample(by(s), "amin") if x.dim is not None else s.min().reshape(1)
    off = (x.error + call.gamma(d + 4) * x.norm * 4) * SLACK
    low = least * (1 - call.gamma(d + 16)) / SLACK - off / math.sqrt(d) * SLACK
    low = torch.maximum(low, torch.tensor(math.sqrt(eps) / SLACK, dtype=torch.float64))
    return off / low


def _gain(call: Call, weight: str, bias: str) -> tuple[float, float, float, float]:
    """(largest |weight|, its error, ||bias||, its error) of a normalization; 1 and 0 without."""
    found = [1.0, 0.0, 0.0, 0.0]
    if call[weight] is not None:
        w = call.operand(weight)
        found[0], found[1] = float(w.largest), float(w.error)
    if call[bias] is not None:
        b = call.operand(bias)
        found[2], found[3] = float(b.norm), float(b.error)
    if (call[weight] is not None and not w.constant) or (call[bias] is not None and not b.constant):
        refuse("no rule for scales that depend on the samples")
    return found[0], found[1], found[2], found[3]


def _finish(
    call: Call, x: Operand, normalized: Tensor, d: int, copies: float, gains: Sequence[float]
) -> list[Result]:
    gain, gain_error, shift, shift_error = gains
    made = call.made(x.dim, x.ids)
    count = call.out.numel() / (1 if x.constant else call.owner.samples)
    times = math.sqrt(copies)
    error = (
        (gain + gain_error) * normalized
        + gain_error * math.sqrt(count)
        + times * shift_error
        + call.gamma(d + 24) * (made.norm + 2 * times * shift)
    )
    results = [Result(call.out, x.dim, x.ids, error * SLACK, norm=made.norm)]
    for other in call.outs[1:]:  # means and scales: nobody reads them
        if other.numel():
            results.append(_unread(call, other, x))
    return results


def _unread(call: Call, other: Tensor, x: Operand) -> Result:
    size = 1 if x.constant else call.owner.samples
    ids = None if x.constant else torch.zeros(1, dtype=torch.long)
    return Result(other, None, ids, torch.full((size,), torch.inf, dtype=torch.float64))


def _layer_norm(call: Call) -> list[Result]:
    x = call.operand("input")
    shape = call["normalized_shape"]
    eps, d = float(call["eps"]), math.prod(shape)
    if not eps > 0:
        return refuse("expected eps > 0")
    if x.dim is not None and x.dim >= x.value.dim() - len(shape):
        return refuse("it adds up the samples")
    rows = x.value.reshape(-1, d).double()
    outer = x.value.shape[: x.value.dim() - len(shape)]

    def least(s: Tensor) -> Tensor:
        dim = x.dim or 0
        return s.view(outer).movedim(dim, 0).reshape(outer[dim], -1).amin(1)

    reduced = _normalized(call, x, rows, least, eps)
    copies = x.value.numel() / d / (1 if x.constant else call.owner.samples)
    return _finish(call, x, reduced, d, copies, _gain(call, "weight", "bias"))


def _group_norm(call: Call) -> list[Result]:
    x = call.operand("input")
    eps, groups = float(call["eps"]), call["group"]
    if not eps > 0 or x.dim not in (None, 0):
        return refuse("expected eps > 0 and the samples first")
    b = x.value.shape[0]
    rows = x.value.reshape(b * groups, -1).double()
    reduced = _normalized(call, x, rows, lambda s: s.view(b, groups).amin(1), eps)
    copies = x.value[0].numel() / x.value.shape[1]
    gains = _gain(call, "weight", "bias")
    return _finish(call, x, reduced, rows.shape[1], copies, gains)


def _batch_norm(call: Call) -> list[Result]:
    """With running statistics an affine map of each channel; without, of an instance's channels."""
    x = call.operand("input")
    eps = float(call["eps"])
    if not eps > 0:
        return refuse("expected eps > 0")
    if call["training"]:
        if x.dim == 0 or call["running_mean"] is not None:
            return refuse("it uses the statistics of the batch")
        rows = x.value.movedim(1, 0).reshape(x.value.shape[1], -1).double()
        if x.dim != 1 and x.ids is not None and call.owner.samples > 1:
            return refuse("it uses the statistics of the batch")
        reduced = _normalized(call, x, rows, lambda s: s, eps)
        gains = _gain(call, "weight", "bias")
        return _finish(call, x, reduced, rows.shape[1], rows.shape[1], gains)
    if x.dim == 1:
        return refuse("its channels are the samples")
    mean, variance = call.operand("running_mean"), call.operand("running_var")
    if not (mean.exact and variance.exact and mean.constant) or bool((variance.value < 0).any()):
        return refuse("no rule for statistics that are computed")
    weight = None if call["weight"] is None else call.operand("weight")
    bias = None if call["bias"] is None else call.operand("bias")
    for part in (weight, bias):
        if part is not None and not (part.constant and part.exact):
            return refuse("no rule for scales that are computed")
    scale = 1 / (variance.value.double() + eps).sqrt()
    scale = scale if weight is None else scale * weight.value.double()
    offset = torch.zeros_like(scale) if bias is None else bias.value.double()
    # as x s + (bias - mean s) or ((x - mean) s) + bias: |x s| <= |y| + |bias| + |mean s|
    spread = float(torch.linalg.vector_norm(offset.abs() + (mean.value * scale).abs())) * SLACK
    made = call.made(x.dim, x.ids)
    share = x.value.numel() / len(scale) / (1 if x.constant else call.owner.samples)
    total = made.norm + 2 * math.sqrt(share) * spread
    error = float(scale.abs().max()) * SLACK * x.error + call.gamma(16) * total
    results = [Result(call.out, x.dim, x.ids, error * SLACK, norm=made.norm)]
    return results + [_unread(call, other, x) for other in call.outs[1:] if other.numel()]


NORMALIZATION: dict[str, Rule] = {
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
}
