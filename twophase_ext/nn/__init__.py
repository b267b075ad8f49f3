"""Building blocks that make a model meet the premises: exact softplus, analytic, wide."""

from ..model.rows import Rows
from ..model.softplus import Softplus
from ..model.surgery.analytic import AnalyticReport, Finding, Replacement, analytic, classify
from ..model.surgery.plain import plain
from ..model.surgery.smooth import (
    SmoothGlobalMaxPool,
    SmoothHardsigmoid,
    SmoothHardswish,
    SmoothHardtanh,
    SmoothLeakyReLU,
    SmoothMaxPool,
    SmoothPReLU,
)
from ..model.surgery.widen import WideHead, wide_units, widen

__all__ = [
    "AnalyticReport",
    "Finding",
    "Replacement",
    "Rows",
    "SmoothGlobalMaxPool",
    "SmoothHardsigmoid",
    "SmoothHardswish",
    "SmoothHardtanh",
    "SmoothLeakyReLU",
    "SmoothMaxPool",
    "SmoothPReLU",
    "Softplus",
    "WideHead",
    "analytic",
    "classify",
    "plain",
    "wide_units",
    "widen",
]
