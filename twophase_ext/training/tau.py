"""What happens to a model at tau, whoever trains it: noise, then statistics that move no more."""

from collections.abc import Mapping

from torch import Tensor

from .. import ops
from ..core.seeds import stream_seed
from ..model.network import Network
from . import batchnorm
from .data.samples import Samples
from .distributed.ranks import Ranks


def perturb(hidden: Mapping[str, Tensor], noise_std: float | dict[str, float], seed: int) -> None:
    """w_(1:H) <- w_(1:H) + sigma xi, xi ~ N(0, I) from the stream "noise" of `seed` (Algorithm 1).

    hidden: the hidden layers' parameters by name, in place. noise_std: sigma, one or by name.
    """
    if hidden:
        ops.perturb_(dict(hidden), noise_std, seed=stream_seed(seed, "noise"))


def fix_statistics(network: Network, samples: Samples, ranks: Ranks | None = None) -> None:
    """BatchNorm's statistics over all samples, then evaluation mode, in which they stay."""
    batchnorm.recalibrate_over(network, samples, ranks)
    network.model.eval()
