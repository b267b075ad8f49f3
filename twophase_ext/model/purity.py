"""Does a forward pass change the model, or what it holds?"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .probing import (
    DoesNotRun,
    State,
    eager,
    in_plain_memory,
    reached_tensors,
    require_runnable,
    same_bits,
    state_tensors,
    untouched,
    unwrap,
)


@contextmanager
def held_back(model: nn.Module) -> Iterator[list[Tensor]]:
    """Tensors that a model holds beside its parameters and buffers, as they were afterwards."""
    state = {id(t) for t in state_tensors(model)}
    held = [t for t in reached_tensors(model) if id(t) not in state and in_plain_memory(t)]
    own = [t.detach().clone() for t in held]
    try:
        yield held
    finally:
        for t, value in zip(held, own, strict=True):
            if not same_bits(t, value):
                t.data.copy_(value)


def require_pure(model: nn.Module, example: Tensor) -> None:
    """Raise ValueError where a forward pass in evaluation mode changes parameters or buffers.

    A first pass may fill caches: what the second one changes again is refused. The claims of the
    second phase are about hidden layers that stay as they are. Tensors that the model holds in
    other ways (a BatchNorm in a plain list, which eval() does not reach) count too; they come back.
    Raises ValueError too where the model does not run on the example.
    """
    require_runnable(model, example)
    state = {id(t) for t in state_tensors(model)}
    held = [t for t in reached_tensors(model) if id(t) not in state and in_plain_memory(t)]
    own = [t.detach().clone() for t in held]
    with untouched(model), eager():
        _run_once(model, example)
        before = State(model)
        values = [t.detach().clone() for t in held]
        _run_once(model, example)
        changed = before.changed()
        hidden = [t for t, value in zip(held, values, strict=True) if not same_bits(t, value)]
        if hidden:
            for t, value in zip(held, own, strict=True):
                t.data.copy_(value)
    if hidden and not changed:
        raise ValueError(
            f"model: its forward pass changes a tensor {list(hidden[0].shape)} that is neither a "
            f"parameter nor a buffer of its modules, in evaluation mode ({len(hidden)} such); "
            "modules in a plain list or dict are not reached by eval(): use nn.ModuleList, "
            "nn.ModuleDict or register_buffer"
        )
    if changed:
        raise ValueError(
            f"model: its forward pass changes {changed[0]!r} in evaluation mode ({len(changed)} "
            "such parameters and buffers); hidden layers that change as they run cannot be frozen. "
            "Change them in training mode alone (if self.training: ...)"
        )


def _run_once(model: nn.Module, example: Tensor) -> None:
    try:
        unwrap(model)(example.clone())
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the user's own forward pass raises
        raise DoesNotRun(example, error) from error
