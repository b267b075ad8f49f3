"""Constants and rounded-up helpers of every bound that certifies (Higham 2002; Rump, BIT 46, 2006).

Assumed of float64 arithmetic: rounding to nearest, no flush-to-zero, and products of matrices that
are plain sums of products in some order (the default of MKL, OpenBLAS and cuBLAS: no Strassen, no
emulation by shorter types).
"""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-53
SLACK = (1 + 2.0**-20) ** 2  # covers the rounding of the bounds and of the computed trace
UNDERFLOW = 2.0**-900  # more than all underflow together, the scaling's included


def gamma(k: int) -> float:
    """gamma_k = k u / (1 - k u), u = 2^-53; evaluated to nearest, SLACK covers it."""
    return k * UNIT_ROUNDOFF / (1 - k * UNIT_ROUNDOFF)


def shifted_down(diagonal: Tensor, shift: float) -> Tensor:
    """diagonal - shift, rounded down."""
    return torch.nextafter(diagonal - shift, diagonal.new_tensor(-torch.inf))


def below(x: float) -> float:
    """The largest double below x."""
    return math.nextafter(x, -math.inf)


def above(x: float) -> float:
    """The smallest double above x."""
    return math.nextafter(x, math.inf)


def minus(x: float, *terms: float) -> float:
    """A lower bound of x minus the terms, one by one."""
    for term in terms:
        x = below(x - term)
    return x


def plus(x: float, *terms: float) -> float:
    """An upper bound of x plus the terms, one by one; of any sign."""
    for term in terms:
        x = above(x + term)
    return x


def bound_text(value: float, digits: int = 4, *, upper: bool = False) -> str:
    """A proved bound as text, rounded so that it stays one: down, an upper bound up."""
    if not math.isfinite(value):
        return str(value)
    rounding = ROUND_CEILING if upper else ROUND_FLOOR
    return f"{Context(prec=digits, rounding=rounding).create_decimal(Decimal(value)):.{digits}g}"


def power_of_two(exponents: Tensor) -> Tensor:
    """2^e exactly, e int64 from -1022 to 1023 (torch.ldexp goes through pow in float32)."""
    return ((exponents + 1023) << 52).view(torch.float64)


def exponents_of(largest: Tensor) -> Tensor:
    """row_exponent of csrc/math/cholesky.h, int64: the exponent of each float64 >= 0.

    Clamped to [-1000, 1000], so that 2^-e is normal; 0 for 0.
    """
    exponents = ((largest.view(torch.int64) >> 52) - 1023).clamp(-1000, 1000)
    return torch.where(largest == 0, 0, exponents)
