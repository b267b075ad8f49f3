"""The two-phase trainer, one room per file.

trainer.py (the public class) and branches.py (many second phases from one first one) -> engine.py
(Algorithm 1's stages) -> second_phase.py (Theorem 1's), lazy.py (Theorem 3's), audit.py (what
held) -> head.py (mini-batch steps), gradient.py (full gradients), features.py (the cache), data.py,
measure.py, batchnorm.py, freeze.py, saved.py, checkpoint.py, runfolder.py, settings.py, streams.py.
"""

from ..losses import ConvexLoss
from .lazy import LazyGuarantee
from .result import Result
from .settings import GradientDescent, Lazy, StochasticDescent
from .streams import stream_seed
from .trainer import Trainer

__all__ = [
    "ConvexLoss",
    "GradientDescent",
    "Lazy",
    "LazyGuarantee",
    "Result",
    "StochasticDescent",
    "Trainer",
    "stream_seed",
]
