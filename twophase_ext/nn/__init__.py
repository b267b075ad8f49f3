"""Building blocks that make a model meet the premises: exact softplus, analytic, wide."""

from .analytic import AnalyticReport, Finding, Replacement, analytic, classify
from .plain import plain
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
    "plain",
    "wide_units",
    "widen",
]
