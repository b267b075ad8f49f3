"""Which modules of torch.nn are real analytic (section 5.2 of the paper).

A composition of real analytic functions is real analytic, so every operation is judged by itself,
as a function of its tensors (parameters included) on all of their space, in eval mode: that is how
the hidden layers run in the second phase.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..softplus import Softplus
from . import smooth
from .operators import ATTENTION, MAX_POOL, Judgement, Status
from .operators import analytic_because as _analytic
from .operators import hard as _hard

Rule = Judgement | Callable[[Any], Judgement]


SMOOTH_FUNCTIONS = (F.gelu, F.silu, F.mish, F.sigmoid, F.tanh, F.logsigmoid)


_AFFINE = _analytic("affine in its input and in its parameters")
_RELU_LIKE = _hard("a kink or a piecewise definition; tp.nn.analytic puts an analytic one there")
_DROPOUT = _analytic("the identity in eval mode; in train mode random, not a fixed function")


def _by_eps(module: Any) -> Judgement:
    if module.eps is not None and not module.eps > 0:
        return Judgement("unknown", f"analytic for eps > 0 (Proposition 1), eps is {module.eps}")
    return _analytic("Proposition 1: quotient by the root of a variance + eps > 0")


def _recurrent(module: Any) -> Judgement:
    if getattr(module, "nonlinearity", "tanh") != "tanh":
        return _hard("nonlinearity='relu' has a kink; use nonlinearity='tanh'")
    return _analytic("sigmoid, tanh, products and sums")


def _embedding(module: Any) -> Judgement:
    if module.max_norm is not None:
        return _hard("max_norm clips the norms of its rows; use max_norm=None")
    if getattr(module, "mode", "mean") == "max":
        return _hard("mode='max' has kinks where two entries tie; use mode='mean'")
    return _analytic("linear in its weight")


def _local_response(module: Any) -> Judgement:
    positive = module.k > 0 and module.alpha >= 0
    status: Status = "analytic" if positive else "unknown"
    return Judgement(status, "a power of k + alpha * mean of squares, analytic for k > 0")


def _threshold(module: Any) -> Judgement:
    if module.threshold == 0 and module.value == 0:
        return _RELU_LIKE
    return _hard("jumps at its threshold; there is no smooth stand-in")


def _torch_softplus(module: Any) -> Judgement:
    return _hard(
        f"returns x where beta x > {module.threshold:g}; tp.nn.analytic puts tp.nn.Softplus there"
    )


def _transformer_layer(module: Any) -> Judgement:
    activation = module.activation
    # Noted at construction: torch's fused kernel goes by it, in evaluation without gradients.
    fused = getattr(module, "activation_relu_or_gelu", 0)
    if fused == 1 and not (activation is F.relu or isinstance(activation, nn.ReLU)):
        return _hard(
            "activation_relu_or_gelu = 1, so that torch's fused kernel runs relu whatever "
            "`activation` is; set it to 0"
        )
    if fused == 2 and not (activation is F.gelu or isinstance(activation, nn.GELU)):
        return Judgement(
            "unknown",
            "activation_relu_or_gelu = 2, so that torch's fused kernel runs gelu whatever "
            "`activation` is; set it to 0",
        )
    if isinstance(activation, nn.Module):
        return _analytic("attention, affine maps and the activation listed by itself")
    name = getattr(activation, "__name__", str(activation))
    if activation in SMOOTH_FUNCTIONS:
        return _analytic(f"attention, affine maps and {name}")
    if activation is F.relu:
        return _hard("its activation is relu; construct it with activation='gelu'")
    return Judgement("unknown", f"its activation is {name}, for which there is no rule")


def _modules(judgement: Rule, *names: str) -> dict[type[nn.Module], Rule]:
    return {getattr(nn, name): judgement for name in names}


def _for_dims(*stems: str, dims: str = "123") -> list[str]:
    return [f"{stem}{dim}d" for stem in stems for dim in dims]


MODULES: dict[type[nn.Module], Rule] = {
    Softplus: _analytic("exact softplus, without a threshold"),
    **dict.fromkeys(
        (
            *(smooth.SmoothHardtanh, smooth.SmoothLeakyReLU, smooth.SmoothPReLU),
            *(smooth.SmoothHardsigmoid, smooth.SmoothHardswish),
        ),
        _analytic("sums and products of x and exact softplus"),
    ),
    **dict.fromkeys(
        (smooth.SmoothMaxPool, smooth.SmoothGlobalMaxPool),
        _analytic("the logarithm of a sum of exponentials"),
    ),
    **_modules(
        _AFFINE,
        *("Linear", "Bilinear", "Identity", "Flatten", "Unflatten", "Fold", "Unfold"),
        *("PixelShuffle", "PixelUnshuffle", "ChannelShuffle", "Upsample"),
        *("UpsamplingNearest2d", "UpsamplingBilinear2d"),
        *_for_dims("Conv", "ConvTranspose", "AvgPool", "AdaptiveAvgPool"),
        *_for_dims("ConstantPad", "ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad"),
    ),
    **_modules(
        _analytic("a composition of exponentials, sums, products and quotients by sums > 0"),
        *("Sigmoid", "Tanh", "SiLU", "LogSigmoid", "Tanhshrink", "GLU"),
        *("Softmax", "Softmax2d", "Softmin", "LogSoftmax"),
    ),
    **_modules(
        _analytic("x times the normal distribution function (erf), or its tanh form"), "GELU"
    ),
    **_modules(
        _analytic("x tanh(log(1 + exp x)), which torch computes without a threshold"), "Mish"
    ),
    **_modules(
        _by_eps,
        *("SyncBatchNorm", "LayerNorm", "GroupNorm", "RMSNorm"),
        *_for_dims("BatchNorm", "InstanceNorm"),
    ),
    **_modules(_local_response, "LocalResponseNorm"),
    **_modules(
        _DROPOUT,
        *("Dropout", "AlphaDropout", "FeatureAlphaDropout"),
        *_for_dims("Dropout"),
    ),
    **_modules(_recurrent, "RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"),
    **_modules(ATTENTION, "MultiheadAttention"),
    **_modules(_embedding, "Embedding", "EmbeddingBag"),
    **_modules(_transformer_layer, "TransformerEncoderLayer", "TransformerDecoderLayer"),
    **_modules(
        _analytic("chains the layers listed by themselves"),
        *("TransformerEncoder", "TransformerDecoder", "Transformer"),
    ),
    **_modules(
        _RELU_LIKE,
        *("ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "CELU", "SELU", "Hardswish"),
    ),
    **_modules(_threshold, "Threshold"),
    **_modules(_torch_softplus, "Softplus"),
    **_modules(_hard("piecewise linear; tp.nn.analytic puts an analytic one there"), "Hardsigmoid"),
    **_modules(_hard("piecewise linear; tp.nn.analytic puts an analytic one there"), "Hardtanh"),
    **_modules(_hard("not analytic at 0; nn.Tanh is a smooth counterpart"), "Softsign"),
    **_modules(_hard("jumps or kinks; nn.Tanhshrink is a smooth counterpart"), "Softshrink"),
    **_modules(
        _hard("jumps at its threshold; nn.Tanhshrink is a smooth counterpart"), "Hardshrink"
    ),
    **_modules(
        MAX_POOL,
        *("FractionalMaxPool2d", "FractionalMaxPool3d"),
        *_for_dims("MaxPool", "AdaptiveMaxPool", "MaxUnpool"),
    ),
    **_modules(
        _hard("a root that is not analytic at 0; use average pooling"), *_for_dims("LPPool")
    ),
}


# What torch's forwards are made of; a subclass that gives anything else is another function.
_HARMLESS = {
    *("__module__", "__qualname__", "__doc__", "__init__", "__annotations__", "__constants__"),
    *("__firstlineno__", "__static_attributes__", "__annotate_func__", "__annotations_cache__"),
    *("extra_repr", "__repr__", "reset_parameters", "__parameters__"),
}
_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in MODULES}
_OWN_TENSORS = {Tensor, nn.Parameter, nn.Buffer}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for a module's type, or None. A module that may compute otherwise has no rule."""
    kind = next((kind for kind in type(module).__mro__ if kind in MODULES), None)
    return MODULES[kind] if kind is not None and _is_as_written(module, kind) else None


