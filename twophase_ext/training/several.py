"""What several processes can train together, asked before the first step."""

import torch

from ..core.hashing import tensors_hash
from .context import Context
from .steps.sharded import check_hooks, check_optimizer

ALONE = ("lazy", "agd", "exact")  # second phases of one process


def check_several(context: Context, mode: str) -> None:
    """Raise ValueError for what several processes do not train; one process trains everything.

    mode: the feature cache of the second phase. RuntimeError where the processes were not given the
    same arguments and data.
    """
    ranks, phase = context.ranks, context.config.second_phase
    if ranks.size == 1:
        return
    if context.train.each > 1 or context.train.kept is not None:
        raise ValueError(
            "train: expected one output and a label that counts for each sample on several "
            f"processes, got {context.train.rows} outputs that count of {context.train.n} samples"
        )
    for name, value in context.identity().items():
        ranks.agree(name, value)
    x, y = context.train.fetch(torch.arange(min(2, context.train.n), device="cpu"), augmented=False)
    ranks.agree("train: SHA-256 of the first samples", tensors_hash({"x": x, "y": y}))
    if context.compiled is not None:
        raise ValueError(f"compile: expected False on several processes, got {context.compiled}")
    if phase in ALONE:
        raise ValueError(f"second_phase: {phase!r} runs in one process, got {ranks.size} processes")
    check_hooks(context.optimizer)
    if phase == "none":
        return
    check_optimizer(context.optimizer)
    if mode == "none":
        raise ValueError(
            "feature_cache: expected cached features in the second phase on several processes, got "
            "'none'. Random transforms (without augment_copies), batch_norm='batch' and too little "
            "memory exclude a cache"
        )
