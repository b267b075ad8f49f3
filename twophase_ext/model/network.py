"""A model seen as the paper sees it: hidden layers w_(1:H), then the affine last layer."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..core.names import canonical_name
from . import layers
from .gate import wrapper_intercepted
from .probing import wraps
from .purity import require_pure


class Network:
    """The user's model with its last layer and, where it has one, its wide softplus layer named.

    analytic: the last hidden layer where it is affine and then one of layers.ANALYTIC.
    h = hidden(x) is the input of the last layer, z = backbone(x) the input of the wide layer,
    widen(z) = h, a row for each output of a sample (`last.rows`). These three run without
    gradients, in whatever mode the model is.
    """

    def __init__(self, model: nn.Module, example: Tensor, last_layer: Any = None) -> None:
        """Find the layers by running `example` (a few samples) through the model once.

        Raises ValueError where the last layer is not found, not affine, ambiguous or not computed
        from its weights alone (hooks, a replaced forward, a parametrization), where the hidden
        layers read its weights too, and where a forward pass in evaluation mode changes the model.
        """
        self.model = model
        wrapper = model
        while wraps(wrapper):
            if why := wrapper_intercepted(wrapper):
                raise ValueError(
                    f"model: the wrapper {type(wrapper).__name__} is not a call of what it wraps: "
                    f"{why}; remove that, or give the model itself"
                )
            wrapper = next(iter(wrapper.children()))
        require_pure(model, example)
        self.last = layers.find_last_layer(model, example, last_layer)
        self.analytic = layers.find_analytic_layer(model, example, self.last)
        self.wide = layers.as_wide(model, self.analytic)
        self._split = layers.split(model, self.last, self.wide)
        layers.check_hidden_layers(model, example, self.last)

    @property
    def outputs(self) -> int:
        """m_y, the number of outputs."""
        return self.last.module.out_features

    @property
    def width(self) -> int:
        """m_H, the number of features that enter the last layer."""
        return self.last.module.in_features

    @torch.no_grad()
    def hidden(self, x: Tensor) -> Tensor:
        """h: the input of the last layer, [rows, m_H]."""
        return self._split.hidden_features(x)

    @torch.no_grad()
    def backbone(self, x: Tensor) -> Tensor:
        """z: the input of the wide layer, [rows, d]."""
        return self._split.backbone_features(x)

    @torch.no_grad()
    def widen(self, z: Tensor) -> Tensor:
        """h from z by the wide layer."""
        wide = self.wide_layer
        return ops.softplus_(wide.linear(z), wide.beta)

    @property
    def wide_layer(self) -> layers.WideLayer:
        """`wide`; ValueError where the model has none."""
        if self.wide is None:
            raise ValueError("model: the last hidden layer is not affine + exact softplus")
        return self.wide

    def logits(self, h: Tensor) -> Tensor:
        """The outputs from h."""
        return self.last.module(h)

    def last_parameters(self) -> dict[str, nn.Parameter]:
        """The last layer's parameters by canonical name."""
        return layers.last_parameters(self.model, self.last)

    def hidden_parameters(self) -> dict[str, nn.Parameter]:
        """Every other trainable parameter by canonical name."""
        return layers.hidden_parameters(self.model, self.last)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trainable parameter by canonical name."""
        return layers.trainable_parameters(self.model)

    def hidden_state(self, *, buffers: bool = True) -> dict[str, Tensor]:
        """Parameters, trainable or not, and buffers of everything but the last layer."""
        return layers.hidden_state(self.model, self.last, buffers=buffers)

    def state(self) -> dict[str, Tensor]:
        """The whole state dict under canonical names."""
        return {canonical_name(n): t for n, t in self.model.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy a state of `state()` back into the model."""
        own = {canonical_name(n): n for n in self.model.state_dict()}
        self.model.load_state_dict({own[n]: t for n, t in state.items()})
