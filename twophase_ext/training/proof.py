"""The expressivity condition as a run asks for it."""

import warnings

from ..expressivity import Verdict, verify_network
from .context import Context
from .data.samples import BATCH


def verified(context: Context, method: str) -> Verdict:
    """The verdict at these weights; "undecided" with the reason where the verification failed.

    Training is not lost for a proof that raised or that the memory does not hold.
    """
    network, bias = context.network, context.network.last.module.bias
    family = "frozen" if context.config.fixed_statistics else "batch"
    try:
        return verify_network(
            network,
            context.train.in_order(max(1, BATCH // context.train.each)),
            n=context.train.n,
            kept=context.train.kept,
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
            n=context.train.rows,
            width=network.width,
            batch_norm=family,
            bias=bias is not None and bias.requires_grad,
            last_layer=network.last.name,
            asked=method,
            reason=reason,
        )
