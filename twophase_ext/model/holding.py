"""Modules that stay in evaluation mode, whatever calls train() on the model around them."""

from collections.abc import Iterable

from torch import nn


class _Held:
    """Stands in for the `train` of one module, and remembers what that module was before."""

    def __init__(self, module: nn.Module, frozen: frozenset[str]) -> None:
        """frozen: the names of the module's own parameters whose requires_grad was taken away."""
        self.module, self.frozen, self.training = module, frozen, module.training

    def __call__(self, mode: bool = True) -> nn.Module:
        self.module.training = False  # torch.compile's wrapper sets it directly
        return self.module


def _holder(module: nn.Module) -> _Held | None:
    train = module.__dict__.get("train")
    return train if isinstance(train, _Held) else None


def is_held(model: nn.Module) -> bool:
    """Whether any module of the model is held."""
    return any(_holder(module) is not None for module in model.modules())


def hold(model: nn.Module, moving: Iterable[nn.Parameter]) -> None:
    """Evaluation mode that stays, and requires_grad only for `moving`; `release` undoes it.

    Gradients of the parameters that are frozen are dropped: no optimizer moves a parameter that
    has none. Nothing but an attribute `train` of each module changes, so that verification sees
    the same modules, and copies of the model are held too.
    """
    kept = {id(p) for p in moving}
    held = {
        module: _Held(
            module,
            frozenset(
                name
                for name, p in module.named_parameters(recurse=False)
                if p.requires_grad and id(p) not in kept
            ),
        )
        for module in model.modules()
    }
    for module, holder in held.items():
        object.__setattr__(module, "train", holder)
        module.training = False
        for name in holder.frozen:
            parameter = module.get_parameter(name)
            parameter.requires_grad_(False)
            parameter.grad = None


def release(model: nn.Module) -> None:
    """Give every held module its mode and its parameters' requires_grad back."""
    for module in model.modules():
        holder = _holder(module)
        if holder is not None:
            object.__delattr__(module, "train")
            module.training = holder.training
            for name in holder.frozen:
                module.get_parameter(name).requires_grad_(True)


def trainable(module: nn.Module, name: str) -> bool:
    """Whether the module's own parameter `name` is trainable, or was when `hold` froze it."""
    holder = _holder(module)
    own = module.get_parameter(name).requires_grad
    return own or (holder is not None and name in holder.frozen)
