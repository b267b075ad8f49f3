"""The Trainer's arguments, checked and resolved."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from ..core.arguments import integer
from ..core.names import canonical_name
from ..expressivity.verify import METHODS
from ..model.losses import resolve_loss
from .features.cache import MODES
from .optimizer.schedule import INTERVALS
from .settings import (
    AcceleratedDescent,
    Exact,
    GradientDescent,
    Lazy,
    Settings,
    StochasticDescent,
)

SETTINGS: dict[str, type[Settings]] = {
    "gd": GradientDescent,
    "agd": AcceleratedDescent,
    "exact": Exact,
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


def _choice(name: str, value: Any, choices: Any) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {sorted(choices)}, got {value!r}")
    return str(value)


def resolve_tau(tau: Any, epochs: int, least: int = 0) -> int:
    """The first epoch of the second phase: round(tau * epochs), kept within 1..epochs - 1; or 0.

    tau: a fraction in (0, 1), an epoch number in 1..epochs - 1, or 0 where least is: then there is
    no first phase. ValueError otherwise.
    """
    if isinstance(tau, bool) or not isinstance(tau, Real):
        raise TypeError(f"tau: expected a fraction of the epochs or an epoch, got {tau!r}")
    if isinstance(tau, Integral):
        tau = int(tau)
        if not least <= tau <= epochs - 1:
            raise ValueError(f"tau: expected an epoch in {least}..{epochs - 1}, got {tau}")
        return tau
    tau = float(tau)
    if tau == least == 0:
        return 0
    if not 0 < tau < 1:
        raise ValueError(f"tau: expected a fraction in (0, 1), got {tau}")
    if epochs < 2:
        raise ValueError(
            f"epochs: expected 2 or more with two phases, got {epochs}; tau=0 has no first phase"
        )
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


def _option(check: Callable[[str, Any], Any], branch: str | None = None, **default: Any) -> Any:
    """A field of Config. check(name, value): the value resolved; TypeError or ValueError name it.

    branch: "own" where branches of one first phase may differ in it, "features" where their
    features then differ too.
    """
    return field(metadata={"check": check, "branch": branch}, **default)


def _integer(least: int, optional: bool = False) -> Callable[[str, Any], int | None]:
    return lambda name, value: None if optional and value is None else integer(name, value, least)


def _one_of(*choices: Any) -> Callable[[str, Any], Any]:
    return lambda name, value: _choice(name, value, choices)


def _settings(name: str, value: Any) -> Settings | None:
    return None if value is None else SETTINGS[name].of(name, value)


def _augment(name: str, value: Any) -> str | None:
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a callable (x, generator) -> x, got {value!r}")
    return None if value is None else repr(value)


def _verify(name: str, value: Any) -> str | bool:
    if value is not False and value not in METHODS:
        raise ValueError(f"{name}: expected False or one of {METHODS}, got {value!r}")
    return value


@dataclass(frozen=True)
class Config:
    """Plain data that, with the model and the data, determines a run.

    Each field is an argument of the Trainer of its name, checked as its field says, but for
    tau_epoch, which is `resolve_tau` of tau.
    """

    loss: str = _option(lambda _, value: resolve_loss(value).name)
    epochs: int = _option(_integer(1), "own")
    tau_epoch: int = _option(lambda _, value: value)
    noise_std: float | dict[str, float] = _option(lambda _, value: resolve_noise(value), "features")
    second_phase: str = _option(lambda _, value: value, "own")
    batch_norm: str = _option(_one_of("frozen", "kept", "batch"), "features")
    feature_cache: str = _option(_one_of(*MODES), "features")
    batch_size: int = _option(_integer(1))
    seed: int = _option(_integer(-(2**63)))
    precision: str = _option(_one_of(*PRECISIONS))
    verify: str | bool = _option(_verify, "own")
    # None: the noise comes from `seed`
    noise_seed: int | None = _option(_integer(-(2**63), optional=True), "features", default=None)
    augment: str | None = _option(_augment, default=None)  # its repr
    augment_copies: int | None = _option(_integer(1, optional=True), "features", default=None)
    accumulate: int = _option(_integer(1), default=1)
    scheduler_interval: str = _option(_one_of(*INTERVALS), default="epoch")
    # settings of these second phases, None in the others
    gd: GradientDescent | None = _option(_settings, "own", default=None)
    agd: AcceleratedDescent | None = _option(_settings, "own", default=None)
    exact: Exact | None = _option(_settings, "own", default=None)
    sgd: StochasticDescent | None = _option(_settings, "own", default=None)
    lazy: Lazy | None = _option(_settings, "own", default=None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and data."""
        return PRECISIONS[self.precision][0]

    @property
    def fixed_statistics(self) -> bool:
        """Whether BatchNorm's statistics are constants of the network from tau on."""
        return self.batch_norm != "batch"

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


def resolve(
    given: Mapping[str, Any], second_phases: Collection[str], pretrained: bool = False
) -> Config:
    """Check the Trainer's arguments; TypeError or ValueError names the first one that is wrong.

    given: an argument for each field. second_phases: the names that there are (`phases.SECOND`).
    pretrained: whether BatchNorm's statistics are somebody else's at any tau (batchnorm.py).
    """
    found: dict[str, Any] = {"epochs": integer("epochs", given["epochs"], 1)}
    phase = _choice("second_phase", given["second_phase"], second_phases)
    tau = resolve_tau(given["tau"], found["epochs"])
    values = {**given, "second_phase": phase, "tau_epoch": tau}
    if given["batch_norm"] is None:
        kept = pretrained or (tau == 0 and phase != "none")
        values["batch_norm"] = "kept" if kept else "frozen"
    for name in SETTINGS:
        if name != phase and values[name] is not None:
            raise ValueError(
                f"{name}: expected None with second_phase={phase!r}, got {values[name]}"
            )
    if phase in SETTINGS and values[phase] is None:
        values[phase] = {}
    for option in fields(Config):
        found[option.name] = option.metadata["check"](option.name, values[option.name])
    config = Config(**found)
    _check_combination(config)
    return config


def differing(kind: str) -> list[str]:
    """Fields in which branches of one first phase may differ: "own", or "features" theirs too."""
    return [option.name for option in fields(Config) if option.metadata["branch"] == kind]


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
    if mode in SETTINGS and not config.fixed_statistics:
        raise ValueError(
            f"batch_norm: second_phase={mode!r} needs 'frozen' or 'kept' statistics, got 'batch'"
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
        mode in ("lazy", "none") or config.feature_cache == "none" or not config.fixed_statistics
    ):
        raise ValueError(
            f"augment_copies: {config.augment_copies} copies of the features are cached, which "
            "second_phase='lazy' or 'none', feature_cache='none' and batch_norm='batch' exclude"
        )
