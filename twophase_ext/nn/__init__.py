"""Analytic building blocks."""

from .softplus import Softplus

__all__ = ["Softplus"]
