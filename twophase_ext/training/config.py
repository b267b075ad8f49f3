"""The Trainer's arguments, checked and resolved."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch

from ..expressivity.verify import METHODS
from ..names import canonical_name
from .features import MODES

SECOND_PHASES = ("base", "lazy")
_SIGMAS = torch.finfo(torch.float32)
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Lazy:
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
        for name, value, limit in (
            ("smoothness", self.smoothness, "inf"),
            ("eta_bar", self.eta_bar, "1"),
        ):
            if name == "smoothness" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"lazy: expected a number for {name}, got {value!r}")
            if not 0 < value < float(limit):
                raise ValueError(f"lazy: expected {name} in (0, {limit}), got {value}")
        object.__setattr__(
            self, "verify_every", integer("lazy: verify_every", self.verify_every, 1)
        )

    @staticmethod
    def of(settings: Any) -> "Lazy":
        """The settings given as an object, as a dict or as None (defaults)."""
        if settings is None or isinstance(settings, Lazy):
            return settings or Lazy()
        if not isinstance(settings, Mapping):
            raise TypeError(f"lazy: expected a dict of settings, got {type(settings).__name__}")
        known = [field.name for field in fields(Lazy)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"lazy: expected settings among {known}, got {unknown[0]!r}")
        return Lazy(**settings)


@dataclass(frozen=True)
class Config:
    """Plain data that, with the model and the data, determines a run."""

    loss: str
    epochs: int
    tau_epoch: int
    noise_std: float | dict[str, float]
    second_phase: str
    batch_norm: str
    feature_cache: str
    batch_size: int
    seed: int
    precision: str
    verify: str | bool
    lazy: Lazy | None = None  # settings of that second phase, None in the others

    @property
    def dtype(self) -> torch.dtype:
        """The training precision as torch names it."""
        return PRECISIONS[self.precision]

    def as_dict(self) -> dict[str, Any]:
        """For config.json and for the comparison with a checkpoint's."""
        return asdict(self)


def integer(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`; TypeError or ValueError name the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)


def _choice(name: str, value: Any, choices: Any) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {sorted(choices)}, got {value!r}")
    return str(value)


def resolve_tau(tau: Any, epochs: int) -> int:
    """The first epoch of the second phase: round(tau * epochs), kept within 1..epochs - 1.

    tau: a fraction in (0, 1), or an epoch number in 1..epochs - 1. ValueError otherwise.
    """
    if isinstance(tau, bool) or not isinstance(tau, Real):
        raise TypeError(f"tau: expected a fraction of the epochs or an epoch, got {tau!r}")
    if isinstance(tau, Integral):
        tau = int(tau)
        if not 1 <= tau <= epochs - 1:
            raise ValueError(f"tau: expected an epoch in 1..{epochs - 1}, got {tau}")
        return tau
    tau = float(tau)
    if not 0 < tau < 1:
        raise ValueError(f"tau: expected a fraction in (0, 1), got {tau}")
    return min(max(round(tau * epochs), 1), epochs - 1)


def _resolve_noise(noise_std: Any) -> float | dict[str, float]:
    entries = noise_std.items() if isinstance(noise_std, dict) else [("noise_std", noise_std)]
    for name, sigma in entries:
        if isinstance(sigma, bool) or not isinstance(sigma, Real):
            raise TypeError(f"noise_std: expected a number for {name}, got {sigma!r}")
        if not _SIGMAS.tiny <= float(sigma) <= _SIGMAS.max:
            raise ValueError(
                f"noise_std: expected a number > 0 in float32's range for {name} (the Gaussian "
                f"must not be degenerate), got {sigma}"
            )
    if isinstance(noise_std, dict):
        return {canonical_name(str(name)): float(sigma) for name, sigma in noise_std.items()}
    return float(noise_std)


def resolve(
    *,
    loss: str,
    epochs: Any,
    tau: Any,
    noise_std: Any,
    second_phase: Any,
    batch_norm: Any,
    feature_cache: Any,
    batch_size: Any,
    seed: Any,
    precision: Any,
    verify: Any,
    lazy: Any = None,
) -> Config:
    """Check every argument; TypeError or ValueError names the first one that is wrong."""
    epochs = integer("epochs", epochs, 2)
    second_phase = _choice("second_phase", second_phase, SECOND_PHASES)
    if verify is not False and verify not in METHODS:
        raise ValueError(f"verify: expected False or one of {METHODS}, got {verify!r}")
    return Config(
        loss=loss,
        epochs=epochs,
        tau_epoch=resolve_tau(tau, epochs),
        noise_std=_resolve_noise(noise_std),
        second_phase=second_phase,
        batch_norm=_choice("batch_norm", batch_norm, ("frozen", "batch")),
        feature_cache=_choice("feature_cache", feature_cache, MODES),
        batch_size=integer("batch_size", batch_size, 1),
        seed=integer("seed", seed, -(2**63)),
        precision=_choice("precision", precision, PRECISIONS),
        verify=verify,
        lazy=_resolve_lazy(lazy, second_phase, verify, batch_norm, feature_cache),
    )


def _resolve_lazy(
    lazy: Any, second_phase: str, verify: Any, batch_norm: Any, feature_cache: Any
) -> Lazy | None:
    if second_phase != "lazy":
        if lazy is not None:
            raise ValueError(f"lazy: expected None with second_phase={second_phase!r}, got {lazy}")
        return None
    if verify is False:
        raise ValueError("verify: second_phase='lazy' needs the rank verified, got False")
    if batch_norm == "batch":
        raise ValueError("batch_norm: second_phase='lazy' needs 'frozen' statistics, got 'batch'")
    if feature_cache in ("hidden", "backbone"):
        raise ValueError(
            f"feature_cache: {feature_cache!r} needs fixed features, but second_phase='lazy' "
            "trains all layers; leave 'auto'"
        )
    return Lazy.of(lazy)
