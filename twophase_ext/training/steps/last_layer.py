"""Mini-batch steps of the last layer over fixed features."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops, optim
from ...model.losses import CROSS_ENTROPY, SQUARED_ERROR, ConvexLoss
from ..features.cache import Features
from ..optimizer.groups import Alone

_HYPERPARAMETERS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


class LastLayerStep:
    """Steps under the base algorithm's optimizer and its state; losses are of before each update.

    SGD (torch's or ours) with a built-in loss runs as one fused kernel over the optimizer's own
    momentum buffers, over stored features many steps a call; anything else, hooks on gradients or
    steps included, as forward, backward and optimizer.step(), with groups of the layer alone.
    """

    def __init__(
        self, layer: nn.Linear, loss: ConvexLoss, optimizer: torch.optim.Optimizer
    ) -> None:
        """layer: the last layer; optimizer: holds its parameters, state carried over at tau."""
        self.layer, self.loss, self.optimizer = layer, loss, optimizer
        self.refresh_rule()
        self._first = False

    def refresh_rule(self) -> None:
        """Choose the kernel anew, after the optimizer's groups have changed."""
        self.group = self._fused_group()
        self.alone = Alone(self.optimizer, self.layer.parameters())

    @property
    def fused(self) -> bool:
        """Whether the fused kernel is used."""
        return self.group is not None

    def _fused_group(self) -> dict[str, Any] | None:
        parameters = [p for p in self.layer.parameters() if p is not None]
        if type(self.optimizer) not in (torch.optim.SGD, optim.SGD):
            return None
        if self.loss not in (CROSS_ENTROPY, SQUARED_ERROR):
            return None
        if not all(
            p.requires_grad and p.is_contiguous() and p.dtype in (torch.float32, torch.float64)
            for p in parameters
        ):
            return None
        # Hooks (gradient clipping, say) act on gradients, which the kernel never forms.
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
            return None
        if self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks:
            return None
        groups = [
            group
            for p in parameters
            for group in self.optimizer.param_groups
            if any(q is p for q in group["params"])
        ]
        settings = [{key: group[key] for key in _HYPERPARAMETERS} for group in groups]
        if any(isinstance(value, Tensor) for s in settings for value in s.values()):
            return None
        if len(groups) != len(parameters) or any(s != settings[0] for s in settings):
            return None
        if settings[0]["maximize"]:
            return None
        return None if any(group.get("nu", 1) != 1 for group in groups) else groups[0]

    def run(
        self,
        features: Features,
        order: Tensor,
        bounds: Sequence[int],
        rates: Sequence[float] | None = None,
        on_batch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> list[float]:
        """Steps over the samples order[bounds[s] : bounds[s + 1]]; the loss of each.

        order: int64 on the CPU. rates: a learning rate a step; None is the optimizer's own.
        on_batch(h, y) is called before a step, where features are not stored.
        """
        order = order[bounds[0] : bounds[-1]]
        bounds = [bound - bounds[0] for bound in bounds]
        if self.group is not None and features.hidden is not None:
            lr = self.group["lr"] if rates is None else list(rates)
            return ops.last_layer_epoch_(
                *self._state(self.group),
                *features.hidden,
                features.rows(order),
                bounds=bounds,
                mapped=features.mode == "disk",
                **self._rule(self.group, lr),
            ).tolist()
        losses = []
        for s, (begin, end) in enumerate(pairwise(bounds)):
            if rates is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = rates[s]
            h, y = features.batch(order[begin:end])
            if on_batch is not None and features.stored is None:
                on_batch(h, y)
            losses.append(self(h, y))
        return torch.stack(losses).double().tolist()

    def __call__(self, h: Tensor, y: Tensor) -> Tensor:
        """One step on features h [b, m_H] and targets y; a 0-d loss."""
        if self.group is None:
            return self._plain(h, y)
        state, rule = self._state(self.group), self._rule(self.group, self.group["lr"])
        return ops.last_layer_step_(*state, h, y, **rule)

    def _state(
        self, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Weight, bias and their momentum buffers; `_first` says that these hold nothing yet."""
        layer, self._first = self.layer, False
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        if group["momentum"] == 0:
            return weight, bias, None, None
        buffer = self._buffer(layer.weight)
        return weight, bias, buffer, None if layer.bias is None else self._buffer(layer.bias)

    def _rule(self, group: dict[str, Any], lr: Any) -> dict[str, Any]:
        names = ("momentum", "dampening", "weight_decay", "nesterov")
        rule = {name: group[name] for name in names}
        return {"loss": self.loss.name, "lr": lr, "is_first_step": self._first, **rule}

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            self._first = True
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _plain(self, h: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(F.linear(h, self.layer.weight, self.layer.bias), y)
            loss.backward()
        try:
            with self.alone:
                self.optimizer.step()
        except Exception as error:
            error.add_note(
                f"optimizer: {type(self.optimizer).__name__}.step() failed on the last layer alone,"
                " which its groups hold in the second phase; second_phase='gd' and 'sgd' need none"
            )
            raise
        return loss.detach()
