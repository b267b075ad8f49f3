"""Two-phase training with a global-convergence guarantee (Kawaguchi & Sun, AAAI 2021)."""

from . import nn, ops, optim
from ._load import build_info
from .assumptions import Assumptions, check_assumptions
from .expressivity import Verdict, verify_expressivity
from .ops import gram_logdet, perturb_, softplus, softplus_
from .training import ConvexLoss, Result, Trainer, stream_seed

__all__ = [
    "Assumptions",
    "ConvexLoss",
    "Result",
    "Trainer",
    "Verdict",
    "build_info",
    "check_assumptions",
    "gram_logdet",
    "nn",
    "ops",
    "optim",
    "perturb_",
    "softplus",
    "softplus_",
    "stream_seed",
    "verify_expressivity",
]
