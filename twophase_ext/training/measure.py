"""Loss and accuracy of a network over a whole data set."""

import torch

from ..model.losses import ConvexLoss, correct
from ..model.network import Network
from .data.samples import BATCH, Samples
from .distributed.ranks import Ranks
from .features.cache import Features


@torch.no_grad()
def measure(
    network: Network, loss: ConvexLoss, source: Samples | Features, ranks: Ranks | None = None
) -> tuple[float, float | None]:
    """(mean loss, accuracy) in evaluation mode; accuracy None where there are no labels.

    Each rank passes its own part of Samples through the network: every sample counts once.
    """
    model, ranks = network.model, ranks or Ranks()
    mode = model.training
    total, right, labelled = 0.0, 0, True
    model.eval()
    if isinstance(source, Features):
        batches = source.outputs(network, BATCH)
    else:
        own = source.batches(BATCH, ranks.shard(source.n))
        batches = ((model(x), y) for x, y in source.visit(own))
    for outputs, y in batches:
        total += float(loss(outputs, y)) * len(y)
        count = correct(loss, outputs, y)
        labelled = labelled and count is not None
        right += 0 if count is None else int(count)
    model.train(mode)
    if not isinstance(source, Features):
        sums = ranks.all_reduce_(torch.tensor([total, right], dtype=torch.float64, device="cpu"))
        total, right = float(sums[0]), int(sums[1])
    return total / source.n, right / source.n if labelled else None
