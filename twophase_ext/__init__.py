"""Two-phase training with a global-convergence guarantee (Kawaguchi & Sun, AAAI 2021)."""

from . import nn
from ._load import build_info
from .expressivity import Verdict, verify_expressivity
from .ops import softplus, softplus_

__all__ = [
    "Verdict",
    "build_info",
    "nn",
    "softplus",
    "softplus_",
    "verify_expressivity",
]
