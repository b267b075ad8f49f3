"""Stochastic gradient descent whose step is one pass over memory and can be masked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .ops.sgd import sgd_


class SGD(torch.optim.SGD):
    """torch.optim.SGD with the paper's mask: every step uses eta_t * nu, nu = 0 or 1 per group.

    The same arguments, defaults, update rule and state dict as `torch.optim.SGD`: state dicts load
    from one into the other. In addition a parameter group has the option `nu` (default 1); where it
    is 0, step() leaves the group's parameters and momentum buffers as they are. Algorithm 1's
    second phase, eta_t = eta * nu with nu = 0 for the hidden layers, is then

        for group in optimizer.param_groups: group["nu"] = int(group["name"] == "last layer")

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
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize
        )
        self.defaults["nu"] = 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch.optim.Optimizer does; nu is 1 unless the group says otherwise."""
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("nu", 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Accept the state of a torch.optim.SGD, which has no nu."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nu", 1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what closure, which recomputes the loss and gradients, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            buffers = [self.state[p].get("momentum_buffer") for p in params]
            sgd_(
                params,
                [p.grad for p in params],
                buffers,
                lr=float(group["lr"]),
                momentum=group["momentum"],
                dampening=group["dampening"],
                weight_decay=float(group["weight_decay"]),
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                nu=[group["nu"]] * len(params),
            )
            for p, buffer in zip(params, buffers, strict=True):
                if buffer is not None:
                    self.state[p]["momentum_buffer"] = buffer
        return loss
