"""Two-phase training with a global-convergence guarantee (Kawaguchi & Sun, AAAI 2021)."""

from ._load import build_info
from .ops import softplus, softplus_

__all__ = ["build_info", "softplus", "softplus_"]
