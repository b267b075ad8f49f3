"""Loss and accuracy of a network over a whole data set."""

import torch

from ..model.losses import CROSS_ENTROPY, ConvexLoss
from ..model.network import Network
from .data.samples import BATCH, Samples
from .distributed.ranks import Ranks
from .features.cache import Features


@torch.no_grad()
def measure(
    network: Network, loss: ConvexLoss, source: Samples | Features, ranks: Ranks | None = None
) -> tuple[float, float | None]:
    """(mean loss, accuracy) in evaluation mode; accuracy None for other than cross-entropy.

    Each rank passes its own part of Samples through the network: every sample counts once.
    """
    model, ranks = network.model, ranks or Ranks()
    mode = model.training
    total, correct = 0.0, 0
    model.eval()
    if isinstance(source, Features):
        batches = source.outputs(network, BATCH)
    else:
        own = source.batches(max(1, BATCH // source.each), ranks.shard(source.n))
        batches = ((model(x), y) for x, y in source.visit(own))
    rows = source.n if isinstance(source, Features) else source.rows
    for outputs, y in batches:
        if isinstance(source, Samples) and source.kept is not None:
            counted = source.counted(y)
            outputs, y = outputs[counted], y[counted]
            if not len(y):
                continue
        total += float(loss(outputs, y)) * len(y)
        if loss is CROSS_ENTROPY:
            correct += int((outputs.argmax(1) == y).sum())
    model.train(mode)
    if not isinstance(source, Features):
        sums = ranks.all_reduce_(torch.tensor([total, correct], dtype=torch.float64, device="cpu"))
        total, correct = float(sums[0]), int(sums[1])
    return total / rows, correct / rows if loss is CROSS_ENTROPY else None
