"""Loss, accuracy and the user's metrics of a network over a whole data set."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..model.losses import ConvexLoss, correct
from ..model.network import Network
from .data.samples import BATCH, Samples
from .distributed.ranks import Ranks
from .features.cache import Features
from .metrics import Metrics, evaluate


class Measured(NamedTuple):
    """loss: the mean. accuracy: None where there are no labels. metrics: the user's own."""

    loss: float
    accuracy: float | None
    metrics: dict[str, float | None]


@torch.no_grad()
def measure(
    network: Network,
    loss: ConvexLoss,
    source: Samples | Features,
    ranks: Ranks | None = None,
    metrics: Metrics | None = None,
    batch_size: int = BATCH,
) -> Measured:
    """In evaluation mode.

    batch_size: rows that pass through the network at once.

    Each rank passes its own part of Samples through the network: every sample counts once.
    """
    model, ranks = network.model, ranks or Ranks()
    mode = model.training
    total, right, labelled = 0.0, 0, True
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])  # for the metrics
    model.eval()
    if isinstance(source, Features):
        batches = source.outputs(network, BATCH)
    else:
        own = source.batches(max(1, batch_size // source.each), ranks.shard(source.n))
        batches = ((model(x), y) for x, y in source.visit(own))
    rows = source.n if isinstance(source, Features) else source.rows
    for outputs, y in batches:
        if isinstance(source, Samples) and source.kept is not None:
            counted = source.counted(y)
            outputs, y = outputs[counted], y[counted]
            if not len(y):
                continue
        total += float(loss(outputs, y)) * len(y)
        if metrics:
            kept[0].append(outputs.cpu())
            kept[1].append(y.cpu())
        count = correct(loss, outputs, y)
        labelled = labelled and count is not None
        right += 0 if count is None else int(count)
    model.train(mode)
    if not isinstance(source, Features):
        sums = ranks.all_reduce_(torch.tensor([total, right], dtype=torch.float64, device="cpu"))
        total, right = float(sums[0]), int(sums[1])
        if metrics and ranks.size > 1:
            parts = ranks.all_gather_object(kept)
            kept = ([t for p in parts for t in p[0]], [t for p in parts for t in p[1]])
    found = evaluate(metrics or {}, loss, *kept)
    return Measured(total / rows, right / rows if labelled else None, found)
