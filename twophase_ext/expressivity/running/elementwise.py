"""Operators that act number by number, and sums, products and quotients of broadcast operands."""

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from ...linalg.bounds import SLACK
from ..bounded import LIBM, SOFTPLUS, ULPS, refuse
from .call import Call, Result
from .operand import HUGE, Operand

Rule = Callable[[Call], list[Result]]


def _smooth(lipschitz: float, of_output: float, of_input: float, assumed: str = "") -> Rule:
    """f with |f'| <= lipschitz, computed to so many u of |output| and of |input|."""

    def rule(call: Call) -> list[Result]:
        x = call.operand("self")
        if assumed:
            call.owner.assumed.add(assumed)
        error = lipschitz * x.error
        if of_input:
            error = error + of_input * call.u * x.norm
        return call.elementwise([x], error, of_output)

    return rule


def _gelu(call: Call) -> list[Result]:
    # x (1 + erf(x / sqrt 2)) / 2: the factor errs by 6u, absolute; the tanh form by 20u: its
    # argument, a cubic, errs by 6u relatively, and |y| sech^2(y) <= 0.45
    call.owner.assumed.add(LIBM)
    x = call.operand("self")
    error = 1.13 * x.error + (16 if call["approximate"] == "none" else 32) * call.u * x.norm
    return call.elementwise([x], error)


def _leaky(call: Call) -> list[Result]:
    x = call.operand("self")
    return call.elementwise([x], max(1.0, abs(call["negative_slope"])) * x.error, 2)


def _prelu(call: Call) -> list[Result]:
    x, w = call.operand("self"), call.operand("weight").expanded(call.out.shape)
    if not w.constant:
        refuse("no rule for slopes that depend on the samples")
    slope = max(1.0, float(w.largest))
    error = (slope + w.error) * x.error + w.error * x.largest
    return call.elementwise([x, w], error, 2)


def _elu(call: Call) -> list[Result]:
    alpha, scale, inner = call["alpha"], call["scale"], call["input_scale"]
    x = call.operand("self")
    call.owner.assumed.add(LIBM)
    slope = abs(scale) * max(1.0, abs(alpha * inner))
    # expm1 of a rounded product: relative to 1 at most
    count = math.sqrt(call.out.numel()) * abs(scale * alpha)
    rounding = 2 * ULPS * call.u * (slope * x.norm + count)
    return call.elementwise([x], slope * x.error + rounding, 8)


def _clamp(call: Call) -> list[Result]:
    bounds = [call[name] for name in ("min", "max", "min_val", "max_val") if name in call.given]
    operands = [call.operand("self", masks=True)]
    error = operands[0].error
    for bound in bounds:
        if isinstance(bound, Tensor):
            operands.append(call.known(bound).expanded(call.out.shape))
            error = error + operands[-1].error
    finite = [b for b in bounds if isinstance(b, Real)]
    return call.elementwise(operands, error, huge=operands[0].huge and len(finite) < 2)


def _hardsigmoid(call: Call) -> list[Result]:
    x = call.operand("self")
    count = math.sqrt(call.out.numel())  # x / 6 + 1 / 2 errs by u, absolute
    return call.elementwise([x], x.error / 6 * SLACK + 4 * call.u * count, 8)


def _exp(call: Call) -> list[Result]:
    x = call.operand("self", masks=True)
    call.owner.assumed.add(LIBM)
    made = call.elementwise([x], x.error)[0]
    largest = call.made(made.dim, made.ids).largest
    return call.elementwise([x], largest * torch.expm1(x.error) * SLACK, 2 * ULPS)


def _log(call: Call) -> list[Result]:
    x = call.operand("self")
    call.owner.assumed.add(LIBM)
    least = x.least - x.error
    error = torch.where(least > 0, x.error / least.clamp(min=1e-300), torch.inf)
    return call.elementwise([x], error * SLACK, 2 * ULPS)


