"""The two-phase trainer.

loop.py is Algorithm 1; trainer.py builds what it works with (context.py) and where it stands
(state.py); phases/ has what trains an epoch. docs/architecture.md has the picture.
"""

from ..core.seeds import EpochSampler, stream_seed
from ..model.losses import ConvexLoss
from ..theory.lazy_guarantee import LazyGuarantee
from .callbacks import Callback, RunView
from .freeze import Frozen, freeze
from .load import load_run
from .own_loop import FeatureCache, fit_last_layer
from .result import Result
from .settings import AcceleratedDescent, Exact, GradientDescent, Lazy, StochasticDescent
from .trainer import Trainer

__all__ = [
    "AcceleratedDescent",
    "Callback",
    "ConvexLoss",
    "EpochSampler",
    "Exact",
    "FeatureCache",
    "Frozen",
    "GradientDescent",
    "Lazy",
    "LazyGuarantee",
    "Result",
    "RunView",
    "StochasticDescent",
    "Trainer",
    "fit_last_layer",
    "freeze",
    "load_run",
    "stream_seed",
]
