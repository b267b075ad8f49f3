"""The two-phase trainer, one room per file.

trainer.py (the public class) -> engine.py (Algorithm 1's stages) -> head.py (a last-layer step),
lazy.py (Theorem 3's second phase), features.py (the cache), data.py, batchnorm.py, freeze.py,
checkpoint.py, runfolder.py, streams.py.
"""

from .config import Lazy
from .lazy import LazyGuarantee
from .losses import ConvexLoss
from .result import Result
from .streams import stream_seed
from .trainer import Trainer

__all__ = ["ConvexLoss", "Lazy", "LazyGuarantee", "Result", "Trainer", "stream_seed"]