def _sqrt(call: Call) -> list[Result]:
    """sqrt(a) - sqrt(b) = (a - b) / (sqrt(a) + sqrt(b)); exact inputs may be 0."""
    x = call.operand("self")
    least = x.least - x.error
    slope = 1 / (x.least.clamp(min=0).sqrt() + least.clamp(min=0).sqrt()).clamp(min=1e-300)
    error = torch.where(x.error > 0, torch.where(least >= 0, x.error * slope, torch.inf), 0.0)
    return call.elementwise([x], error * SLACK, 2)


def _rsqrt(call: Call) -> list[Result]:
    x = call.operand("self")
    least = x.least - x.error
    error = torch.where(least > 0, x.error / (2 * least.clamp(min=1e-200) ** 1.5), torch.inf)
    if x.exact:  # of 0, too: the degree of a node that nothing reaches
        huge = bool(call.out.isinf().any()) and x.constant
        return call.elementwise([x], call.zeros(x), 6, huge=huge)
    return call.elementwise([x], error * SLACK, 6)


def _reciprocal(call: Call) -> list[Result]:
    x = call.operand("self")
    least = x.least_size - x.error
    error = torch.where(least > 0, x.error / (least * x.least_size).clamp(min=1e-300), torch.inf)
    return call.elementwise([x], error * SLACK, 2)


def _pow(call: Call) -> list[Result]:
    """x^k, k = 1, 2, ...: |a^k - b^k| <= k (|a| + |a - b|)^(k - 1) |a - b|; 0.5, -0.5 as roots.

    Other powers k of x > 0: the slope |k| s^(k - 1) at the end where it is largest. libm's pow errs
    by a few u.
    """
    base = float(call["self"]) if isinstance(call["self"], Real) else 0.0
    if base > 0:
        y = call.operand("exponent")
        call.owner.assumed.add(LIBM)
        made = call.elementwise([y], y.error)[0]
        largest = call.made(made.dim, made.ids).largest
        error = largest * torch.expm1(abs(math.log(base)) * y.error * SLACK)
        return call.elementwise([y], error * SLACK, 2 * ULPS)
    if not isinstance(call["exponent"], Real) or not isinstance(call["self"], Tensor):
        return refuse("no rule for a power that is computed")
    power = float(call["exponent"])
    if power == 0.5:
        return _sqrt(call)
    if power == -0.5:
        return _rsqrt(call)
    x = call.operand("self")
    if power in (2.0, 3.0):  # by products
        slope = power * (x.largest + x.error) ** (power - 1) * SLACK
        return call.elementwise([x], slope * x.error, 8)
    call.owner.assumed.add(LIBM)
    if power >= 1 and power == int(power):
        slope = power * (x.largest + x.error) ** (power - 1)
    else:
        low, high = x.least - x.error, x.largest + x.error
        ends = [abs(power) * end.clamp(min=1e-300) ** (power - 1) for end in (low, high)]
        slope = torch.where(low > 0, torch.maximum(*ends), torch.inf)
    error = torch.where(x.error > 0, slope * x.error * (1 + 1e-9), 0.0)
    return call.elementwise([x], error, 2 * ULPS)


def _log1p(call: Call) -> list[Result]:
    x = call.operand("self")
    call.owner.assumed.add(LIBM)
    least = 1 + x.least - x.error
    error = torch.where(least > 0, x.error / least.clamp(min=1e-300), torch.inf)
    return call.elementwise([x], error * SLACK, 2 * ULPS)


def _expm1(call: Call) -> list[Result]:
    x = call.operand("self")
    call.owner.assumed.add(LIBM)
    made = call.elementwise([x], x.error)[0]
    largest = 1 + call.made(made.dim, made.ids).largest
    return call.elementwise([x], largest * torch.expm1(x.error) * SLACK, 2 * ULPS)


def _torch_softplus(call: Call) -> list[Result]:
    """log(1 + exp(beta x)) / beta, or x itself where beta x > threshold: not softplus there.

    The two differ by exp(-threshold) / beta at most.
    """
    x = call.operand("self")
    call.owner.assumed.add(LIBM)
    beta, threshold = float(call["beta"]), float(call["threshold"])
    count = math.sqrt(call.out.numel() / (1 if x.constant else call.owner.samples))
    off = (2 * math.exp(-threshold) + 4 * ULPS * call.u) / beta * count
    return call.elementwise([x], x.error + 4 * call.u * x.norm + off * SLACK, 4 * ULPS)


