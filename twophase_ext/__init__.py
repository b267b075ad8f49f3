"""Two-phase training with a global-convergence guarantee (Kawaguchi & Sun, AAAI 2021)."""

from importlib import import_module  # noqa: TID251  of one name
from typing import Any

from . import nn, ops, optim
from ._load import build_info
from .expressivity import Verdict, verify_expressivity
from .expressivity.rank_logdet import RankLogdet, rank_logdet
from .ops import gram_logdet, perturb_, softplus, softplus_
from .theory.assumptions import Assumptions, check_assumptions
from .theory.construction import GlobalMinimum, global_minimum
from .theory.floor import LossFloor, loss_floor
from .theory.guarantee import Guarantee, guarantee
from .theory.ntk import NtkRank, ntk_rank
from .training import (
    AcceleratedDescent,
    Callback,
    ConvexLoss,
    EpochSampler,
    Exact,
    FeatureCache,
    Frozen,
    GradientDescent,
    Lazy,
    LazyGuarantee,
    Result,
    RunView,
    StochasticDescent,
    Trainer,
    fit_last_layer,
    freeze,
    load_run,
    stream_seed,
)

__version__ = str(build_info()["version"])

__all__ = [
    "AcceleratedDescent",
    "Assumptions",
    "Callback",
    "ConvexLoss",
    "EpochSampler",
    "Exact",
    "FeatureCache",
    "Frozen",
    "GlobalMinimum",
    "GradientDescent",
    "Guarantee",
    "Lazy",
    "LazyGuarantee",
    "LossFloor",
    "NtkRank",
    "RankLogdet",
    "Result",
    "RunView",
    "StochasticDescent",
    "Trainer",
    "Verdict",
    "build_info",
    "check_assumptions",
    "fit_last_layer",
    "freeze",
    "global_minimum",
    "gram_logdet",
    "guarantee",
    "load_run",
    "loss_floor",
    "nn",
    "ntk_rank",
    "ops",
    "optim",
    "perturb_",
    "rank_logdet",
    "softplus",
    "softplus_",
    "stream_seed",
    "verify_expressivity",
]


def __getattr__(name: str) -> Any:
    """`sklearn`, whose package is optional."""
    if name == "sklearn":
        return import_module(f"{__name__}.sklearn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
