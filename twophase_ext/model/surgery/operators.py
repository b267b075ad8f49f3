"""Which of torch's operators are real analytic, in those of their tensors that hang on weights.

Every operator is judged by itself, on all of its arguments' space. What is not listed, another
library's operators among them, is "unknown".
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Status = Literal["analytic", "not analytic", "unknown"]


class Judgement(NamedTuple):
    """A status and, in a few words, why (for what is not analytic: what to use instead)."""

    status: Status
    reason: str


class Call(NamedTuple):
    """One call of an operator.

    depends: is this argument real and hangs on the weights? above: is it > 0 for all of them?
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    depends: Callable[[Any], bool]
    above: Callable[[Any], bool] = lambda _: False

    @property
    def name(self) -> str:
        """The operator's plain name: "relu" for aten::relu_ too."""
        return plain(self.operator.overloadpacket.__name__)

    def argument(self, name: str) -> Any:
        """The argument of that name in the operator's schema; its default where it was left out."""
        for i, argument in enumerate(self.operator._schema.arguments):
            if argument.name == name:
                given = self.args[i] if i < len(self.args) else argument.default_value
                return self.kwargs.get(name, given)
        return None


Rule = Judgement | Callable[[Call], Judgement]


def plain(name: str) -> str:
    """A function's name without the underscores of private and in-place forms."""
    return name.strip("_") or name


def analytic_because(reason: str) -> Judgement:
    """Analytic, and why."""
    return Judgement("analytic", reason)


def hard(reason: str) -> Judgement:
    """Not analytic, and why, or what to use instead."""
    return Judgement("not analytic", reason)


RANDOM = hard("random: not a fixed function of the weights")
MAX_POOL = hard("a maximum has kinks where two entries tie; use average pooling")
ATTENTION = analytic_because("products, sums and softmax")
_JUMPS = hard("real numbers become integers or truth values: it jumps")
_DOMAIN = Judgement("unknown", "analytic only where its argument stays inside its domain, off 0")


def _by_eps(call: Call) -> Judgement:
    eps = call.argument("eps")
    if eps is not None and not eps > 0:
        return Judgement("unknown", f"analytic for eps > 0 (Proposition 1), eps is {eps}")
    return analytic_because("Proposition 1: quotient by the root of a variance + eps > 0")


def _quotient(call: Call) -> Judgement:
    if call.argument("rounding_mode") is not None:
        return hard("a rounded quotient jumps")
    if call.above(call.argument("other")):
        return analytic_because("the divisor is > 0 for all weights")
    if call.depends(call.argument("other")):
        return Judgement("unknown", "analytic only where the divisor is never 0")
    return analytic_because("division by a constant")


def _power(call: Call) -> Judgement:
    base, exponent = call.argument("self"), call.argument("exponent")
    if isinstance(exponent, int | float) and exponent >= 0 and float(exponent).is_integer():
        return analytic_because("a power with a non-negative integer exponent")
    if isinstance(base, int | float) and base > 0:
        return analytic_because("an exponential")
    if call.above(base):
        return analytic_because("the base is > 0 for all weights")
    return Judgement("unknown", "analytic only where the base is never 0 or negative")


def _domain(call: Call) -> Judgement:
    if call.above(call.argument("self")):
        return analytic_because("its argument is > 0 for all weights")
    return _DOMAIN


def _reduce(call: Call) -> Judgement:
    reduce = call.argument("reduce")
    if reduce in (None, "add", "sum", "multiply", "prod", "mean"):
        return analytic_because("sums or products")
    return hard("kinks where two entries tie")


def _embedding_bag(call: Call) -> Judgement:
    if call.argument("mode") == 2:
        return hard("mode='max' has kinks where two entries tie; use mode='mean'")
    return analytic_because("linear in its weight")


def _attention(call: Call) -> Judgement:
    return RANDOM if call.argument("dropout_p") else ATTENTION


def _dropout(call: Call) -> Judgement:
    off = call.argument("train") is False or call.argument("p") == 0
    return analytic_because("the identity in eval mode") if off else RANDOM


