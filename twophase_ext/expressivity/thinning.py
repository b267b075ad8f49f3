"""Weights of a witness that cost little: zero but for a few channels, behind which all is constant.

Assumption 1 asks for some weights, and those of a small part of the network will do, as long as the
samples stay apart: at 60,000 images some 256 features in good condition. What is left out is not
computed (running/thin.py).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..model.holding import trainable
from .running.features import running, steps_to
from .running.tape import Made

AFFINE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def free_names(model: nn.Module) -> set[str]:
    """Names of trainable parameters."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if trainable(module, name)
    }


@contextmanager
def changed(model: nn.Module, changes: dict[str, Tensor]) -> Iterator[None]:
    """The entries of the state dict are these, and what they were afterwards."""
    state = model.state_dict()
    own = {name: state[name].clone() for name in changes}
    with torch.no_grad():
        for name, value in changes.items():
            state[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                state[name].copy_(value)


def thin_weights(
    model: nn.Module,
    stop: list[nn.Module],
    x: Tensor,
    numbers: int,
    channels: int,
    norms: dict[Any, Any] | None = None,
) -> dict[str, Tensor]:
    """Entries of the state dict that leave so many numbers of a sample after each affine map.

    The first channels stay, one at least and `channels` at most, and of convolutions after the
    first map that keep the number of places the middle pixel. Weights of channels that are constant
    then are zero, and so is every weight on which the input of stop[0] does not depend. Empty where
    nothing is left out, or where an affine map has no channels of its own: its weights are frozen,
    in groups, or act on every token.
    """
    live, dead = steps_to(model, stop, x, norms)
    state, free, modules = model.state_dict(), free_names(model), dict(model.named_modules())
    used = {name for step in live for name in step.weights}
    found = {
        name: torch.zeros_like(state[name])
        for step in dead
        for name in step.weights
        if name in free and name not in used
    }
    less = False
    first = next((step.weights[0] for step in live if step.weights), "")
    for step in live:
        if not step.weights:
            continue
        name = step.weights[0]
        module = modules.get(name.rpartition(".")[0])
        made = next((m for m in tree_flatten(step.made)[0] if isinstance(m, Made)), None)
        own = type(module) in AFFINE and getattr(module, "groups", 1) == 1 and name in free
        if made is None or not own or made.shape[0] != len(x) or len(made.shape) < 2:
            return {}
        if name != first and _keeps_size(module):
            found[name] = _middle_alone(state[name])
            less = True
        keep = min(channels, max(1, numbers // math.prod(made.shape[2:])))
        if keep < made.shape[1]:
            found[name] = found.get(name, state[name]).clone()
            found[name][keep:] = 0
            less = True
    if not less:
        return {}
    pruned: dict[str, Tensor] = {}
    with changed(model, found):
        running(model, stop, x, pruned=pruned)
    for name, columns in pruned.items():
        if name not in free:
            return {}
        found[name] = found.get(name, state[name]).clone()
        found[name][:, ~columns] = 0
    return found


def _keeps_size(module: nn.Module | None) -> bool:
    """Whether a convolution has as many places behind it as before, so that one pixel will do."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or isinstance(module.padding, str):
        return False
    sides = zip(module.kernel_size, module.padding, module.stride, module.dilation, strict=True)
    return all(k % 2 == 1 and s == 1 and 2 * p == d * (k - 1) for k, p, s, d in sides)


def _middle_alone(weight: Tensor) -> Tensor:
    """The weight of a convolution, zero but for the middle pixel."""
    taps = weight.flatten(2)
    kept = torch.zeros_like(taps)
    middle = taps.shape[2] // 2
    kept[:, :, middle] = taps[:, :, middle]
    return kept.view(weight.shape)
