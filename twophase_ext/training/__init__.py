"""The two-phase trainer, one room per file.

trainer.py (the public class) -> engine.py (Algorithm 1's stages) -> head.py (a last-layer step),
features.py (the cache), data.py, batchnorm.py, freeze.py, checkpoint.py, runfolder.py, streams.py.
"""

from .losses import ConvexLoss
from .result import Result
from .streams import stream_seed
from .trainer import Trainer

__all__ = ["ConvexLoss", "Result", "Trainer", "stream_seed"]
