"""The Trainer's arguments, checked and resolved."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from ..core.arguments import integer
from ..core.names import canonical_name
from ..expressivity.verify import METHODS
from .features.cache import MODES
from .optimizer.schedule import INTERVALS
from .settings import GradientDescent, Lazy, Settings, StochasticDescent

SETTINGS: dict[str, type[Settings]] = {
    "gd": GradientDescent,
    "sgd": StochasticDescent,
    "lazy": Lazy,
}
_SIGMAS = torch.finfo(torch.float32)
_LARGEST_SIGMA = _SIGMAS.max**0.5 / 16  # sums of squares of noisy weights stay finite
# of weights and data, and of autocast in the first phase
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "fp16-mixed": (torch.float32, torch.float16),
}


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
    noise_seed: int | None = None  # None: the noise comes from `seed`
    augment: str | None = None  # its repr
    augment_copies: int | None = None
    accumulate: int = 1
    scheduler_interval: str = "epoch"
    # settings of these second phases, None in the others
    gd: GradientDescent | None = None
    sgd: StochasticDescent | None = None
    lazy: Lazy | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and data."""
        return PRECISIONS[self.precision][0]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The 16-bit dtype of the first phase's products, where the precision is mixed."""
        return PRECISIONS[self.precision][1]

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which the first phase runs the model."""
        dtype = self.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

    def as_dict(self) -> dict[str, Any]:
        """For config.json and for the comparison with a checkpoint's."""
        return asdict(self)


def _choice(name: str, value: Any, choices: Any) -> str:
    if not isinstance(value, str) or value not in choices:
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


def resolve_noise(noise_std: Any) -> float | dict[str, float]:
    """One sigma, or one for each name, each > 0; TypeError or ValueError otherwise."""
    entries = noise_std.items() if isinstance(noise_std, dict) else [("noise_std", noise_std)]
    for name, sigma in entries:
        given: Any = sigma
        if isinstance(sigma, bool) or not isinstance(sigma, Real):
            raise TypeError(f"noise_std: expected a number for {name}, got {sigma!r}")
        if not _SIGMAS.tiny <= given <= _LARGEST_SIGMA:
            raise ValueError(
                f"noise_std: expected a number > 0 for {name} (the Gaussian must not be "
                f"degenerate) whose squares are in float32's range, at most {_LARGEST_SIGMA:.2g}, "
                f"got {sigma}"
            )
    if isinstance(noise_std, dict):
        return {canonical_name(str(name)): float(sigma) for name, sigma in noise_std.items()}
    return float(noise_std)


def resolve(
    *,
    second_phases: Collection[str],
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
    noise_seed: Any = None,
    augment: Any = None,
    augment_copies: Any = None,
    accumulate: Any = 1,
    scheduler_interval: Any = "epoch",
    gd: Any = None,
    sgd: Any = None,
    lazy: Any = None,
) -> Config:
    """Check every argument; TypeError or ValueError names the first one that is wrong.

    second_phases: the names that there are (`phases.SECOND`).
    """
    epochs = integer("epochs", epochs, 2)
    second_phase = _choice("second_phase", second_phase, second_phases)
    if augment is not None and not callable(augment):
        raise TypeError(f"augment: expected a callable (x, generator) -> x, got {augment!r}")
    if verify is not False and verify not in METHODS:
        raise ValueError(f"verify: expected False or one of {METHODS}, got {verify!r}")
    config = Config(
        loss=loss,
        epochs=epochs,
        tau_epoch=resolve_tau(tau, epochs),
        noise_std=resolve_noise(noise_std),
        second_phase=second_phase,
        batch_norm=_choice("batch_norm", batch_norm, ("frozen", "batch")),
        feature_cache=_choice("feature_cache", feature_cache, MODES),
        batch_size=integer("batch_size", batch_size, 1),
        seed=integer("seed", seed, -(2**63)),
        precision=_choice("precision", precision, PRECISIONS),
        verify=verify,
        noise_seed=None if noise_seed is None else integer("noise_seed", noise_seed, -(2**63)),
        augment=None if augment is None else repr(augment),
        augment_copies=(
            None if augment_copies is None else integer("augment_copies", augment_copies, 1)
        ),
        accumulate=integer("accumulate", accumulate, 1),
        scheduler_interval=_choice("scheduler_interval", scheduler_interval, INTERVALS),
        **_settings(second_phase, {"gd": gd, "sgd": sgd, "lazy": lazy}),
    )
    _check_combination(config)
    return config


def _settings(second_phase: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of this second phase; ValueError for those of another."""
    for name, settings in given.items():
        if name != second_phase and settings is not None:
            raise ValueError(
                f"{name}: expected None with second_phase={second_phase!r}, got {settings}"
            )
    if second_phase not in SETTINGS:
        return {}
    return {second_phase: SETTINGS[second_phase].of(second_phase, given[second_phase])}


def compile_options(value: Any, model: nn.Module) -> dict[str, Any] | None:
    """torch.compile's arguments for the Trainer's `compile`; None where nothing is compiled."""
    if value is False:
        return None
    if value is not True and not isinstance(value, Mapping):
        raise TypeError(f"compile: expected a bool or a dict of options, got {value!r}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("compile: the model is compiled already; expected False")
    return {} if value is True else dict(value)


def _check_combination(config: Config) -> None:
    """ValueError for arguments that contradict each other."""
    mode = config.second_phase
    if config.accumulate > config.batch_size:
        raise ValueError(
            f"accumulate: expected at most batch_size = {config.batch_size} micro-batches, got "
            f"{config.accumulate}"
        )
    if mode in SETTINGS and config.batch_norm == "batch":
        raise ValueError(
            f"batch_norm: second_phase={mode!r} needs 'frozen' statistics, got 'batch'"
        )
    if mode == "lazy":
        if config.verify is False:
            raise ValueError("verify: second_phase='lazy' needs the rank verified, got False")
        if config.feature_cache not in ("auto", "none"):
            raise ValueError(
                f"feature_cache: {config.feature_cache!r} needs fixed features, but "
                "second_phase='lazy' trains all layers; leave 'auto'"
            )
    if config.augment_copies is not None and (
        mode in ("lazy", "none") or config.feature_cache == "none" or config.batch_norm == "batch"
    ):
        raise ValueError(
            f"augment_copies: {config.augment_copies} copies of the features are cached, which "
            "second_phase='lazy' or 'none', feature_cache='none' and batch_norm='batch' exclude"
        )
