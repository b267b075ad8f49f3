"""The expressivity condition (Assumption 1): rank [h_X', 1] = N, and what is known about it."""

from .verdict import Verdict, verify_expressivity, verify_network

__all__ = ["Verdict", "verify_expressivity", "verify_network"]