def is_container(module: nn.Module) -> bool:
    """Does the module only hold or chain its children, as torch's containers do?"""
    if isinstance(module, torch.jit.ScriptModule):  # its class has no forward to look at
        return False
    if type(module).forward is nn.Module.forward:
        return "forward" not in vars(module)  # it cannot be called
    return isinstance(module, nn.Sequential) and _is_as_written(module, nn.Sequential)


def _is_as_written(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Does the module compute what torch's class `kind` says, and nothing beside it?

    Not where it or every module has a hook, where a method was replaced in the object or in a
    subclass, or where its tensors are of a subclass: it may be a Linear that adds a clamp.
    """
    if is_hooked(module) or kind.forward is not _FORWARDS.get(kind, kind.forward):
        return False
    classes = type(module).__mro__[: type(module).__mro__.index(kind)]
    if any(vars(above).keys() - _HARMLESS for above in classes):
        return False
    # frozen networks have a `train` of their own; it computes nothing
    own = {name for name in vars(module) if name != "train"}
    if any(isinstance(getattr(kind, name, None), types.FunctionType) for name in own):
        return False
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return all(tensor is None or type(tensor) in _OWN_TENSORS for tensor in tensors)


def is_hooked(module: nn.Module) -> bool:
    """Does calling the module run forward hooks, its own or those of every module?"""
    own = module._forward_hooks or module._forward_pre_hooks
    return bool(own or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def judge_module(module: nn.Module) -> Judgement | None:
    """Is this module real analytic in eval mode? None where there is no rule for it."""
    rule = rule_for(module)
    return rule(module) if callable(rule) else rule
