"""Building blocks that make a model meet the premises: exact softplus, analytic, wide."""

from .analytic import AnalyticReport, Finding, Replacement, analytic, classify
from .softplus import Softplus
from .widen import WideHead, wide_units, widen

__all__ = [
    "AnalyticReport",
    "Finding",
    "Replacement",
    "Softplus",
    "WideHead",
    "analytic",
    "classify",
    "wide_units",
    "widen",
]
