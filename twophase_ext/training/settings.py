"""Settings of the second phases, checked."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Self

from ..core.arguments import integer

FORMS = ("tight", "paper")  # of L_H


def _number(argument: str, name: str, value: Any, below: float) -> float:
    """`value` in (0, below); TypeError or ValueError name it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument}: expected a number for {name}, got {value!r}")
    given: Any = value
    if not 0 < given < below or given > sys.float_info.max:
        raise ValueError(f"{argument}: expected {name} in (0, {below:g}), got {value}")
    return float(value)


class Settings:
    """What the settings of the second phases share."""

    @classmethod
    def of(cls, argument: str, settings: Any) -> Self:
        """The settings given as an object, as a dict or as None (defaults)."""
        if settings is None or isinstance(settings, cls):
            return settings or cls()
        if not isinstance(settings, Mapping):
            raise TypeError(
                f"{argument}: expected a dict of settings, got {type(settings).__name__}"
            )
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"{argument}: expected settings among {known}, got {unknown[0]!r}")
        return cls(**settings)


@dataclass(frozen=True)
class GradientDescent(Settings):
    """Settings of second_phase="gd" (Theorem 1 i): full gradient steps of size 1 / L_H.

    smoothness: the form of L_H, "paper" (L_ell / n) sum ||[h_i, 1]||^2, or "tight", an upper bound
    of (L_ell / n) lambda_max(M^T M), M = [h_X, 1]: the theorem's proof needs no more, and the steps
    are longer. l2: adds (l2 / 2) ||w||^2 of the last layer to the objective, and l2 to L_H.
    steps: gradient steps an epoch, each a pass over the features.
    """

    smoothness: str = "tight"
    l2: float = 0.0
    steps: int = 1

    def __post_init__(self) -> None:
        """Check every value."""
        if self.smoothness not in FORMS:
            raise ValueError(
                f"gd: expected smoothness among {list(FORMS)}, got {self.smoothness!r}"
            )
        object.__setattr__(self, "smoothness", str(self.smoothness))  # NumPy has its own, too
        l2 = 0.0 if self.l2 == 0 else _number("gd", "l2", self.l2, math.inf)
        object.__setattr__(self, "l2", l2)
        object.__setattr__(self, "steps", integer("gd: steps", self.steps, 1))


def _patience(argument: str, value: Any) -> int | None:
    """`early_stopping` of a second phase."""
    return None if value is None else integer(f"{argument}: early_stopping", value, 1)


@dataclass(frozen=True)
class AcceleratedDescent(Settings):
    """Settings of second_phase="agd": accelerated gradient in a metric H >= M^T M / n.

    H = M^T M / n + lambda I; damping: lambda in mean eigenvalues, trace(M^T M) / (n min(n, p)), p
    the columns of M = [h_X, 1], >= 0. Smaller is faster, and with p near n generalises worse
    (docs/second-phase.md). Where neither side of M fits into memory, H is a sketch. None:
    H = L_H / L_ell I, the plain method, without a factorization.
    l2: adds (l2 / 2) ||w||^2 of the last layer to the objective. steps: an epoch, each a pass over
    the features or a product with M M^T, whichever is smaller. early_stopping: epochs of the second
    phase without a lower validation loss after which it ends; the weights of the lowest are kept.
    None: it goes on to the end and keeps the last ones.
    """

    damping: float | None = 0.1
    l2: float = 0.0
    steps: int = 5
    early_stopping: int | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        if self.damping is not None:
            damping = 0.0 if self.damping == 0 else _number("agd", "damping", self.damping, 1e6)
            object.__setattr__(self, "damping", damping)
        l2 = 0.0 if self.l2 == 0 else _number("agd", "l2", self.l2, math.inf)
        object.__setattr__(self, "l2", l2)
        object.__setattr__(self, "steps", integer("agd: steps", self.steps, 1))
        object.__setattr__(self, "early_stopping", _patience("agd", self.early_stopping))


@dataclass(frozen=True)
class Exact(Settings):
    """Settings of second_phase="exact": the last layer's minimum, by least squares or L-BFGS.

    gap: the phase ends where its objective is shown to lie no more than this above the least, or
    where by estimate a tenth of this is left, or at the last epoch. l2: adds (l2 / 2) ||w||^2 of
    the last layer to the objective: recommended for cross-entropy of separable data, which has no
    minimum without. steps: iterations of L-BFGS an epoch, which starts without the last one's
    memory. early_stopping: as of "agd".
    """

    gap: float = 1e-6
    l2: float = 0.0
    steps: int = 50
    early_stopping: int | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        object.__setattr__(self, "gap", _number("exact", "gap", self.gap, math.inf))
        l2 = 0.0 if self.l2 == 0 else _number("exact", "l2", self.l2, math.inf)
        object.__setattr__(self, "l2", l2)
        object.__setattr__(self, "steps", integer("exact: steps", self.steps, 1))
        object.__setattr__(self, "early_stopping", _patience("exact", self.early_stopping))


@dataclass(frozen=True)
class StochasticDescent(Settings):
    """Settings of second_phase="sgd" (Theorem 1 ii): eta_t = c / t^(1/2 + eps), t = 1, 2, ...

    Every mini-batch is drawn independently and uniformly with replacement; no momentum, no weight
    decay. c: > 0, None is 1 / L_H with the tight L_H. eps: in (0, 1/2], so that the sum of eta_t^2
    is finite and the sum of eta_t is not.
    """

    c: float | None = None
    eps: float = 0.1

    def __post_init__(self) -> None:
        """Check every value."""
        if self.c is not None:
            object.__setattr__(self, "c", _number("sgd", "c", self.c, math.inf))
        eps = 0.5 if self.eps == 0.5 else _number("sgd", "eps", self.eps, 0.5)
        object.__setattr__(self, "eps", eps)

    def rate(self, c: float, t: int) -> float:
        """eta_t."""
        return float(c * t ** -(0.5 + self.eps))


@dataclass(frozen=True)
class Lazy(Settings):
    """Settings of second_phase="lazy" (Theorem 3): full gradient steps on all parameters.

    smoothness: L with ||grad L(w) - grad L(w')|| <= L ||w - w'||; the step is 2 * eta_bar / L.
    None: the step is the optimizer's learning rate at tau and the premise stays unchecked.
    eta_bar: in (0, 1), used with smoothness. verify_every: the rank is verified again after every
    so many steps (one step an epoch), and after the last.
    """

    smoothness: float | None = None
    eta_bar: float = 0.5
    verify_every: int = 1

    def __post_init__(self) -> None:
        """Check every value."""
        if self.smoothness is not None:
            smoothness = _number("lazy", "smoothness", self.smoothness, math.inf)
            object.__setattr__(self, "smoothness", smoothness)
        object.__setattr__(self, "eta_bar", _number("lazy", "eta_bar", self.eta_bar, 1))
        every = integer("lazy: verify_every", self.verify_every, 1)
        object.__setattr__(self, "verify_every", every)
