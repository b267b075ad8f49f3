"""A trained network in torch's own modules, for whoever runs it without this package."""

import copy
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from twophase_ext import ops
from twophase_ext.model import holding, layers, probing
from twophase_ext.ops._windows import smooth_max_formula

from ..softplus import Softplus
from . import smooth
from .functions import calls_analytic
from .widen import PixelHead, WideHead

# exp(-40) is below half an ulp of 40 in float64: from there on x itself is softplus, rounded
THRESHOLD = 40.0


class _OfTorch(fx.Transformer):
    """This package's operators written out in torch's."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One node of the graph."""
        if target is ops.softplus:
            return F.softplus(args[0], args[1], threshold=THRESHOLD)
        if target is ops.smooth_max_pool:
            return smooth_max_formula(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def plain(model: nn.Module) -> nn.Module:
    """A copy of the model without this package's classes, in evaluation mode; same state-dict keys.

    `Softplus` becomes torch.nn.Softplus(beta, threshold=40), `WideHead` an nn.Sequential (of
    1 x 1 convolutions where it was put over pixels), what `analytic` put into the model (the smooth
    maximum too) a torch.fx.GraphModule of torch's own operators, and a frozen model is unfrozen.
    torch's own class and not a formula, because every exporter, quantizer and explainer knows it;
    with threshold 40 it differs by roundings alone, in float64 too, where torch's 20 would show.
    `torch.load`, torch.jit, torch.onnx, torch.fx and state_dict() of the copy then need no
    twophase_ext, as far as the model's other classes do not.

    It is for inference: with a threshold the activation is piecewise, hence not real analytic, and
    a claim about the model is none about the copy. Calls of `tp.softplus` in a forward of your own
    stay; write F.softplus(x, beta, threshold=40) there. Raises TypeError where `model` is no
    nn.Module, ValueError where `analytic` put in it what no graph can hold (a smooth PReLU, whose
    graph hangs on the dimensions of its input; functions in a forward).
    """
    probing.require_module(model)
    without = [
        name or "(model)"
        for name, module in layers.unwrap(model).named_modules()
        if isinstance(module, smooth.SmoothPReLU) or calls_analytic(module)
    ]
    if without:
        raise ValueError(
            f"model: torch has no module for {', '.join(without[:3])} (of tp.nn.analytic): export "
            "the model as it is, or train it with functions that torch has (SiLU, GELU, average "
            "pooling)"
        )
    twin = copy.deepcopy(layers.unwrap(model))
    holding.release(twin)
    done: dict[nn.Module, nn.Module] = {}

    def stand_in(module: nn.Module) -> nn.Module:
        if module not in done:
            new = module
            if type(module) is Softplus:
                new = nn.Softplus(module.beta, threshold=THRESHOLD)
            elif type(module) is WideHead:
                new = nn.Sequential(OrderedDict(module.named_children()))
            elif type(module) is PixelHead:
                new = _over_pixels(module)
            elif isinstance(module, smooth.Smooth):
                new = _OfTorch(fx.symbolic_trace(module)).transform()
            done[module] = new
            for name, child in list(new._modules.items()):
                if child is not None:
                    new._modules[name] = stand_in(child)
        return done[module]

    return stand_in(twin).eval()


def _over_pixels(head: PixelHead) -> nn.Sequential:
    """The same as 1 x 1 convolutions, under the same names."""
    parts = OrderedDict[str, nn.Module]()
    for name, child in head.named_children():
        parts[name] = child
        if isinstance(child, nn.Linear):
            weight = child.weight
            conv = head.kind(
                child.in_features, child.out_features, 1, device=weight.device, dtype=weight.dtype
            )
            with torch.no_grad():
                conv.weight.copy_(weight.view_as(conv.weight))
                if conv.bias is not None and child.bias is not None:
                    conv.bias.copy_(child.bias)
            parts[name] = conv
    return nn.Sequential(parts)
