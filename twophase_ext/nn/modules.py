"""Which of torch's modules are real analytic in their input and parameters (section 5.2)."""

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .softplus import Softplus

ANALYTIC, NOT_ANALYTIC, UNKNOWN = "analytic", "not analytic", "unknown"

# ReLU-like: softplus with a large beta is their analytic stand-in.
RELU_LIKE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Hardswish,
    nn.Softplus,
)
_SMOOTH = (
    Softplus,
    nn.Linear,
    nn.Bilinear,
    _ConvNd,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.Embedding,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.ZeroPad2d,
    nn.ReflectionPad2d,
    nn.PixelShuffle,
    nn.Sigmoid,
    nn.Tanh,
    nn.GELU,
    nn.SiLU,
    nn.LogSigmoid,
    nn.Softmax,
    nn.LogSoftmax,
)
_KINKED = {
    nn.Hardtanh: "piecewise linear: use nn.Tanh",
    nn.Hardsigmoid: "piecewise linear: use nn.Sigmoid",
    nn.Hardshrink: "discontinuous",
    nn.Softshrink: "piecewise linear",
    nn.Tanhshrink: None,  # x - tanh(x)
    nn.Softsign: "|x| in the denominator: use nn.Tanh",
    nn.Threshold: "discontinuous",
    nn.Mish: "torch evaluates its softplus with a threshold",
}
_MAX_POOLS = tuple(
    getattr(nn, f"{kind}{d}d") for kind in ("MaxPool", "AdaptiveMaxPool") for d in (1, 2, 3)
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Kind:
    """One module of a model: its name, type, whether it is analytic, and why or what to do."""

    name: str
    type: str
    status: str
    reason: str


def classify(model: nn.Module) -> list[Kind]:
    """Every leaf module's kind, in the model's order. Containers only pass their children on.

    A module with children is looked at through them: what its own forward calls besides
    (functional relu and the like) is found by `functional_calls`.
    """
    kinds = []
    for name, module in model.named_modules():
        if isinstance(module, _CONTAINERS) or next(module.children(), None) is not None:
            continue
        status, reason = _kind(module)
        kinds.append(Kind(name or "(model)", type(module).__name__, status, reason))
    return kinds


def _kind(module: nn.Module) -> tuple[str, str]:
    if isinstance(module, nn.GELU) or type(module) in _SMOOTH or isinstance(module, _ConvNd):
        return ANALYTIC, ""
    if isinstance(module, _BatchNorm):
        return ANALYTIC, "Proposition 1; as a fixed function with frozen statistics"
    if isinstance(module, nn.Softplus):
        return NOT_ANALYTIC, (
            f"torch returns x where beta x > {module.threshold:g}: tp.nn.analytic replaces it by "
            "tp.nn.Softplus"
        )
    if isinstance(module, RELU_LIKE):
        return NOT_ANALYTIC, "a kink: tp.nn.analytic replaces it by tp.nn.Softplus"
    if isinstance(module, _MAX_POOLS):
        return NOT_ANALYTIC, "a maximum: use average pooling or a stride"
    if isinstance(module, _DROPOUTS):
        if module.p == 0:
            return ANALYTIC, ""
        return ANALYTIC, "random in training mode; the second phase runs in evaluation mode"
    for kind, reason in _KINKED.items():
        if type(module) is kind:
            return (NOT_ANALYTIC, reason) if reason else (ANALYTIC, "")
    return UNKNOWN, "not one of torch's modules that this package knows"
