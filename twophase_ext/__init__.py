"""Two-phase training with a global-convergence guarantee (Kawaguchi & Sun, AAAI 2021)."""

from . import nn, ops, optim
from ._load import build_info
from .expressivity import Verdict, verify_expressivity
from .expressivity.rank_logdet import RankLogdet, rank_logdet
from .ops import gram_logdet, perturb_, softplus, softplus_
from .theory.assumptions import Assumptions, check_assumptions
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
    stream_seed,
)

__all__ = [
    "AcceleratedDescent",
    "Assumptions",
    "Callback",
    "ConvexLoss",
    "EpochSampler",
    "Exact",
    "FeatureCache",
    "Frozen",
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
    "gram_logdet",
    "guarantee",
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
