"""Algorithm 1: the two-phase modification of a base algorithm (SGD with momentum here)."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .perturb import perturb_
from .sgd import sgd_


def two_phase(
    model: nn.Module,
    last_layer: str,
    x: Tensor,
    y: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Callable[[int], Iterable[Tensor]],
    epochs: int,
    tau: int,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    noise_std: float | Mapping[str, float] = 1e-3,
    noise_seed: int = 1,
    statistics_batch: int = 256,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train `model` in place.

    last_layer: name of the affine last layer. batches(epoch) yields index tensors. tau: the epoch
    before which the perturbation happens; tau = epochs is the base algorithm alone. BatchNorm
    statistics are recomputed once at tau over x in index order, `statistics_batch` samples at a
    time, and fixed from then on. Parameters that do not require grad are left alone throughout.
    Raises ValueError where `last_layer` names no trainable parameters or tau is outside 0..epochs.
    """
    w = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(name.startswith(last_layer + ".") for name in w):
        raise ValueError(
            f"last_layer: expected the name of a trainable affine layer, got {last_layer!r}"
        )
    if not 0 <= tau <= epochs:
        raise ValueError(f"tau: expected an epoch in 0..{epochs}, got {tau}")
    buffers: dict[str, Tensor | None] = dict.fromkeys(w)
    nu = dict.fromkeys(w, 1)  # eta_t = lr * nu

    for epoch in range(epochs):
        if epoch == tau:
            # random perturbation at time tau of all but the last layer
            hidden = {n: p for n, p in w.items() if not n.startswith(last_layer + ".")}
            perturb_(hidden, noise_std, seed=noise_seed)
            recompute_statistics(model, x, statistics_batch)
            nu |= dict.fromkeys(hidden, 0)  # the rank of the NTK is preserved
        model.train(epoch < tau)
        for index in batches(epoch):
            value = loss(model(x[index]), y[index])
            g = torch.autograd.grad(value, list(w.values()))
            state = list(buffers.values())
            sgd_(
                list(w.values()),
                g,
                state,
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                nu=list(nu.values()),
            )
            buffers = dict(zip(w, state, strict=True))
        if after_epoch is not None:
            after_epoch(epoch)


@torch.no_grad()
def recompute_statistics(model: nn.Module, x: Tensor, batch: int) -> None:
    """torch.optim.swa_utils.update_bn over x in index order, everything but BatchNorm in eval mode.

    A last batch of a single sample joins the one before it.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    parts = list(x.split(batch))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    for part in parts if layers else []:
        model(part)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()
