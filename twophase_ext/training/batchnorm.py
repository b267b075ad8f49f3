"""BatchNorm statistics: recomputed once after the perturbation, then constants of the network."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..model.network import Network
from .data.samples import BATCH, Samples
from .distributed.ranks import Ranks


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of the model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def train(model: nn.Module, *, keep: bool) -> None:
    """Training mode; keep: not of BatchNorm, whose running statistics stay constants."""
    model.train()
    for layer in batch_norms(model).values() if keep else ():
        layer.eval()


def pretrained(model: nn.Module) -> bool:
    """Whether the model has BatchNorm layers and all of their parameters are frozen.

    Such layers are somebody else's: their statistics belong to their weights.
    """
    own = [list(layer.parameters()) for layer in batch_norms(model).values()]
    return bool(own) and all(ps and not any(p.requires_grad for p in ps) for ps in own)


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    forward: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    ranks: Ranks | None = None,
) -> None:
    """Set every BatchNorm's running statistics to the mean over `batches`.

    The rule of torch.optim.swa_utils.update_bn: statistics reset, momentum None (the plain mean of
    the batches' statistics), each batch passed once. Here only the BatchNorm layers are in training
    mode while it runs, so that dropout does not add noise to the statistics; the caller's modes and
    momenta come back afterwards. `forward` is called on each batch's inputs. A batch's statistics
    depend on no other batch: each rank passes its own, and the mean is over those of all ranks.
    """
    layers = list(batch_norms(model).values())
    if not layers:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.eval()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        for x, _ in batches:
            forward(x)
        if ranks is not None and ranks.size > 1:
            for layer in layers:
                _mean_of_all(layer, ranks)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def recalibrate_over(network: Network, samples: Samples, ranks: Ranks | None = None) -> None:
    """`recalibrate` over the samples in index order, BATCH at a time: what happens at tau.

    With ranks, each passes every size-th batch, and all get the mean over all batches.
    """
    ranks = ranks or Ranks()
    forward = network.backbone if network.wide is not None else network.hidden
    own = samples.batches(BATCH)[ranks.rank :: ranks.size]
    recalibrate(network.model, forward, samples.visit(own), ranks)


def batch_bounds(model: nn.Module, n: int, size: int) -> list[int]:
    """Step s of an epoch takes the samples bounds[s] to bounds[s + 1] - 1 of its order.

    BatchNorm has no variance over one sample: with it a last batch of one joins the one before.
    """
    starts = list(range(0, n, size))
    if len(starts) > 1 and n - starts[-1] == 1 and batch_norms(model):
        starts.pop()
    return [*starts, n]


def _mean_of_all(layer: _BatchNorm, ranks: Ranks) -> None:
    statistics = [t for t in (layer.running_mean, layer.running_var) if t is not None]
    count = layer.num_batches_tracked
    if count is None:
        return
    for statistic in statistics:
        ranks.all_reduce_(statistic.mul_(count))
    ranks.all_reduce_(count)
    for statistic in statistics:
        statistic.div_(count)


def check_freezable(model: nn.Module) -> None:
    """Raise ValueError where a BatchNorm layer has no running statistics to freeze."""
    for name, layer in batch_norms(model).items():
        if layer.running_mean is None:
            raise ValueError(
                f"batch_norm: {name} was made with track_running_stats=False and has no statistics "
                "to freeze; make it with track_running_stats=True, or pass batch_norm='batch'"
            )
