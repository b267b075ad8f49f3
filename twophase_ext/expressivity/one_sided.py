"""Activations that vanish on one side: what the triangular certificate needs to know of each.

With S = SHARPEST and n neurons, `cut` is a number with |a(t)| <= S / n for all t <= cut, and
|a(t)| <= exp(rate delta) S / n for all t <= cut + delta, delta >= 0. Derivations, t < 0:

    softplus_beta(t) = log(1 + exp(beta t)) / beta <= exp(beta t) / beta for every t: rate beta.
    GELU: t Phi(t), |t| Phi(t) <= phi(t) (Mills: 1 - Phi(s) <= phi(s) / s). phi(cut + delta) =
        phi(cut) exp(|cut| delta - delta^2 / 2): rate |cut|.
    GELU by tanh: t / (1 + exp(-2 y)), y = sqrt(2 / pi) (t + 0.044715 t^3) <= sqrt(2 / pi) t, so
        |a(t)| <= |t| exp(1.595 t): rate 1.595.
    SiLU: |t| / (1 + exp(-t)) <= |t| exp(t); Mish: |t| tanh(softplus(t)) <= |t| exp(t): rate 1.

|t| exp(c t) grows up to t = -1 / c and stays below |cut| exp(c (cut + delta)) beyond, as cut < -1;
for t >= 0, |a(t)| <= t <= |cut| exp(c t), and likewise for GELU, as exp(cut^2 / 2) > 3.
With T = log(n / S) > 1 and cut = -(T + log T + 1) / c, |cut| exp(c cut) <= exp(-T) for c >= 1:
T + log T + 1 <= e T.

Slopes: 1, and 1.13 for GELU, 1.1 for SiLU and Mish. Evaluation in float64: a few u of |a|, of |t|
(where 1 + erf or 1 + tanh is formed) and of a constant, as in running/elementwise.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..linalg.bounds import SLACK, UNIT_ROUNDOFF
from ..model.softplus import Softplus
from ..ops import softplus_
from .bounded import LIBM, SOFTPLUS

SHARPEST = 1e-18  # ||entries taken as zero||_F stays below it
_aten = torch.ops.aten


@dataclass(frozen=True)
class OneSided:
    """a(t): see the page. The bounds are of the real function and of its float64 evaluation.

    name: with its parameters. function: of a float64 tensor, which it may overwrite. slope >= |a'|.
    decay: c of |a(t)| <= |t| exp(c t); 0 where `beta` (softplus) or neither (GELU) says it.
    of_value, of_input, constant: evaluation errs by u (of_value |a| + of_input |t| + constant).
    assumed: what that takes for granted.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    slope: float
    of_value: float
    of_input: float
    constant: float
    assumed: tuple[str, ...] = ()
    beta: float = 0.0
    decay: float = 0.0

    def cut(self, n: int) -> float:
        """The pre-activation up to which an entry counts as zero."""
        if self.beta:
            return math.log(SHARPEST * self.beta / n) / self.beta
        far = math.log(n / SHARPEST)
        if self.decay:
            return -(far + math.log(far) + 1) / self.decay
        return -math.sqrt(2 * far)  # phi(t) <= exp(-t^2 / 2)

    def rate(self, n: int) -> float:
        """By which the bound grows behind `cut`."""
        return self.beta or self.decay or -self.cut(n)

    def height(self, n: int) -> float:
        """Of a neuron at its own sample: a power of two beside which -cut is not large.

        1 where the nearest earlier sample, at 1 - 1 / KINK < -1.8, is below the cut as it is.
        """
        far = -self.cut(n)
        return 1.0 if far <= 1.5 else 2.0 ** math.ceil(math.log2(far))

    def evaluation_error(self, values: float, at: float, count: int) -> float:
        """Upper bound of ||computed a(t) - a(t)||_F of `count` numbers.

        values: upper bound of ||a(t)||_F as computed, at: of ||t||_F.
        """
        sizes = self.of_value * values + self.of_input * at + self.constant * math.sqrt(count)
        return UNIT_ROUNDOFF * sizes * SLACK


def exact_softplus(beta: float) -> OneSided:
    """Of tp.nn.Softplus."""
    return OneSided(
        f"softplus {beta!r}",
        lambda t: softplus_(t, beta),
        *(1.0, 8.0, 0.0, 8 / beta),
        (SOFTPLUS,),
        beta=beta,
    )


_OTHERS = {
    (nn.GELU, "none"): OneSided(
        "gelu", lambda t: _aten.gelu(t, approximate="none"), 1.13, 2.0, 16.0, 0.0, (LIBM,)
    ),
    (nn.GELU, "tanh"): OneSided(
        "gelu by tanh",
        lambda t: _aten.gelu(t, approximate="tanh"),
        *(1.13, 2.0, 32.0, 0.0),
        (LIBM,),
        decay=1.595,
    ),
    (nn.SiLU, None): OneSided("silu", _aten.silu, 1.1, 20.0, 0.0, 0.0, (LIBM,), decay=1.0),
    (nn.Mish, None): OneSided("mish", _aten.mish, 1.1, 40.0, 0.0, 0.0, (LIBM,), decay=1.0),
}


def one_sided(activation: nn.Module) -> OneSided | None:
    """Of a module among model/activations.py; None where the function vanishes on no side."""
    if isinstance(activation, Softplus):
        return exact_softplus(float(activation.beta))
    return _OTHERS.get((type(activation), getattr(activation, "approximate", None)))