def _glu(call: Call) -> list[Result]:
    """a sigmoid(b), the halves of x: | | <= |a - a'| + |a| |b - b'| / 4, and both together."""
    x = call.operand("self")
    axis = call["dim"] % x.value.dim()
    if axis == x.dim:
        return refuse("it mixes the samples")
    call.owner.assumed.add(LIBM)
    error = (1 + x.largest / 4 + x.error / 4) * x.error * SLACK + 20 * call.u * x.norm
    return [Result(call.out, x.dim, x.ids, error)]


def _lerp(call: Call) -> list[Result]:
    """a + w (b - a), w a number."""
    x, y = pair(call, "self", "end")
    if isinstance(call["weight"], Tensor):
        return refuse("no rule for weights that are computed")
    w = abs(float(call["weight"]))
    error = (1 + w) * x.error + w * y.error + 8 * call.u * (1 + w) * (x.norm + y.norm)
    return call.elementwise([x, y], error * SLACK)


def _steps(call: Call) -> list[Result]:
    """floor, sign, ...: exact of exact numbers, else it hangs on rounding."""
    x = call.operand("self")
    error = torch.where(x.error > 0, torch.inf, 0.0).to(x.error)
    return call.elementwise([x], error)


def pair(call: Call, first: str, second: str, masks: bool = False) -> tuple[Operand, Operand]:
    """Two operands, broadcast; a number is an exact constant."""
    found = []
    for name in (first, second):
        value = call[name]
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value), dtype=torch.float64)
        operand = call.known(value, masks=masks)
        if masks and operand.constant and value.is_floating_point():
            operand.huge = operand.huge or bool((value.abs() >= HUGE).any())
        found.append(operand)
    left, right = call.broadcast(*found)
    return left, right


def _sum(call: Call) -> list[Result]:
    """a + alpha b; numbers beyond HUGE stay so, and other ones do not become so."""
    x, y = pair(call, "self", "other", masks=True)
    alpha = abs(float(call["alpha"] if call["alpha"] is not None else 1))
    huge = x.huge or y.huge
    if huge and alpha != 1:
        return refuse("no rule for a multiple of masks")
    multiple = 0.0 if alpha == 1 else 2 * call.u * alpha * y.norm
    result = call.elementwise([x, y], x.error + alpha * y.error + multiple, 3, huge)
    if huge:
        # a number of HUGE / 4 to HUGE could be either: none may be there
        size = call.out.abs()
        if bool(((size > HUGE / 4) & (size < HUGE * 4)).any()) or bool(call.out.isnan().any()):
            return refuse("no rule for numbers of this size")
    return result


def _product(call: Call) -> list[Result]:
    """|ab - a'b'| <= |a| |b - b'| + |b| |a - a'| + |a - a'| |b - b'|."""
    x, y = pair(call, "self", "other", masks=True)
    if x.huge or y.huge:
        # a mask times nothing or one: exact
        by = y if x.huge else x
        once = (by.value == 0) | (by.value == 1)
        if (x.huge and y.huge) or not (x.exact and y.exact and bool(once.all())):
            return refuse("an operand may hold masks")
        return call.elementwise([x, y], call.zeros(x, y), huge=True)
    error = y.largest * x.error
    if not y.exact:
        error = error + x.largest * y.error + x.error * y.error
    return call.elementwise([x, y], error * SLACK, 2)


def _quotient(call: Call) -> list[Result]:
    """|a/b - a'/b'| <= (|a - a'| + |a/b| |b - b'|) / |b'|, |b'| >= |b| - |b - b'|."""
    if call["rounding_mode"] is not None:
        return refuse("no rule for a rounded quotient")
    x, y = pair(call, "self", "other")
    least = y.least_size - y.error
    (result,) = call.elementwise([x, y], call.zeros(x, y))
    largest = call.made(result.dim, result.ids).largest
    error = (x.error + largest * y.error) / least.clamp(min=1e-300)
    return call.elementwise([x, y], torch.where(least > 0, error, torch.inf) * SLACK, 2)


