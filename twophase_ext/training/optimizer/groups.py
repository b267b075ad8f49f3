"""What an optimizer holds: optimizers inside it, its groups, and for a while only some of them."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.names import canonical_name

NEEDED = ("param_groups", "state", "state_dict", "load_state_dict", "step", "zero_grad")


def lacks(value: Any) -> list[str]:
    """What `value` lacks of what the Trainer calls and reads of an optimizer."""
    return [name for name in NEEDED if not hasattr(value, name)]


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, torch.optim.Optimizer) or (
        not isinstance(value, type) and hasattr(value, "param_groups") and hasattr(value, "step")
    )


def inner(optimizer: Any) -> list[Any]:
    """The optimizers that this one has as attributes, in lists, tuples and dicts too."""
    found: list[Any] = []

    def look(value: Any) -> None:
        if _is_optimizer(value):
            found.append(value)
        elif isinstance(value, list | tuple):
            if not any(isinstance(part, Tensor) for part in value):
                for part in value:
                    look(part)
        elif isinstance(value, dict):
            look(list(value.values()))

    for name, value in getattr(optimizer, "__dict__", {}).items():
        if name not in ("param_groups", "state", "defaults"):
            look(value)
    return found


def parts(optimizer: Any) -> list[Any]:
    """The optimizer and all inside it (a Lookahead's base, two in one object), each once."""
    found: list[Any] = []
    waiting = [optimizer]
    while waiting:
        part = waiting.pop(0)
        if all(part is not other for other in found):
            found.append(part)
            waiting += inner(part)
    return found


def order(optimizer: Any, names: dict[int, str]) -> list[list[list[str]]]:
    """The parameters' names by part, group and position; names: {id(parameter): name}."""
    return [
        [[names.get(id(p), "outside the model") for p in group["params"]] for group in groups]
        for groups in (part.param_groups for part in parts(optimizer))
    ]


def rate(group: dict[str, Any]) -> float | None:
    """A group's rate; None where it has none (rates that the optimizer finds by itself)."""
    try:
        return float(group["lr"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None


def learning_rate(optimizer: Any, parameter: Tensor | None) -> float | None:
    """The rate of the parameter's group, or of the first."""
    groups = [
        group
        for group in optimizer.param_groups
        if parameter is None or any(p is parameter for p in group["params"])
    ]
    return rate(groups[0])


def plain(value: Any) -> Any:
    """`value` with NumPy's numbers as Python's, within dicts, lists and tuples too.

    The object itself where there are none: a checkpoint that is read without running code has no
    NumPy numbers.
    """
    if isinstance(value, np.generic | np.ndarray):
        if value.ndim:
            return value
        for kind, python in ((np.floating, float), (np.complexfloating, complex)):
            if np.issubdtype(value.dtype, kind):
                return python(value)
        return value.item()
    if isinstance(value, dict):
        pairs = [(key, plain(key), part, plain(part)) for key, part in value.items()]
        if any(key is not k or part is not p for key, k, part, p in pairs):
            value = copy.copy(value)
            value.clear()
            value.update((k, p) for _, k, _, p in pairs)
    elif type(value) in (list, tuple):
        items = [plain(part) for part in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            return type(value)(items)
    return value


def plain_groups(optimizer: Any) -> None:
    """Python's numbers in the optimizer's groups, in the place of NumPy's."""
    for part in parts(optimizer):
        for group in part.param_groups:
            for key in group:
                if key != "params":
                    group[key] = plain(group[key])


def _aligned(value: Any, parameters: list[Tensor]) -> bool:
    """Whether a list has a tensor of each parameter's shape, in their order."""
    return (
        isinstance(value, list)
        and len(value) == len(parameters) > 0
        and all(
            isinstance(t, Tensor) and t.shape == p.shape
            for t, p in zip(value, parameters, strict=True)
        )
    )


class Alone:
    """Within it the optimizer's groups hold these parameters alone; after it all of them.

    Algorithm 1's eta_t = eta * nu with nu = 0 for the others, for optimizers that know no nu: some
    move a parameter without a gradient (Lookahead), others fail on one (Muon). Lists that go with
    the parameters (slow weights, names) are cut alike; an optimizer inside it that has none of the
    parameters makes no step.
    """

    def __init__(self, optimizer: Any, parameters: Iterable[Tensor]) -> None:
        """parameters: held by the optimizer's groups as they are now."""
        own = {id(p) for p in parameters}
        self._cuts: dict[int, tuple[list[Any], list[int]]] = {}
        self._whole: list[list[Any]] = []
        self.moving: list[Any] = []  # the parts that hold some of the parameters
        self._idle: list[Any] = []
        for part in parts(optimizer):
            kept = self._cut_groups(part.param_groups, own)
            (self.moving if kept else self._idle).append(part)
            self._cut_lists(part, own, kept)
            self._cut(part.param_groups, kept)

    def _cut(self, whole: list[Any], kept: list[int]) -> None:
        if len(kept) < len(whole):
            self._cuts.setdefault(id(whole), (whole, kept))

    def _cut_groups(self, groups: list[dict[str, Any]], own: set[int]) -> list[int]:
        """The positions of the groups that hold one of the parameters."""
        kept = []
        for k, group in enumerate(groups):
            if not isinstance(group["params"], list):
                group["params"] = list(group["params"])
            params = group["params"]
            places = [i for i, p in enumerate(params) if id(p) in own]
            for key, value in group.items():
                if value is params or key == "param_names" or _aligned(value, params):
                    self._cut(value, places)
            if places:
                kept.append(k)
        return kept

    def _cut_lists(self, part: Any, own: set[int], kept: list[int]) -> None:
        """Lists among the optimizer's attributes, over all parameters or group by group."""
        groups = [group["params"] for group in part.param_groups]
        flat = [p for params in groups for p in params]
        for value in list(vars(part).values()):
            if _aligned(value, flat):
                self._cut(value, [i for i, p in enumerate(flat) if id(p) in own])
            elif (
                isinstance(value, list)
                and len(value) == len(groups)
                and all(_aligned(v, ps) for v, ps in zip(value, groups, strict=True))
            ):
                for v, params in zip(value, groups, strict=True):
                    self._cut(v, [i for i, p in enumerate(params) if id(p) in own])
                self._cut(value, kept)

    def __enter__(self) -> None:
        """Cut."""
        self._whole = [list(whole) for whole, _ in self._cuts.values()]
        for whole, kept in self._cuts.values():
            whole[:] = [whole[i] for i in kept]
        self._steps = [vars(part).get("step") for part in self._idle]
        for part in self._idle:
            part.step = _no_step

    def __exit__(self, *_: object) -> None:
        """Whole again, with what was put into the lists meanwhile."""
        for (cut, kept), whole in zip(self._cuts.values(), self._whole, strict=True):
            if len(cut) == len(kept):
                for i, value in zip(kept, cut, strict=True):
                    whole[i] = value
            cut[:] = whole
        for part, step in zip(self._idle, self._steps, strict=True):
            if step is None:
                del part.step
            else:
                part.step = step


def _no_step(*_: Any, **__: Any) -> None:
    """The step of an optimizer that holds nothing that moves."""


def first_settings(optimizer: Any) -> list[dict[str, Any]]:
    """A copy of the groups' settings, as the factory gave them."""
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def by_id(named: Iterable[tuple[str, Tensor]]) -> dict[int, str]:
    """{id(parameter): canonical name}."""
    return {id(p): canonical_name(name) for name, p in named}


def averaging(optimizer: Any) -> Iterator[Any]:
    """The outermost parts with train() and eval(): schedule-free optimizers, or none."""
    if all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
        yield optimizer
        return
    for part in inner(optimizer):
        yield from averaging(part)
