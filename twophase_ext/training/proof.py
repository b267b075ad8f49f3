"""The expressivity condition as a run asks for it."""

import warnings

from ..expressivity import Verdict, verify_network
from .context import Context
from .data.samples import BATCH


def verified(context: Context, method: str) -> Verdict:
    """The verdict at these weights; "undecided" with the reason where the verification failed.

    Training is not lost for a proof that raised or that the memory does not hold.
    """
    network, train, bias = context.network, context.train, context.network.last.module.bias
    family = "frozen" if context.config.fixed_statistics else "batch"
    try:
        return verify_network(
            network,
            ((x, train.unweighted(y)) for x, y in train.in_order(max(1, BATCH // train.each))),
            n=train.n,
            kept=train.kept,
            method=method,
            batch_norm=family,
            training=True,
            say=context.progress.say,
        )
    except Exception as error:
        reason = f"the verification ended in {type(error).__name__}: {error}"
        warnings.warn(f"{reason}; training goes on", stacklevel=2)
        return Verdict(
            status="undecided",
            claim="at w",
            method="none",
            n=train.rows,
            width=network.width,
            batch_norm=family,
            bias=bias is not None and bias.requires_grad,
            last_layer=network.last.name,
            asked=method,
            reason=reason,
        )