def _grid(call: Call) -> Judgement:
    if call.depends(call.argument("grid")):
        return hard("interpolation has kinks in the places where it looks")
    return analytic_because("linear in its input")


def _cudnn_rnn(call: Call) -> Judgement:
    if call.argument("mode") == 0:
        return hard("nonlinearity='relu' has a kink; use nonlinearity='tanh'")
    return RANDOM if call.argument("train") and call.argument("dropout") else ATTENTION


def _transformer_layer(call: Call) -> Judgement:
    if not call.argument("use_gelu"):
        return hard("its activation is relu; construct it with activation='gelu'")
    return ATTENTION


def _spread(judgement: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), judgement)


OPERATORS: dict[str, Rule] = {
    **_spread(
        analytic_because("sums, products, indexing and other maps without a kink"),
        "add sub rsub mul neg mm bmm addmm addmv baddbmm addbmm addr mv dot vdot addcmul lerp "
        "square sum nansum mean cumsum prod cumprod var var_mean trace tril triu linear bilinear "
        "trilinear convolution convolution_overrideable cudnn_convolution miopen_convolution "
        "mkldnn_convolution conv_depthwise2d conv_depthwise3d thnn_conv2d slow_conv2d_forward "
        "slow_conv3d slow_conv3d_forward slow_conv_transpose2d slow_conv_transpose3d "
        "slow_conv_dilated2d slow_conv_dilated3d mkldnn_linear avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d "
        "upsample_nearest2d upsample_nearest3d upsample_nearest_exact1d upsample_nearest_exact2d "
        "upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bilinear2d_aa "
        "upsample_bicubic2d upsample_bicubic2d_aa upsample_trilinear3d constant_pad_nd "
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
        "replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle "
        "im2col col2im cat stack index index_select index_add index_copy index_put index_fill "
        "gather scatter scatter_add select_scatter slice_scatter diagonal_scatter "
        "as_strided_scatter masked_fill masked_select masked_scatter where take put flip roll "
        "rot90 repeat repeat_interleave clone contiguous copy to_copy to lift lift_fresh fill zero "
        "resize embedding fft_c2c fft_r2c fft_c2r complex conj_physical resolve_conj resolve_neg "
        "unsafe_view unsafe_split unsafe_split_with_sizes split_with_sizes_copy diag_embed "
        "block_diag linalg_cross affine_grid_generator unfold_backward combinations meshgrid",
    ),
    **_spread(
        analytic_because("an entire function, or a quotient whose divisor is never 0"),
        "exp exp2 expm1 sin cos sinh cosh tanh sinc erf erfc atan asinh sigmoid "
        "log_sigmoid_forward softmax safe_softmax masked_softmax log_softmax logsumexp "
        "logcumsumexp logaddexp logaddexp2 gelu silu mish glu",
    ),
    **_spread(
        _by_eps,
        "native_batch_norm native_batch_norm_legit native_batch_norm_legit_no_training "
        "batch_norm_with_update cudnn_batch_norm miopen_batch_norm native_layer_norm "
        "native_group_norm fused_rms_norm batch_norm_elemt",
    ),
    **_spread(
        _attention,
        "scaled_dot_product_flash_attention scaled_dot_product_flash_attention_for_cpu "
        "scaled_dot_product_efficient_attention scaled_dot_product_cudnn_attention "
        "scaled_dot_product_attention_math scaled_dot_product_attention_math_for_mps "
        "scaled_dot_product_fused_attention_overrideable",
    ),
    **_spread(ATTENTION, "native_multi_head_attention"),
    **_spread(_transformer_layer, "transformer_encoder_layer_fwd"),
    **_spread(
        analytic_because("sigmoid, tanh, products and sums"),
        "thnn_fused_lstm_cell thnn_fused_gru_cell mkldnn_rnn_layer",
    ),
    **_spread(_cudnn_rnn, "cudnn_rnn"),
    **_spread(_quotient, "div true_divide"),
    **_spread(_power, "pow float_power"),
    **_spread(_reduce, "scatter_reduce index_reduce"),
    **_spread(_embedding_bag, "embedding_bag embedding_bag_forward_only"),
    **_spread(_dropout, "native_dropout dropout"),
    **_spread(_grid, "grid_sampler_2d grid_sampler_3d cudnn_grid_sampler"),
    **_spread(_domain, "sqrt rsqrt log log2 log10 log1p reciprocal lgamma norm linalg_vector_norm"),
    **_spread(
        _DOMAIN,
        "acos asin acosh atanh logit xlogy atan2 std std_mean linalg_matrix_norm cdist_forward "
        "hypot addcdiv tan weight_norm_interface",
    ),
    **_spread(
        hard("a kink or a piecewise definition; use tp.softplus(x, beta)"),
        "relu relu6 leaky_relu rrelu rrelu_with_noise prelu prelu_kernel elu celu selu threshold "
        "softplus",
    ),
    **_spread(hard("piecewise; use silu, sigmoid or tanh"), "hardswish hardsigmoid hardtanh"),
    **_spread(hard("not analytic; use tanh or tanhshrink"), "softshrink hardshrink"),
    **_spread(hard("kinks at its bounds"), "clamp clamp_min clamp_max clip"),
    **_spread(hard("a kink at 0"), "abs sign sgn"),
    **_spread(
        hard("kinks or jumps where two entries tie"),
        "max min maximum minimum fmax fmin amax amin aminmax cummax cummin cummax_helper "
        "cummin_helper sort topk argmax argmin argsort median nanmedian kthvalue quantile mode "
        "unique unique2",
    ),
    **_spread(
        MAX_POOL,
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices "
        "adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d "
        "max_unpool2d max_unpool3d mkldnn_max_pool2d",
    ),
    **_spread(hard("max_norm clips the norms of its rows"), "embedding_renorm"),
    **_spread(
        hard("jumps"),
        "round floor ceil trunc fix frac fmod remainder floor_divide heaviside gt lt ge le eq ne "
        "isclose bucketize searchsorted nan_to_num",
    ),
}

