"""An optimizer's state by the names of its parameters, in a checkpoint and from run to run."""

import copy
import io
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.files import read_tensors
from ..optimizer.groups import by_id, order, parts, plain
from .checkpoint import digest


def pack(optimizer: Any, named: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """The optimizer's state, for a checkpoint: {"order", "numbers", "by_name", "state_dict"}.

    Where state_dict has torch's own form, names stand for the positions in the groups ("by_name").
    order: the names by part, group and position. numbers: by part, public attributes, which no
    state_dict has (counters of steps).
    """
    names = order(optimizer, by_id(named))
    found = {"order": names, "numbers": [_numbers(part) for part in parts(optimizer)]}
    with _held_alone(optimizer):
        state = optimizer.state_dict()
    positions = _positions(state, names[0])
    if positions is None:
        return {**found, "by_name": False, "state_dict": state}
    groups = [
        {**group, "params": own} for group, own in zip(state["param_groups"], names[0], strict=True)
    ]
    renamed = {positions.get(key, key): value for key, value in state["state"].items()}
    by_name = {"state": renamed, "param_groups": groups}
    return {**found, "by_name": True, "state_dict": by_name}


@contextmanager
def _held_alone(optimizer: Any) -> Iterator[None]:
    """Without the state of parameters in no group (a callback took them out): torch has no key."""
    left_out = []
    for part in parts(optimizer):
        held, state = (
            {id(p) for g in part.param_groups for p in g["params"]},
            vars(part).get("state"),
        )
        if isinstance(state, dict):
            strange = [p for p in state if isinstance(p, Tensor) and id(p) not in held]
            left_out.append((state, [(p, state.pop(p)) for p in strange]))
    try:
        yield
    finally:
        for state, entries in left_out:
            state.update(entries)


def _numbers(optimizer: Any) -> dict[str, Any]:
    return {
        name: number
        for name, value in vars(optimizer).items()
        if type(number := plain(value)) in (bool, int, float) and not name.startswith("_")
    }


def _positions(state: Any, names: list[list[str]]) -> dict[Any, str] | None:
    """{position: name} of a state_dict in torch's form, None for another."""
    if not isinstance(state, Mapping) or set(state) != {"state", "param_groups"}:
        return None
    groups = [group.get("params") for group in state["param_groups"]]
    if [len(group or ()) for group in groups] != [len(own) for own in names]:
        return None
    flat = [name for own in names for name in own]
    if len(set(flat)) < len(flat):  # parameters of nobody's: there is no name
        return None
    return dict(zip((key for group in groups for key in group), flat, strict=True))


def load(optimizer: Any, packed: Mapping[str, Any], named: Iterable[tuple[str, Tensor]]) -> None:
    """Give the optimizer a state from `pack`, each parameter its own, with all its bits.

    Raises ValueError that names a parameter where the groups hold others, or where the state has
    another form than torch's and the parameters another order.
    """
    own, theirs = order(optimizer, by_id(named)), packed["order"]
    state = packed["state_dict"]
    if packed["by_name"] and own[1:] == theirs[1:]:
        _check_groups(theirs[0], own[0])
        flat = [name for group in own[0] for name in group]
        positions = {name: i for i, name in enumerate(flat)}
        groups = [
            {**group, "params": [positions[name] for name in names]}
            for group, names in zip(state["param_groups"], own[0], strict=True)
        ]
        for group, now in zip(groups, optimizer.param_groups, strict=True):
            if "param_names" in now:
                group["param_names"] = now["param_names"]
        renamed = {positions.get(key, key): value for key, value in state["state"].items()}
        state = {"state": renamed, "param_groups": groups}
    elif own != theirs:
        for part, names in zip(theirs, own, strict=False):
            _check_groups(part, names)
        a, b = next(
            (a, b)
            for part, names in zip(theirs, own, strict=True)
            for group, others in zip(part, names, strict=True)
            for a, b in zip(group, others, strict=True)
            if a != b
        )
        raise ValueError(
            f"the checkpoint's groups have {a} where this one's have {b}; "
            f"{type(optimizer).__name__}.state_dict() goes by position, so give the same order"
        )
    load_exactly(optimizer, state)
    for part, numbers in zip(parts(optimizer), packed["numbers"], strict=True):
        vars(part).update({name: n for name, n in numbers.items() if name in vars(part)})


def _check_groups(theirs: list[list[str]], own: list[list[str]]) -> None:
    """ValueError where a group does not hold the same parameters."""
    if len(theirs) != len(own):
        raise ValueError(f"it has {len(theirs)} parameter groups, this one {len(own)}")
    for k, (group, names) in enumerate(zip(theirs, own, strict=True)):
        if differing := [n for n in [*group, *names] if (n in group) != (n in names)]:
            name = differing[0]
            where = "the checkpoint's" if name in group else "this optimizer's"
            raise ValueError(f"{name} lies in {where} group {k}, but not in the other's")


def load_exactly(optimizer: Any, state: Any) -> None:
    """load_state_dict, and what it rounded put right.

    torch converts every tensor of a state to its parameter's dtype; what is kept in another one
    (float64 sums, 8 bits) would go on as something else.
    """
    shared = [part for part in parts(optimizer)[1:] if part.param_groups is optimizer.param_groups]
    optimizer.load_state_dict(_copied(state))
    if shared and shared[0].param_groups is not optimizer.param_groups:
        optimizer.param_groups = shared[0].param_groups  # a wrapper's and its base's are one list
    found = optimizer.state_dict()
    if digest(found) != digest(state):
        _unrounded(found, state)  # the dicts of single parameters in it are the optimizer's own


def _copied(state: Any) -> Any:
    """A copy that shares no memory: load_state_dict keeps the tensors that it is given."""
    try:
        return copy.deepcopy(state)
    except Exception:  # tensor subclasses that know no clone(); what can be saved is read back
        written = io.BytesIO()
        torch.save(state, written)
        written.seek(0)
        return read_tensors(written)


def _unrounded(loaded: Any, saved: Any) -> Any:
    """`loaded` with the tensors of `saved` where only their dtypes differ."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        if type(loaded) is type(saved) and loaded.dtype != saved.dtype:
            return saved.to(loaded.device, copy=True)
        return loaded
    if isinstance(loaded, dict) and isinstance(saved, Mapping):
        for key in loaded:
            if key in saved and (new := _unrounded(loaded[key], saved[key])) is not loaded[key]:
                loaded[key] = new
    elif type(loaded) in (list, tuple) and len(loaded) == len(saved):
        return type(loaded)(_unrounded(a, b) for a, b in zip(loaded, saved, strict=True))
    return loaded


def kind(optimizer: Any) -> str:
    """The class by name: a callable may define it anew at each call."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def become(own: Any, theirs: Any, model: nn.Module, other: nn.Module) -> bool:
    """Make `own`, an optimizer of `model`, what `theirs` is for `other`, a copy of that model.

    Everything that they hold is copied, attributes outside their state_dict too, with the other
    model's parameters and modules replaced by this one's; hooks and functions stay own. False, and
    nothing changed, where it cannot be copied.
    """
    pairs = list(zip(parts(theirs), parts(own), strict=False))
    if [kind(a) for a in parts(theirs)] != [kind(b) for b in parts(own)]:
        return False
    memo: dict[Any, Any] = {id(a): b for a, b in pairs}
    memo |= {id(a): b for a, b in zip(other.modules(), model.modules(), strict=True)}
    # where a tensor lies, too: a view of a parameter becomes one of this model's
    storages, places = memo.setdefault("torch", {}), {}
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        memo[id(p)], places[id(p)], places[p.data_ptr()] = q, id(q), q.data_ptr()
        storages[p.untyped_storage()._cdata] = q.untyped_storage()
    functions = types.FunctionType | types.MethodType | types.BuiltinFunctionType
    try:
        copies = [
            copy.deepcopy(
                {
                    name: value
                    for name, value in vars(a).items()
                    if not name.startswith("_optimizer_") and not isinstance(value, functions)
                },
                memo,
            )
            for a, _ in pairs
        ]
    except Exception:  # of whatever an optimizer keeps: a lock, a stream, a graph
        return False
    for (_, b), copied in zip(pairs, copies, strict=True):
        vars(b).update({name: _moved(value, places) for name, value in copied.items()})
    return True


def _moved(value: Any, places: Mapping[int, int]) -> Any:
    """A dict or set whose keys are addresses of parameters, with those of their copies."""

    def key(k: Any) -> Any:
        if type(k) is int:
            return places.get(k, k)
        if type(k) is tuple and any(type(part) is int and part in places for part in k):
            return tuple(key(part) for part in k)
        return k

    if isinstance(value, dict):
        for old, new in [(k, new) for k in value if (new := key(k)) is not k]:
            value[new] = value.pop(old)
    elif type(value) is set:
        value = {key(k) for k in value}
    return value
