"""The expressivity condition as a run asks for it."""

import warnings
from typing import TYPE_CHECKING

from ..expressivity import Verdict, verify_network
from .features import BATCH

if TYPE_CHECKING:
    from .engine import Run


def verified(run: "Run", method: str) -> Verdict:
    """The verdict at the run's weights; "undecided" with the reason where the verification failed.

    Training is not lost for a proof that raised or that the memory does not hold.
    """
    network, bias = run.network, run.network.last.module.bias
    try:
        return verify_network(
            network,
            run.train.in_order(BATCH),
            n=run.train.n,
            method=method,
            batch_norm=run.config.batch_norm,
            training=True,
            say=run.progress.say,
        )
    except Exception as error:
        reason = f"the verification ended in {type(error).__name__}: {error}"
        warnings.warn(f"{reason}; training goes on", stacklevel=2)
        return Verdict(
            status="undecided",
            claim="at w",
            method="none",
            n=run.train.n,
            width=network.width,
            batch_norm=run.config.batch_norm,
            bias=bias is not None and bias.requires_grad,
            last_layer=network.last.name,
            asked=method,
            reason=reason,
        )