# Of this package.
_OWN = {
    "softplus": analytic_because("exact softplus, without a threshold"),
    "smooth_max_pool": analytic_because("log sum exp over windows"),
}

# Their integers are sizes, offsets and random states, not functions of the real arguments.
_INTEGERS_BESIDE = {
    *("embedding_bag", "embedding_bag_forward_only", "native_dropout"),
    *("cudnn_rnn", "mkldnn_rnn_layer"),  # workspaces for the backward pass
}

# What they give holds nothing of their argument but its size.
SIZES_ONLY = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones"),
    *("new_full", "new_empty_strided", "rand_like", "randn_like", "randint_like"),
}


def is_real(tensor: Any) -> bool:
    """Is this a tensor of real or complex numbers?"""
    return isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex())


def is_random(call: Call) -> bool:
    """Does the operator draw random numbers, whatever its arguments?"""
    if torch.Tag.nondeterministic_seeded not in call.operator.tags:
        return False
    rule = OPERATORS.get(call.name)
    return rule is None or (callable(rule) and rule(call) is RANDOM)


def judge(call: Call, results: list[Any]) -> Judgement:
    """Is this call real analytic in the arguments that hang on the weights?

    results: the tensors that it returned or wrote.
    """
    if call.operator.namespace == "twophase" and call.name in _OWN:
        return _OWN[call.name]
    if call.operator.namespace != "aten":
        return Judgement("unknown", "an operator of another library, no rule for it")
    rule = OPERATORS.get(call.name)
    judged = rule(call) if callable(rule) else rule
    if judged is None:
        judged = Judgement("unknown", "no rule for this function")
        if call.operator.is_view:
            judged = analytic_because("another view of the same numbers")
    integers = any(isinstance(t, Tensor) and not is_real(t) for t in results)
    exempt = call.name in _INTEGERS_BESIDE or call.name.startswith("scaled_dot_product")
    if judged.status != "not analytic" and integers and not exempt:
        return _JUMPS
    return judged
