"""The two-phase trainer, one room per file.

trainer.py (the public class) and branches.py (many second phases from one first one) -> engine.py
(Algorithm 1's stages) -> second_phase.py (Theorem 1's), lazy.py (Theorem 3's), audit.py (what
held) -> first_step.py (the base algorithm's step), optimizers.py, schedule.py, head.py (mini-batch
steps), gradient.py (full gradients), features.py (the cache), data.py, measure.py, batchnorm.py,
freeze.py, saved.py, checkpoint.py, runfolder.py, settings.py, streams.py.
own_loop.py gives the pieces to a loop that is not the Trainer's.
On several processes: ranks.py (what they tell each other), data_parallel.py (first phase),
columns.py (second phase).
"""

from ..core.seeds import EpochSampler, stream_seed
from ..model.losses import ConvexLoss
from .freeze import Frozen, freeze
from .own_loop import FeatureCache, fit_last_layer
from .phases.lazy import LazyGuarantee
from .result import Result
from .settings import GradientDescent, Lazy, StochasticDescent
from .trainer import Trainer

__all__ = [
    "ConvexLoss",
    "EpochSampler",
    "FeatureCache",
    "Frozen",
    "GradientDescent",
    "Lazy",
    "LazyGuarantee",
    "Result",
    "StochasticDescent",
    "Trainer",
    "fit_last_layer",
    "freeze",
    "stream_seed",
]