def _rsub(call: Call) -> list[Result]:
    x, y = pair(call, "other", "self")
    alpha = abs(float(call["alpha"] if call["alpha"] is not None else 1))
    multiple = 0.0 if alpha == 1 else 2 * call.u * alpha * y.norm
    return call.elementwise([x, y], x.error + alpha * y.error + multiple, 3)


def _addcmul(call: Call) -> list[Result]:
    a, x, y = call.broadcast(*(call.operand(n) for n in ("self", "tensor1", "tensor2")))
    value = abs(float(call["value"]))
    product = x.largest * y.error + y.largest * x.error + x.error * y.error
    rounding = 4 * call.u * value * x.largest * y.norm
    return call.elementwise([a, x, y], a.error + value * product * SLACK + rounding, 4)


def _largest_of_two(call: Call) -> list[Result]:
    x, y = pair(call, "self", "other")
    return call.elementwise([x, y], x.error + y.error)


def _softplus(call: Call) -> list[Result]:
    """twophase::softplus: 1-Lipschitz, off by 8u |h| + 8u / beta."""
    call.owner.assumed.add(SOFTPLUS)
    x = call.operand("x")
    count = call.out.numel() / (1 if x.constant else call.owner.samples)
    bend = 8 * call.u / call["beta"] * math.sqrt(count)
    return call.elementwise([x], x.error + bend * SLACK, 8)


def _converted(call: Call) -> list[Result]:
    """To another type: one rounding, to that of the result."""
    x = call.operand("self", masks=True)
    (result,) = call.elementwise([x], x.error, 1, huge=x.huge)
    if call.out.is_floating_point() and x.value.is_floating_point():
        lost = bool((call.out.isinf() & ~x.value.isinf()).any()) or bool(call.out.isnan().any())
        if lost and not x.huge:
            return refuse("numbers are beyond the range of the type")
    return [result]


_SIN = 2 * ULPS
ELEMENTWISE: dict[str, Rule] = {
    **dict.fromkeys(("relu", "hardtanh"), _clamp),
    "abs": _smooth(1.0, 0, 0),
    **dict.fromkeys(("neg", "tril", "triu"), _smooth(1.0, 0, 0)),
    "sigmoid": _smooth(0.25, 16, 0, LIBM),
    "tanh": _smooth(1.0, 2 * ULPS, 0, LIBM),
    "silu": _smooth(1.1, 20, 0, LIBM),
    "mish": _smooth(1.1, 40, 0, LIBM),
    "erf": _smooth(1.13, 2 * ULPS, 0, LIBM),
    "sin": _smooth(1.0, _SIN, 0, LIBM),
    "cos": _smooth(1.0, _SIN, 0, LIBM),
    "hardswish": _smooth(1.5, 8, 4),
    "hardsigmoid": _hardsigmoid,
    "gelu": _gelu,
    "leaky_relu": _leaky,
    "_prelu_kernel": _prelu,
    "elu": _elu,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    "exp": _exp,
    "log": _log,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "reciprocal": _reciprocal,
    "log1p": _log1p,
    "expm1": _expm1,
    "pow": _pow,
    "softplus": _torch_softplus,
    "glu": _glu,
    "lerp": _lerp,
    **dict.fromkeys(("floor", "ceil", "round", "trunc", "sign"), _steps),
    "erfc": _smooth(1.13, 2 * ULPS, 0, LIBM),
    "atan": _smooth(1.0, 2 * ULPS, 0, LIBM),
    "asinh": _smooth(1.0, 2 * ULPS, 0, LIBM),
    "softshrink": _smooth(1.0, 2, 2),
    **dict.fromkeys(("add", "sub"), _sum),
    "rsub": _rsub,
    "mul": _product,
    "div": _quotient,
    "addcmul": _addcmul,
    **dict.fromkeys(("maximum", "minimum"), _largest_of_two),
    "twophase::softplus": _softplus,
    "_to_copy": _converted,
}
