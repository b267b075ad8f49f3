"""Loss and accuracy of a network over a whole data set."""

import torch

from ..losses import CROSS_ENTROPY, ConvexLoss
from ..network import Network
from .data import Samples
from .features import BATCH, Features


@torch.no_grad()
def measure(
    network: Network, loss: ConvexLoss, source: Samples | Features
) -> tuple[float, float | None]:
    """(mean loss, accuracy) in evaluation mode; accuracy None for other than cross-entropy."""
    model = network.model
    mode = model.training
    total, correct = 0.0, 0
    model.eval()
    for inputs, y in source.in_order(BATCH):
        outputs = network.logits(inputs) if isinstance(source, Features) else model(inputs)
        total += float(loss(outputs, y)) * len(y)
        if loss is CROSS_ENTROPY:
            correct += int((outputs.argmax(1) == y).sum())
    model.train(mode)
    return total / source.n, correct / source.n if loss is CROSS_ENTROPY else None
