"""The noise of tau, whoever trains the model; batchnorm.py has what follows it."""

from collections.abc import Mapping

from torch import Tensor

from .. import ops
from ..core.seeds import stream_seed


def perturb(hidden: Mapping[str, Tensor], noise_std: float | dict[str, float], seed: int) -> None:
    """w_(1:H) <- w_(1:H) + sigma xi, xi ~ N(0, I) from the stream "noise" of `seed` (Algorithm 1).

    hidden: the hidden layers' parameters by name, in place. noise_std: sigma, one or by name.
    """
    if hidden:
        ops.perturb_(dict(hidden), noise_std, seed=stream_seed(seed, "noise"))
