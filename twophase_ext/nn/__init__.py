"""Building blocks that make a model meet the premises: exact softplus, analytic, wide."""

from ..model.softplus import Softplus
from ..model.surgery.analytic import AnalyticReport, Finding, Replacement, analytic, classify
from ..model.surgery.plain import plain
from ..model.surgery.widen import WideHead, wide_units, widen

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
