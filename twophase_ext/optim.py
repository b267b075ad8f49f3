"""Stochastic gradient descent whose step is one pass over memory and can be masked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .core.sharded import from_local, in_use, is_sharded, local
from .ops.sgd import apply_sgd, check_sgd

# Parameters, their gradients, and their momentum buffers, None where there is none yet.
_Lists = tuple[list[Tensor], list[Tensor], list[Tensor | None]]


class SGD(torch.optim.SGD):
    """torch.optim.SGD with the paper's mask: every step uses eta_t * nu, nu = 0 or 1 per group.

    The same arguments, defaults, update rule and state dict as `torch.optim.SGD`: state dicts load
    from one into the other. In addition a parameter group has the option `nu` (default 1); where it
    is 0, step() leaves the group's parameters and momentum buffers as they are. Algorithm 1's
    second phase, eta_t = eta * nu with nu = 0 for the hidden layers, is then

        for group in optimizer.param_groups: group["nu"] = int(group["name"] == "last layer")

    Parameters may be DTensors (FSDP2's fully_shard): each process steps its own shards.
    float32 and float64 parameters and dense gradients only: step() raises TypeError for others and
    ValueError for a nu other than 0 and 1, before anything is changed.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        """Arguments as of torch.optim.SGD; ValueError for those that it refuses."""
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self.defaults["nu"] = 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch.optim.Optimizer does; nu is 1 unless the group says otherwise."""
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("nu", 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.SGD; the latter leaves nu as it is."""
        kept = [group["nu"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, nu in zip(self.param_groups, kept, strict=True):
            group.setdefault("nu", nu)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what closure, which recomputes the loss and gradients, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Groups that differ in nu alone, as between Algorithm 1's phases, share one call.
        moving: dict[tuple, _Lists] = {}
        standing: list[tuple[_Lists, Any]] = []
        for group in self.param_groups:
            scalars = (
                float(group["lr"]),
                float(group["momentum"]),
                float(group["dampening"]),
                float(group["weight_decay"]),
                group["nesterov"],
                group["maximize"],
            )
            nu = group["nu"]
            lists: _Lists = ([], [], [])
            if nu == 1:
                lists = moving.setdefault(scalars, lists)
            else:
                standing.append((lists, nu))
            self._extend(lists, group["params"])
        every = [*standing, *((lists, 1) for lists in moving.values())]
        shards = _shards if any(_unusual(lists) for lists, _ in every) else _as_they_are
        if standing or len(moving) > 1:  # one call checks its tensors before it changes any
            for lists, nu in every:
                check_sgd(*shards(lists), [nu] * len(lists[0]))
        for scalars, lists in moving.items():
            own = shards(lists)
            buffers = apply_sgd(*own, scalars)
            if buffers is own[2]:  # none is new
                continue
            for p, old, new in zip(lists[0], lists[2], buffers, strict=False):
                if old is None:
                    new = from_local(new, p) if is_sharded(p) else new
                    self.state[p]["momentum_buffer"] = new
        return loss

    def _extend(self, lists: _Lists, params: list[Tensor]) -> None:
        """Append those of `params` that have gradients, these, and momentum buffers or None."""
        moved, grads, buffers = lists
        state_of, nothing = self.state.get, {}  # type: ignore[var-annotated]
        for p in params:
            if (grad := p.grad) is not None:
                moved.append(p)
                grads.append(grad)
                buffers.append(state_of(p, nothing).get("momentum_buffer"))


def _unusual(lists: _Lists) -> bool:
    """Whether there may be DTensors: to ask each tensor costs more than a small network's step."""
    params, grads, buffers = lists
    kinds = {*map(type, params), *map(type, grads), *map(type, buffers)}
    return in_use() and not kinds <= {Tensor, torch.nn.Parameter, type(None)}


def _as_they_are(lists: _Lists) -> _Lists:
    return lists


def _shards(lists: _Lists) -> _Lists:
    """This process's shards of DTensors (FSDP2): the rule goes element by element."""
    params, grads, buffers = lists
    for k, p in enumerate(params):
        for what, t in (("gradient", grads[k]), ("momentum buffer", buffers[k])):
            if t is not None and getattr(t, "placements", None) != getattr(p, "placements", None):
                kind = f"{type(t).__name__} {getattr(t, 'placements', '')}".rstrip()
                raise TypeError(
                    f"params: expected a {what} laid out as its parameter, "
                    f"{getattr(p, 'placements', 'which is no DTensor')}, got {kind}"
                )
    own = [None if b is None else local(b) for b in buffers]
    return [local(p) for p in params], [local(g) for g in grads], own
