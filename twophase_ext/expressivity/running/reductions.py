"""Sums over dimensions, windows, softmax, and normalization."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...linalg.bounds import SLACK
from ..bounded import LIBM, ULPS, refuse
from ..operator_norms import pool_norm
from .call import Call, Result
from .operand import HUGE, Operand

Rule = Callable[[Call], list[Result]]


def _reduced(call: Call, x: Operand) -> tuple[list[int], int | None]:
    """(dimensions that are added up, where the samples are afterwards)."""
    rank = x.value.dim()
    given = call["dim"] if "dim" in call.given else None
    if given is None or given == []:
        given = range(rank)
    dims = sorted({d % rank for d in ([given] if isinstance(given, int) else given)})
    if x.dim in dims:
        refuse("it adds up the samples")
    if x.dim is None:
        return dims, None
    return dims, x.dim if call["keepdim"] else x.dim - sum(d < x.dim for d in dims)


def _added(mean: bool) -> Rule:
    """The sum of c numbers, an operator of norm sqrt(c), or their mean, of norm 1 / sqrt(c)."""

    def rule(call: Call) -> list[Result]:
        x = call.operand("self")
        if call["dtype"] not in (None, x.value.dtype):
            return refuse("no rule for a sum in another type")
        dims, dim = _reduced(call, x)
        count = math.prod(x.value.shape[d] for d in dims)
        norm = 1 / math.sqrt(max(count, 1)) if mean else math.sqrt(count)
        error = norm * (x.error + call.gamma(count + 4) * x.norm)
        return [Result(call.out, dim, x.ids, error * SLACK)]

    return rule


def _extreme(call: Call) -> list[Result]:
    """Largest or least numbers along dimensions: 1-Lipschitz, and exact; indices are not."""
    x = call.operand("self")
    _, dim = _reduced(call, x)
    found = [Result(call.outs[0], dim, x.ids, x.error)]
    for other in call.outs[1:]:
        found.append(Result(other, dim, x.ids, x.error))
    return found


def _vector_norm(call: Call) -> list[Result]:
    if float(call["ord"]) != 2:
        return refuse("no rule for this norm; 2 has one")
    x = call.operand("self")
    dims, dim = _reduced(call, x)
    count = math.prod(x.value.shape[d] for d in dims)
    return [Result(call.out, dim, x.ids, x.error + call.gamma(count + 6) * x.norm)]


def _softmax(call: Call) -> list[Result]:
    """p = softmax(x): its derivative diag(p) - p p^T has norm 1/2 at most.

    With z = max - x >= 0, exp(-z) errs by (u z + 8u) of itself, and p z <= 1 / e; the sum by
    gamma_n and by the mean of u z under p, which is log n at most.
    """
    x = call.operand("self", masks=True)
    axis = call["dim"] % x.value.dim()
    if axis == x.dim:
        return refuse("it adds up the samples")
    if x.huge:
        top = x.value.amax(axis)
        hidden = (x.value == -math.inf).all(axis) & (call.name == "aten::_safe_softmax")
        if bool(((top.abs() >= HUGE / 4) & ~hidden).any()):
            return refuse("no rule for a row that is masked throughout")
    call.owner.assumed.add(LIBM)
    count = x.value.shape[axis]
    made = call.made(x.dim, x.ids)
    entries = call.out.numel() / (1 if x.constant else call.owner.samples)
    each = 2 * call.u / math.e * math.sqrt(entries)
    relative = call.gamma(count + 4 * ULPS + 8) + 4 * call.u * math.log(count + 1)
    return [Result(call.out, x.dim, x.ids, 0.5 * x.error * SLACK + each + relative * made.norm)]


def _log_softmax(call: Call) -> list[Result]:
    """x - max - log sum exp(x - max): its derivative I - 1 p^T has norm 1 + sqrt(n) at most."""
    x = call.operand("self")
    axis = call["dim"] % x.value.dim()
    if axis == x.dim:
        return refuse("it adds up the samples")
    call.owner.assumed.add(LIBM)
    count = x.value.shape[axis]
    made = call.made(x.dim, x.ids)
    places = math.sqrt(call.out.numel())
    rounding = 8 * call.u * (made.norm + x.norm) + places * (
        call.gamma(count + 4 * ULPS + 8) + 4 * call.u * math.log(count + 1)
    )
    return [Result(call.out, x.dim, x.ids, (1 + math.sqrt(count)) * x.error * SLACK + rounding)]


def _log_sum_exp(call: Call) -> list[Result]:
    """max + log sum exp(x - max): its derivative softmax(x) has norm 1 at most."""
    x = call.operand("self")
    dims, dim = _reduced(call, x)
    call.owner.assumed.add(LIBM)
    count = math.prod(x.value.shape[d] for d in dims)
    made = call.made(dim, x.ids)
    each = call.gamma(count + 4 * ULPS + 8) + 4 * call.u * math.log(count + 1)
    rounding = 4 * call.u * (made.norm + x.norm) + math.sqrt(call.out.numel()) * each
    return [Result(call.out, dim, x.ids, x.error * SLACK + rounding)]


def _variance(call: Call) -> list[Result]:
    """||c||^2 / (d - correction), c = x - mean: |a^2 - b^2| <= (2 |a| + |a - b|) |a - b|."""
    x = call.operand("self")
    dims, dim = _reduced(call, x)
    count = math.prod(x.value.shape[d] for d in dims)
    correction = 1 if call["correction"] is None else float(call["correction"])
    if count - correction <= 0:
        return refuse("no rule for a variance of too few numbers")
    off = x.error + 4 * call.gamma(count + 4) * x.norm
    slope = (2 * x.norm + off) / (count - correction)
    made = call.made(dim, x.ids)
    return [Result(call.out, dim, x.ids, (slope * off + call.gamma(count + 8) * made.norm) * SLACK)]


def _decided(call: Call) -> list[Result]:
    """any, all, argmax, argmin along dimensions: exact of exact numbers, else by rounding."""
    x = call.operand("self", masks=True)
    _, dim = _reduced(call, x)
    return [Result(call.out, dim, x.ids, x.error)]


def _cumulated(call: Call) -> list[Result]:
    """Sums of the first 1 to n numbers: a triangle of ones, whose norm is below n."""
    x = call.operand("self")
    axis = call["dim"] % max(x.value.dim(), 1)
    if axis == x.dim:
        return refuse("it adds up the samples")
    count = x.value.shape[axis] if x.value.dim() else 1
    error = count * (x.error + call.gamma(count + 2) * x.norm)
    if not call.out.is_floating_point():
        error = x.error
    return [Result(call.out, x.dim, x.ids, error * SLACK)]


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
    results = [Result(call.out, x.dim, x.ids, error * SLACK)]
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
    results = [Result(call.out, x.dim, x.ids, error * SLACK)]
    return results + [_unread(call, other, x) for other in call.outs[1:] if other.numel()]


def _pairs(value: Any, axes: int) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * axes if len(found) == 1 else found


def _avg_pool(call: Call) -> list[Result]:
    x = call.operand("self")
    if x.dim not in (None, 0) or call.out.dim() != 4:
        return refuse("expected images [b, c, h, w]")
    kernel, padding = _pairs(call["kernel_size"], 2), _pairs(call["padding"], 2)
    stride = _pairs(call["stride"], 2) if call["stride"] else kernel
    if call["ceil_mode"] or call["divisor_override"]:
        return refuse("no rule for ceil_mode or divisor_override")
    if any(padding) and not call["count_include_pad"]:
        # a window with fewer numbers divides by fewer: at most 2^axes times as much
        factor = float(math.prod(k / max(k - p, 1) for k, p in zip(kernel, padding, strict=True)))
    else:
        factor = 1.0
    sizes = [s + 2 * p for s, p in zip(x.value.shape[2:], padding, strict=True)]
    windows = [
        [range(i * t, i * t + k) for i in range(n)]
        for k, t, n in zip(kernel, stride, call.out.shape[2:], strict=True)
    ]
    norm = pool_norm(sizes, windows) * factor
    terms = call.gamma(math.prod(kernel) + 4)
    return [Result(call.out, x.dim, x.ids, norm * (x.error + terms * x.norm) * SLACK)]


def _adaptive_avg_pool(call: Call) -> list[Result]:
    x = call.operand("self")
    if x.dim not in (None, 0) or call.out.dim() != 4:
        return refuse("expected images [b, c, h, w]")
    sizes = x.value.shape[2:]
    windows = [
        [range(i * s // o, -(-(i + 1) * s // o)) for i in range(o)]
        for s, o in zip(sizes, call.out.shape[2:], strict=True)
    ]
    norm, terms = pool_norm(sizes, windows), call.gamma(math.prod(sizes) + 4)
    return [Result(call.out, x.dim, x.ids, norm * (x.error + terms * x.norm) * SLACK)]


def _max_pool(call: Call) -> list[Result]:
    """Each number is in at most prod ceil(kernel / stride) windows; the indices are not exact."""
    x = call.operand("self")
    axes = 3 if "3d" in call.name else 2
    if x.dim not in (None, 0):
        return refuse("its batch is not the samples")
    kernel = _pairs(call["kernel_size"], axes)
    stride = _pairs(call["stride"], axes) if call["stride"] else kernel
    dilated = any(d != 1 for d in _pairs(call["dilation"], axes))
    times = math.prod(k if dilated else -(-k // s) for k, s in zip(kernel, stride, strict=True))
    error = math.sqrt(times) * x.error * SLACK
    return [Result(out, x.dim, x.ids, error) for out in call.outs]


REDUCTIONS: dict[str, Rule] = {
    "sum": _added(mean=False),
    "mean": _added(mean=True),
    **dict.fromkeys(("amax", "amin", "max", "min"), _extreme),
    "linalg_vector_norm": _vector_norm,
    **dict.fromkeys(("_softmax", "_safe_softmax"), _softmax),
    "_log_softmax": _log_softmax,
    "logsumexp": _log_sum_exp,
    "var": _variance,
    **dict.fromkeys(("any", "all", "argmax", "argmin"), _decided),
    "cumsum": _cumulated,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
    "avg_pool2d": _avg_pool,
    "_adaptive_avg_pool2d": _adaptive_avg_pool,
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), _max_pool),
}
