"""Which modules of torch.nn and which functions are real analytic (section 5.2 of the paper).

A composition of real analytic functions is real analytic, so every operation is judged by itself,
as a function of its tensors (parameters included) on all of their space, in eval mode: that is how
the hidden layers run in the second phase.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import fx, nn

from twophase_ext import ops

from .softplus import Softplus

Status = Literal["analytic", "not analytic", "unknown"]


class Judgement(NamedTuple):
    """A status and, in a few words, why (for what is not analytic: what to use instead)."""

    status: Status
    reason: str


Rule = Judgement | Callable[[Any], Judgement]

# torch's containers: they only hold or chain their children.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

SMOOTH_FUNCTIONS = (F.gelu, F.silu, F.mish, F.sigmoid, F.tanh, F.logsigmoid)


def _analytic(reason: str) -> Judgement:
    return Judgement("analytic", reason)


def _hard(reason: str) -> Judgement:
    return Judgement("not analytic", reason)


_AFFINE = _analytic("affine in its input and in its parameters")
_RELU_LIKE = _hard("a kink or a piecewise definition; tp.nn.analytic puts tp.nn.Softplus there")
_ATTENTION = _analytic("products, sums and softmax")
_RANDOM = _hard("random: not a fixed function of the weights")
_MAX_POOL = _hard("a maximum has kinks where two entries tie; use average pooling")
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
    **_modules(_ATTENTION, "MultiheadAttention"),
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
    **_modules(_hard("piecewise linear; nn.Sigmoid is its smooth counterpart"), "Hardsigmoid"),
    **_modules(_hard("piecewise linear; nn.Tanh is its smooth counterpart"), "Hardtanh"),
    **_modules(_hard("not analytic at 0; nn.Tanh is a smooth counterpart"), "Softsign"),
    **_modules(_hard("jumps or kinks; nn.Tanhshrink is a smooth counterpart"), "Softshrink"),
    **_modules(
        _hard("jumps at its threshold; nn.Tanhshrink is a smooth counterpart"), "Hardshrink"
    ),
    **_modules(
        _MAX_POOL,
        *("FractionalMaxPool2d", "FractionalMaxPool3d"),
        *_for_dims("MaxPool", "AdaptiveMaxPool", "MaxUnpool"),
    ),
    **_modules(
        _hard("a root that is not analytic at 0; use average pooling"), *_for_dims("LPPool")
    ),
}


def _spread(judgement: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), judgement)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _quotient(node: fx.Node) -> Judgement:
    if _argument(node, 2, "rounding_mode") is not None:
        return _hard("a rounded quotient jumps")
    if isinstance(_argument(node, 1, "other"), fx.Node):
        return Judgement("unknown", "analytic only where the divisor is never 0")
    return _analytic("division by a constant")


def _power(node: fx.Node) -> Judgement:
    exponent = _argument(node, 1, "exponent")
    if isinstance(exponent, int | float) and exponent >= 0 and float(exponent).is_integer():
        return _analytic("a power with a non-negative integer exponent")
    return Judgement("unknown", "analytic only where the base is never 0 or negative")


def _masked(node: fx.Node) -> Judgement:
    return Judgement("unknown", "analytic only if its mask does not depend on the weights")


def _function_dropout(node: fx.Node) -> Judgement:
    # F.dropout is on by default; torch.dropout and F.dropout agree on the order (x, p, training).
    training = _argument(node, 2, "training", True)
    return _DROPOUT if training is False or _argument(node, 1, "p", 0.5) == 0 else _RANDOM


def _sdpa(node: fx.Node) -> Judgement:
    return _ATTENTION if not _argument(node, 4, "dropout_p", 0.0) else _RANDOM


FUNCTIONS: dict[str, Rule] = {
    **_spread(
        _analytic("sums, products, indexing and other maps without a kink"),
        "add sub rsub mul neg pos iadd isub imul matmul imatmul mm bmm addmm baddbmm addbmm mv dot "
        "multiply subtract negative einsum tensordot outer kron linear bilinear addcmul lerp sum "
        "mean cumsum prod cumprod var square trace diag diagonal tril triu conv1d conv2d conv3d "
        "conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d view view_as reshape "
        "reshape_as flatten unflatten ravel permute transpose t swapaxes swapdims movedim "
        "unsqueeze squeeze expand expand_as broadcast_to repeat repeat_interleave tile cat concat "
        "concatenate stack hstack vstack split chunk tensor_split unbind getitem getattr narrow "
        "select index_select gather take_along_dim roll flip rot90 contiguous clone detach to type "
        "type_as float double half bfloat16 cpu cuda pad interpolate upsample pixel_shuffle "
        "pixel_unshuffle channel_shuffle unfold fold embedding _assert _assert_is_none",
    ),
    **_spread(
        _analytic("an entire function, or a quotient whose divisor is never 0"),
        "exp exp2 expm1 sin cos sinh cosh tanh sinc erf erfc atan arctan asinh arcsinh sigmoid "
        "expit logsigmoid softmax softmin log_softmax logsumexp logaddexp gelu silu mish "
        "tanhshrink glu",
    ),
    **_spread(
        _analytic("Proposition 1: quotient by the root of a variance + eps > 0"),
        "batch_norm layer_norm group_norm instance_norm rms_norm",
    ),
    **_spread(_quotient, "div divide truediv itruediv true_divide"),
    **_spread(_power, "pow ipow float_power"),
    **_spread(_masked, "where masked_fill masked_scatter masked_select"),
    **_spread(_function_dropout, "dropout dropout1d dropout2d dropout3d feature_dropout"),
    **_spread(_function_dropout, "alpha_dropout feature_alpha_dropout"),
    **_spread(_sdpa, "scaled_dot_product_attention"),
    **_spread(
        Judgement("unknown", "analytic only where its argument stays inside its domain, off 0"),
        "sqrt rsqrt log log2 log10 log1p reciprocal acos asin acosh atanh logit xlogy atan2 lgamma "
        "std norm vector_norm matrix_norm cdist hypot rdiv local_response_norm",
    ),
    **_spread(
        _hard("a kink or a piecewise definition; use tp.softplus(x, beta)"),
        "relu relu6 leaky_relu rrelu prelu elu selu celu threshold softplus",
    ),
    **_spread(_hard("piecewise; use silu, sigmoid or tanh"), "hardswish hardsigmoid hardtanh"),
    **_spread(_hard("not analytic; use tanh or tanhshrink"), "softsign softshrink hardshrink"),
    **_spread(_hard("kinks at its bounds"), "clamp clamp_min clamp_max clip normalize"),
    **_spread(_hard("a kink at 0"), "abs absolute fabs sign sgn l1_loss pairwise_distance"),
    **_spread(
        _hard("kinks or jumps where two entries tie"),
        "max min maximum minimum fmax fmin amax amin aminmax cummax cummin sort topk argmax argmin "
        "argsort median nanmedian kthvalue quantile mode unique",
    ),
    **_spread(
        _MAX_POOL,
        "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "fractional_max_pool2d fractional_max_pool3d max_unpool1d max_unpool2d max_unpool3d "
        "lp_pool1d lp_pool2d lp_pool3d",
    ),
    **_spread(
        _hard("jumps"),
        "round floor ceil trunc fix frac fmod mod remainder floordiv floor_divide heaviside gt lt "
        "ge le eq ne greater less isclose bucketize searchsorted one_hot nan_to_num bool int long",
    ),
    **_spread(
        _RANDOM,
        "rand randn rand_like randn_like randint randint_like randperm bernoulli normal uniform "
        "multinomial gumbel_softmax",
    ),
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for a module's type, or None. A subclass with another forward has no rule."""
    for kind in type(module).__mro__:
        if kind in MODULES:
            # e.g. a Linear subclass that adds a clamp is not a Linear
            return MODULES[kind] if type(module).forward is kind.forward else None
    return None


def judge_module(module: nn.Module) -> Judgement | None:
    """Is this module real analytic in eval mode? None where there is no rule for it."""
    rule = rule_for(module)
    return rule(module) if callable(rule) else rule


def function_name(node: fx.Node) -> str:
    """The plain name of the function or method that a traced call runs: "relu" for relu_ too."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    name = name.split(".")[0]
    return name.rstrip("_") or name


def judge_call(node: fx.Node) -> Judgement:
    """Is this traced call of a function or method real analytic?"""
    if node.target in (ops.softplus, ops.softplus_):
        return _analytic("exact softplus, without a threshold")
    rule = FUNCTIONS.get(function_name(node))
    if rule is None:
        return Judgement("unknown", "no rule for this function")
    return rule(node) if callable(rule) else rule
