"""Sums over dimensions, windows, softmax, and normalization."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...linalg.bounds import SLACK
from ..bounded import LIBM, SMOOTH_MAX, ULPS, refuse
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
    """|x|_2 and |x|_inf are 1-Lipschitz in the 2-norm, |x|_1 of c numbers sqrt(c)."""
    order = float(call["ord"])
    if order not in (1, 2, math.inf):
        return refuse("no rule for this norm; 1, 2 and inf have one")
    x = call.operand("self")
    dims, dim = _reduced(call, x)
    count = math.prod(x.value.shape[d] for d in dims)
    times = math.sqrt(count) if order == 1 else 1.0
    error = times * (x.error + call.gamma(count + 6) * x.norm)
    return [Result(call.out, dim, x.ids, error * SLACK)]


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
    """max + log sum exp(x - max): its derivative softmax(x) has norm 1 at most.

    A number that is masked adds nothing; one at least of those that are added up is none.
    """
    x = call.operand("self", masks=True)
    dims, dim = _reduced(call, x)
    if x.huge and bool((x.value.amax(dims).abs() >= HUGE / 4).any()):
        return refuse("no rule for a row that is masked throughout")
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
    error = (slope * off + call.gamma(count + 8) * made.norm) * SLACK
    return [Result(call.outs[0], dim, x.ids, error)]


def _deviation(call: Call) -> list[Result]:
    """||c|| / sqrt(d - correction), c = x - mean: 1-Lipschitz but for the root."""
    x = call.operand("self")
    dims, dim = _reduced(call, x)
    count = math.prod(x.value.shape[d] for d in dims)
    correction = 1 if call["correction"] is None else float(call["correction"])
    if count - correction <= 0:
        return refuse("no rule for a deviation of too few numbers")
    off = x.error + 4 * call.gamma(count + 8) * x.norm
    return [Result(call.out, dim, x.ids, off / math.sqrt(count - correction) * SLACK)]


def _variance_and_mean(call: Call) -> list[Result]:
    x = call.operand("self")
    (variance,) = _variance(call)
    dims, _ = _reduced(call, x)
    count = math.prod(x.value.shape[d] for d in dims)
    error = (x.error + call.gamma(count + 4) * x.norm) / math.sqrt(count)
    return [variance, Result(call.outs[1], variance.dim, x.ids, error * SLACK)]


def _sorted(call: Call) -> list[Result]:
    """Sorted numbers, or the k largest of them: 1-Lipschitz, and exact; places are not."""
    x = call.operand("self")
    if (call["dim"] if call["dim"] is not None else -1) % x.value.dim() == x.dim:
        return refuse("it brings different samples together")
    return [Result(out, x.dim, x.ids, x.error) for out in call.outs]


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


def _pairs(value: Any, axes: int) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * axes if len(found) == 1 else found


def _averages(call: Call) -> list[Result]:
    """Sums over windows with weights >= 0, an axis at a time: pooling, (bi-)linear interpolation.

    Schur's test, ||A||_2 <= sqrt(||A||_1 ||A||_inf): rows from an image of ones; the column of
    pixel (i, j) adds up to that of row i of ones, times that of column j, over that of all ones.
    """
    x = call.operand("self")
    if x.dim not in (None, 0) or x.value.dim() < 3:
        return refuse("expected images [b, c, ...]")
    sizes = x.value.shape[2:]

    def applied(images: Tensor) -> Tensor:
        return call.func(**{**call.given, "self": images})

    whole = applied(torch.ones(1, 1, *sizes, dtype=torch.float64))
    total = float(whole.sum())
    columns = total
    for axis, size in enumerate(sizes):
        view = [size, 1, *(size if k == axis else 1 for k in range(len(sizes)))]
        bars = torch.eye(size, dtype=torch.float64).view(view).expand(size, 1, *sizes)
        columns *= float(applied(bars.contiguous()).flatten(1).sum(1).max()) / total
    norm = math.sqrt(float(whole.max()) * columns) * (1 + 1e-9)
    kernel = call["kernel_size"] or (sizes if "adaptive" in call.name else [4] * len(sizes))
    terms = call.gamma(math.prod(_pairs(kernel, len(sizes))) + 8)
    return [Result(call.out, x.dim, x.ids, norm * (x.error + terms * x.norm) * SLACK)]


def _max_pool(call: Call) -> list[Result]:
    """Each number is in at most prod ceil(kernel / stride) windows; the indices are not exact."""
    x = call.operand("self")
    if "adaptive" in call.name:
        axes = call.out.dim() - 2
        sizes = zip(x.value.shape[-axes:], call.out.shape[-axes:], strict=True)
        meet = math.prod(-(-m // n) + 1 if n % m else 1 for n, m in sizes)
        error = math.sqrt(meet) * x.error * SLACK
        return [Result(out, x.dim, x.ids, error) for out in call.outs]
    axes = 3 if "3d" in call.name else 2
    if x.dim not in (None, 0):
        return refuse("its batch is not the samples")
    kernel = _pairs(call["kernel_size"], axes)
    stride = _pairs(call["stride"], axes) if call["stride"] else kernel
    times = _windows_of_one(kernel, stride, _pairs(call["dilation"], axes))
    error = math.sqrt(times) * x.error * SLACK
    return [Result(out, x.dim, x.ids, error) for out in call.outs]


def _windows_of_one(kernel: list[int], stride: list[int], dilation: list[int]) -> int:
    """In how many windows one number is, at most.

    It is at place t of window o where o s + t d is its own place: t is given modulo s / gcd(s, d).
    """
    along = zip(kernel, stride, dilation, strict=True)
    return math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in along)


def _smooth_max_pool(call: Call) -> list[Result]:
    """y = m + log(s) / beta, s = sum of exp(-z_j) over a window's k numbers, z_j = beta (m - x_j).

    Its gradient by the window is softmax, of 1-norm 1: |dy| <= max |dx_j|, whose square is at most
    the sum of squares; a number counts once for each window that it is in.

    Rounding: m is exact. m - x_j is off by u of itself, and beta times it by u again where there
    is no fused multiply-add, which turns exp(-z) into exp(-z) (1 + 2u z); its polynomial is off by
    5u of itself; the mean of z under the weights exp(-z) / s is their entropy less log s, log k
    at most. The sum of k positive numbers: gamma_k. Numbers left out, below 2^-64 (2^-512 in
    float64), are less than u for k < 2^40. So s is off by gamma_(k + 6) + 2u log k of itself,
    log(s) by as much and by 8u of itself, log k at most, and the last sum by u |y|.
    """
    call.owner.assumed.add(SMOOTH_MAX)
    x, kernel = call.operand("x"), call["kernel"]
    if x.dim is not None and x.dim >= x.value.dim() - len(kernel):
        return refuse("it brings different samples together")
    times = _windows_of_one(kernel, call["stride"], call["dilation"])
    count = math.prod(kernel)
    each = (call.gamma(count + 16) + 12 * call.u * math.log(count)) / call["beta"]
    places = call.out.numel()
    if x.dim is not None and x.ids is not None:
        places = places // len(x.ids) * int(x.ids.bincount().max())
    made = call.made(x.dim, x.ids)
    rounding = 2 * call.u * made.norm + math.sqrt(places) * each
    return [Result(call.out, x.dim, x.ids, (math.sqrt(times) * x.error + rounding) * SLACK)]


REDUCTIONS: dict[str, Rule] = {
    "sum": _added(mean=False),
    "mean": _added(mean=True),
    **dict.fromkeys(("amax", "amin", "max", "min"), _extreme),
    "linalg_vector_norm": _vector_norm,
    **dict.fromkeys(("_softmax", "_safe_softmax"), _softmax),
    "_log_softmax": _log_softmax,
    "logsumexp": _log_sum_exp,
    "var": _variance,
    "std": _deviation,
    "var_mean": _variance_and_mean,
    **dict.fromkeys(("sort", "topk"), _sorted),
    **dict.fromkeys(("any", "all", "argmax", "argmin"), _decided),
    "cumsum": _cumulated,
    **dict.fromkeys(
        (
            *("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
            *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),
            "_upsample_bilinear2d_aa",
        ),
        _averages,
    ),
    **dict.fromkeys(
        (
            *("max_pool2d_with_indices", "max_pool3d_with_indices"),
            *("adaptive_max_pool2d", "adaptive_max_pool3d"),
        ),
        _max_pool,
    ),
    "twophase::smooth_max_pool": _smooth_max_pool,
}
