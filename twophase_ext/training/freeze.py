"""Hidden layers that do not move any more, and the proof of it: a hash of their whole state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn

from ..core.hashing import tensors_hash
from ..model import layers
from ..model.calling import dismiss, serve
from ..model.holding import hold, is_held, release
from ..model.inputs import first_parameter
from ..model.network import Network
from ..model.probing import require_module
from . import batchnorm
from .checks import check_runs, model_device
from .data.samples import Samples


@contextmanager
def serving(model: nn.Module, source: Any, name: str) -> Iterator[Samples]:
    """`source` as `Trainer.fit` takes it, on the model's device and in its dtype; checked to run.

    Within it the model takes one tensor and gives [rows, m_y] (`calling.serve`). Raises ValueError
    or TypeError that name the argument `name`.
    """
    device = model_device(model, "auto")
    dtype = first_parameter(model).dtype
    samples = Samples.of(source, name=name, device=device, dtype=dtype)
    try:
        samples.form = serve(model, samples.packing, samples.example())
        check_runs(model, samples)
        yield samples
    finally:
        samples.close()
        dismiss(model)


class Frozen:
    """A model whose hidden layers are frozen, from `freeze`.

    As a context manager it ends by `verify`, where the block did not raise, and `unfreeze`.
    last_layer: the module that is still trained.
    hash: SHA-256 of every parameter and buffer of the hidden layers as they were frozen.
    """

    def __init__(self, model: nn.Module, last: layers.LastLayer) -> None:
        """Use `freeze`."""
        self.model, self.last_layer = model, last.module
        self._last = last
        hold(model, last.module.parameters())
        self.hash = self._hash()

    def _hash(self) -> str:
        return tensors_hash(layers.hidden_state(self.model, self._last))

    def verify(self) -> None:
        """Raise RuntimeError where the hidden layers moved, or a module is in training mode."""
        awake = [name or "the model" for name, m in self.model.named_modules() if m.training]
        if awake:
            raise RuntimeError(
                f"the model was frozen, but {awake[0]} is in training mode ({len(awake)} such "
                "modules): something set `training` itself"
            )
        if self._hash() != self.hash:
            raise RuntimeError(
                "the hidden layers changed since they were frozen: another owner of the model "
                "wrote to them"
            )

    def unfreeze(self) -> None:
        """Modes and requires_grad as before `freeze`; BatchNorm keeps its new statistics.

        In training mode the next forward pass moves them: model.eval() keeps them.

        The last layer was trained on those. What has been unfrozen stays as it is.
        """
        release(self.model)

    def __enter__(self) -> Self:
        """The model is frozen already."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Unfreeze; verify first, unless the block raised."""
        try:
            if kind is None:
                self.verify()
        finally:
            self.unfreeze()


@torch.inference_mode(False)
def freeze(
    model: nn.Module, *, train: Any = None, last_layer: nn.Module | str | None = None
) -> Frozen:
    """Freeze all layers but the last: what the Trainer does at tau, after the noise.

    train: the training data, as `Trainer.fit` takes them; BatchNorm's statistics are recomputed
    once over their inputs, by the Trainer's rule. None leaves the statistics as they are.
    last_layer: module or its name; with `train` found as the Trainer finds it.

    From then on the model is in evaluation mode and stays there, whoever calls model.train():
    statistics do not move, dropout is off. Hidden parameters do not require gradients and have
    none, so that no optimizer moves them; the last layer trains as before.

    Raises ValueError for a model that is frozen already, that does not run on `train`, whose
    BatchNorm has no running statistics, or without `train` and last_layer; TypeError where the last
    layer is not affine. The arguments are checked before the model changes.
    """
    require_module(model)
    if is_held(model):
        raise ValueError("model: it is frozen already; unfreeze it first")
    batchnorm.check_freezable(model)
    if train is None:
        if last_layer is None:
            raise ValueError("last_layer: expected a module or a name where train is None")
        return Frozen(model, layers.named_last_layer(model, last_layer))
    with serving(model, train, "train") as samples:
        network = Network(model, samples.example(), last_layer)
        batchnorm.recalibrate_over(network, samples)
    return Frozen(model, network.last)
