"""One mini-batch step of the last layer over fixed features."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, optim
from .losses import CROSS_ENTROPY, SQUARED_ERROR, ConvexLoss

_HYPERPARAMETERS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


class HeadStep:
    """step(h, y) -> loss before the update, under the base algorithm's optimizer and its state.

    SGD (torch's or ours) with a built-in loss runs as one fused kernel over the optimizer's own
    momentum buffers; anything else, hooks on gradients or steps included, as forward, backward and
    optimizer.step().
    """

    def __init__(
        self, layer: nn.Linear, loss: ConvexLoss, optimizer: torch.optim.Optimizer
    ) -> None:
        """layer: the last layer; optimizer: holds its parameters, state carried over at tau."""
        self.layer, self.loss, self.optimizer = layer, loss, optimizer
        self.group = self._fused_group()

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

    def __call__(self, h: Tensor, y: Tensor) -> Tensor:
        """One step on features h [b, m_H] and targets y; a 0-d loss."""
        if self.group is None:
            return self._plain(h, y)
        group, layer = self.group, self.layer
        weight_buffer, bias_buffer, fresh = None, None, False
        if group["momentum"] != 0:
            weight_buffer, fresh = self._buffer(layer.weight)
            if layer.bias is not None:
                bias_buffer, _ = self._buffer(layer.bias)
        return ops.last_layer_step_(
            layer.weight.detach(),
            None if layer.bias is None else layer.bias.detach(),
            weight_buffer,
            bias_buffer,
            h,
            y,
            loss=self.loss.name,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            fresh=fresh,
        )

    def _buffer(self, parameter: Tensor) -> tuple[Tensor, bool]:
        state = self.optimizer.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is not None:
            return buffer, False
        state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state["momentum_buffer"], True

    def _plain(self, h: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(F.linear(h, self.layer.weight, self.layer.bias), y)
            loss.backward()
        self.optimizer.step()
        return loss.detach()
