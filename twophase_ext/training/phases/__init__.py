"""The phases of a run; a new second phase is a file here and a line below."""

from .accelerated import AcceleratedPhase
from .exact import ExactPhase
from .first import FirstPhase
from .gradient_descent import GradientDescentPhase
from .last_layer import LastLayer
from .lazy import LazyPhase
from .phase import Phase, SecondPhase
from .stochastic import StochasticPhase

SECOND: dict[str, type[SecondPhase]] = {
    "none": SecondPhase,
    "base": LastLayer,
    "gd": GradientDescentPhase,
    "agd": AcceleratedPhase,
    "exact": ExactPhase,
    "sgd": StochasticPhase,
    "lazy": LazyPhase,
}

__all__ = ["SECOND", "FirstPhase", "Phase", "SecondPhase"]
