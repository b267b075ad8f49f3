"""Analytic building blocks, and tools that make a network satisfy the theorem's premises."""

from .analytic import AnalyticReport, analytic, functional_calls
from .modules import Kind, classify
from .softplus import Softplus
from .widen import WideHead, widen

__all__ = [
    "AnalyticReport",
    "Kind",
    "Softplus",
    "WideHead",
    "analytic",
    "classify",
    "functional_calls",
    "widen",
]
