"""Whether training ended in a constant predictor, and why: in words."""

import torch
from torch import Tensor

from ..model.network import Network
from .data.samples import Samples

FIRST, AT_ONCE = 8, 256  # samples: the first few tell of a network that has not collapsed
SAME = 32  # eps, of the largest number


@torch.no_grad()
def collapse(network: Network, samples: Samples) -> str:
    """ "" unless the network gives all samples the same outputs in evaluation mode, to rounding.

    Such weights minimise nothing but the loss of a constant. Distinct inputs alone count: where
    there is one, any network is constant.
    """
    if samples.distinct < 2:
        return ""
    modes = {module: module.training for module in network.model.modules()}
    network.model.eval()
    try:
        some = torch.arange(min(FIRST, samples.n), device="cpu")
        x, _ = samples.fetch(some, augmented=False)
        first = _outputs(network, x)
        if not _same(first, first[:1]):
            return ""
        for more, _ in samples.in_order(AT_ONCE):
            if not _same(_outputs(network, more), first[:1]):
                return ""
        said = "it has collapsed: its outputs are the same for every training input"
        h = network.hidden(x)
        if float(h.abs().max()) <= torch.finfo(h.dtype).eps ** 2:
            return f"{said}, as all hidden features are 0 (dead units)"
        return f"{said}, as the hidden features are" if _same(h, h[:1]) else said
    finally:
        samples.close()
        for module, mode in modes.items():
            module.training = mode


def _outputs(network: Network, x: Tensor) -> Tensor:
    """[rows, k]."""
    outputs: Tensor = network.model(x)
    return outputs.reshape(-1, outputs.shape[-1])


def _same(rows: Tensor, first: Tensor) -> bool:
    """Whether all rows are the first, to rounding; NaN is not."""
    size = max(float(rows.abs().max()), float(first.abs().max()))
    return float((rows - first).abs().max()) <= SAME * torch.finfo(rows.dtype).eps * size
