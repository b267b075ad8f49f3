"""Comparisons, masks, and choices by them: exact where rounding cannot turn them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...linalg.bounds import SLACK
from ..bounded import refuse
from .call import Call, Result
from .elementwise import pair
from .operand import HUGE

Rule = Callable[[Call], list[Result]]


def _choose(call: Call) -> list[Result]:
    """Of one operand or the other, by a condition that is exact: the errors of both do."""
    operands = [call.operand("condition").expanded(call.out.shape)]
    values = pair(call, "self", "other", masks=True)
    error = (values[0].error.square() + values[1].error.square()).sqrt()
    huge = values[0].huge or values[1].huge
    return call.elementwise([*operands, *values], error, huge=huge)


def _masked_fill(call: Call) -> list[Result]:
    x = call.operand("self", masks=True).expanded(call.out.shape)
    mask = call.operand("mask").expanded(call.out.shape)
    value = call["value"]
    number = float(value) if not isinstance(value, Tensor) or value.numel() == 1 else math.nan
    if isinstance(value, Tensor) and not call.known(value, masks=True).exact:
        return refuse("no rule for a filling that is rounded")
    return call.elementwise([x, mask], x.error, huge=x.huge or abs(number) >= HUGE)


def _decides(call: Call) -> list[Result]:
    """Integers of integers: exact of exact numbers, else it hangs on rounding."""
    operands = [
        call.known(v, masks=True).expanded(call.out.shape)
        for v in call.given.values()
        if isinstance(v, Tensor)
    ]
    error = call.zeros(*operands)
    for operand in operands:
        error = error + operand.error
    return call.elementwise(operands, error)


def _compares(call: Call) -> list[Result]:
    """Rounded numbers, too, where none is as near the other as both can be off."""
    x, y = pair(call, "self", "other", masks=True)
    (result,) = _decides(call)
    if bool(result.error.any()):
        a, b = x.value.double(), y.value.double()
        both = (a.abs() >= HUGE / 4) & (b.abs() >= HUGE / 4)
        # infinities are exact; other huge numbers are not to be told from each other
        apart = torch.where(both, 0.0, (a - b).abs())
        apart = torch.where(both & a.isinf() & b.isinf(), torch.inf, apart)
        gap = call.made(result.dim, result.ids, apart).least
        if bool((gap > (x.error + y.error) * SLACK).all()):
            result.error = torch.zeros_like(result.error)
    return [result]


def _finite(call: Call) -> list[Result]:
    """isnan, isinf: of numbers whose errors are bounded."""
    x = call.operand("self", masks=True)
    sure = bool(x.error.isfinite().all()) and bool((x.value.double().abs() < 1e290).all())
    error = call.zeros(x) if sure or x.exact else torch.full_like(x.error, torch.inf)
    return call.elementwise([x], error, huge=False)


CHOICES: dict[str, Rule] = {
    "where": _choose,
    "masked_fill": _masked_fill,
    **dict.fromkeys(
        (
            *("logical_not", "logical_and", "logical_or", "bitwise_and", "bitwise_or"),
            *("bitwise_not", "bitwise_xor", "remainder"),
        ),
        _decides,
    ),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), _compares),
    **dict.fromkeys(("isnan", "isinf"), _finite),
}
