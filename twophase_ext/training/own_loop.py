"""The Trainer's second phase in a loop of your own: cached features, and the last layer over them.

`freeze` (freeze.py) comes before.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import optim
from ..core.arguments import integer
from ..core.seeds import epoch_order
from ..model import layers
from ..model.calling import dismiss, serve
from ..model.losses import ConvexLoss, resolve_loss
from ..model.network import Network
from .batchnorm import batch_bounds
from .control.interrupt import Interrupt
from .data.samples import BATCH
from .features.agreement import cache_disagreement
from .features.cache import Features, plan_for
from .freeze import serving
from .optimizer.averaged import Averaged
from .steps.last_layer import LastLayerStep

_PAPER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5}  # section 7.2


class FeatureCache(Features):
    """h(x_i), the input of the last layer, and y_i of all training samples of a frozen network.

    `batch(index)` gives (h [b, m_H], y) of the samples `index` (int64), `in_order(size)` batches of
    all; `mode` is what is cached, `bytes` its size, `n` the number of samples. Where the model
    gives an output for every token or pixel, those whose label counts (not -100) are the samples.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        mode: str = "auto",
        last_layer: nn.Module | str | None = None,
        loss: str | ConvexLoss = "cross_entropy",
    ) -> None:
        """Compute the features, 256 samples at a time.

        model: frozen by `tp.freeze`, or in evaluation mode. data: (x, y), a Dataset or a
        DataLoader, as `Trainer.fit` takes them. mode: the Trainer's `feature_cache`: "auto" (the
        first that fits into memory), "hidden" (h), "backbone" (the input of the wide layer),
        "disk", "hidden-bfloat16" (h rounded), "none" (recomputed at every step; the only mode for
        inputs that change from visit to visit). loss: what y is checked and converted for.

        Raises ValueError or TypeError that name the argument: a model in training mode, data that
        do not fit model or loss, a mode that cannot be had, samples that change from visit to
        visit, a model whose outputs are not the last layer's of these features in every batch.
        """
        self.loss = resolve_loss(loss)
        require_eval(model)
        with serving(model, data, "data") as samples, samples.held():
            self._example = samples.example()
            network = Network(model, self._example, last_layer)
            samples.prepare(self.loss, network.outputs, network.last.rows)
            self.loss = samples.objective
            mode = plan_for(network, [samples], mode, name="mode").mode
            super().__init__(samples, network, mode)
            if mode in ("none", "hidden-bfloat16"):
                return
            evidence = cache_disagreement(self, network, BATCH // 4)
        evidence = samples.changed if samples.random else evidence
        if evidence:
            raise ValueError(
                f"model: its features are not fixed, {evidence}; mode='none' computes them at "
                "every step"
            )

    def _hidden(self, x: Tensor) -> Tensor:
        """Of the model as its owner left it: other calls of it get what it gives by itself."""
        serve(self.network.model, self.samples.packing, self._example)
        try:
            return super()._hidden(x)
        finally:
            dismiss(self.network.model)


def require_eval(model: nn.Module) -> None:
    """Raise ValueError where a module is in training mode."""
    awake = [name or "the model" for name, m in model.named_modules() if m.training]
    if awake:
        raise ValueError(
            f"model: expected evaluation mode (tp.freeze makes it stay), but {awake[0]} is in "
            f"training mode ({len(awake)} such modules)"
        )


@torch.inference_mode(False)
def fit_last_layer(
    model: nn.Module,
    cache: FeatureCache,
    *,
    epochs: int,
    first_epoch: int = 0,
    batch_size: int = 64,
    seed: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the last layer over cached features: second_phase="base" of the Trainer, its bits.

    model: the cache's model, a copy of it, or an nn.Linear of your own; its last layer is changed
    in place. Epochs first_epoch to first_epoch + epochs - 1 are run, each in the order that the
    Trainer gives that epoch under `seed`. optimizer: one that holds the layer's parameters; its
    hyper-parameters and its state (momentum) are used and updated, its other parameters stay (a
    schedule-free one is left in eval mode; call its eval() before `freeze`). Without it SGD with
    lr, momentum and weight_decay, by default the paper's 0.01, 0.9 and 1e-5, momentum from 0.

    Returns each epoch's mean loss, the losses being those before each update; on_epoch(epoch, loss)
    is called as each one ends. Ctrl-C lets the epoch in progress end and then raises
    KeyboardInterrupt; a second one raises at once.

    Raises ValueError or TypeError that name the argument, before anything has changed;
    RuntimeError where loss or weights are no longer finite.
    """
    epochs, first_epoch = integer("epochs", epochs, 1), integer("first_epoch", first_epoch, 0)
    seed = integer("seed", seed, -(2**63))
    bounds = batch_bounds(cache.network.model, cache.n, integer("batch_size", batch_size, 1))
    if cache.stored is None:
        require_eval(cache.network.model)
    layer = _layer(model, cache)
    rule = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    given = {name: value for name, value in rule.items() if value is not None}
    if optimizer is None:
        group = {"params": [p for p in layer.parameters() if p.requires_grad], **_PAPER, **given}
        optimizer = optim.SGD([group])
    elif given:
        raise ValueError(f"{next(iter(given))}: expected None, the optimizer has its own")
    step = LastLayerStep(layer, cache.loss, _holding(optimizer, layer))
    averaged, moving = Averaged(optimizer), dict(layer.named_parameters())
    losses: list[float] = []
    cache.samples.seed = seed
    with Interrupt() as interrupt:
        for epoch in range(first_epoch, first_epoch + epochs):
            cache.samples.epoch = epoch
            with torch.no_grad(), averaged.within(moving, alone=True):
                steps = step.run(cache, epoch_order(seed, epoch, cache.n), bounds)
            sizes = [end - begin for begin, end in pairwise(bounds)]
            mean = sum(loss * size for loss, size in zip(steps, sizes, strict=True)) / cache.n
            losses.append(mean)
            if not (math.isfinite(mean) and bool(torch.isfinite(layer.weight).all())):
                raise RuntimeError(
                    f"epoch {epoch}: the training loss is {mean}, or the weights are not finite; "
                    "lower the learning rate"
                )
            if on_epoch is not None:
                on_epoch(epoch, mean)
            if interrupt.requested:
                raise KeyboardInterrupt
    return losses


def _layer(model: nn.Module, cache: FeatureCache) -> nn.Linear:
    """The layer to train; ValueError where it does not fit the cache."""
    last = cache.network.last
    if isinstance(model, nn.Linear):
        module = model
    else:
        module = layers.named_last_layer(model, last.name).module
    shape, expected = list(module.weight.shape), [last.module.out_features, cache.network.width]
    if shape != expected:
        raise ValueError(f"model: expected a last layer of shape {expected}, got {shape}")
    if not module.weight.requires_grad:
        raise ValueError("model: the last layer's weight does not require a gradient")
    return module


def _holding(optimizer: torch.optim.Optimizer, layer: nn.Linear) -> torch.optim.Optimizer:
    """The optimizer; ValueError where it lacks a parameter of the layer."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in layer.named_parameters():
        if p.requires_grad and id(p) not in held:
            raise ValueError(f"optimizer: lacks the last layer's {name}")
    return optimizer
