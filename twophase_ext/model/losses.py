"""The loss that an argument `loss` means: a name, one of torch's, or one declared convex."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convex import ConvexLoss, Telling, counterexample, loss_problem, zero_dim
from .torch_losses import (
    IGNORED,
    SoftmaxLoss,
    SquaresLoss,
    TorchLoss,
    huber_loss,
    logistic_loss,
    multi_label_loss,
    smooth_l1_loss,
    soft_margin_loss,
    softmax_loss,
    squares_loss,
)
from .weighted import WeightedLoss, split, unweighted, weighted

__all__ = [
    "CROSS_ENTROPY",
    "IGNORED",
    "SQUARED_ERROR",
    "ConvexLoss",
    "SoftmaxLoss",
    "SquaresLoss",
    "Telling",
    "TorchLoss",
    "WeightedLoss",
    "correct",
    "counterexample",
    "counting",
    "has_labels",
    "loss_problem",
    "objective",
    "prepare_targets",
    "resolve_loss",
    "split",
    "squared_error",
    "unweighted",
    "weighted",
    "zero_dim",
]


def squared_error(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """The paper's ||q - y||^2: summed over outputs, averaged over samples (L_ell = 2)."""
    each = (outputs - targets).square().flatten(1).sum(1)
    return each if reduction == "none" else each.mean()


# the two that there are kernels for
CROSS_ENTROPY = SoftmaxLoss(F.cross_entropy, 0.5, "cross_entropy")
SQUARED_ERROR = SquaresLoss(squared_error, 2.0, "squared_error", averaged=False)
NAMED: dict[str, ConvexLoss] = {
    "cross_entropy": CROSS_ENTROPY,
    "squared_error": SQUARED_ERROR,
    "mse": squares_loss(),
    "bce": logistic_loss(),
    "huber": huber_loss(),
    "smooth_l1": smooth_l1_loss(),
    "soft_margin": soft_margin_loss(),
    "multilabel_soft_margin": multi_label_loss(),
}
# module, function, what makes ours from its settings
_TORCH: tuple[tuple[type[nn.Module], Callable[..., Tensor], Callable[..., TorchLoss]], ...] = (
    (nn.CrossEntropyLoss, F.cross_entropy, softmax_loss),
    (nn.MSELoss, F.mse_loss, squares_loss),
    (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, logistic_loss),
    (nn.HuberLoss, F.huber_loss, huber_loss),
    (nn.SmoothL1Loss, F.smooth_l1_loss, smooth_l1_loss),
    (nn.SoftMarginLoss, F.soft_margin_loss, soft_margin_loss),
    (nn.MultiLabelSoftMarginLoss, F.multilabel_soft_margin_loss, multi_label_loss),
)
_LOGITS = "it takes {} and not the outputs of an affine layer; use {} over the outputs themselves"
_KINK = "it is not differentiable everywhere (Assumption 2); {}"
_REFUSED: dict[str, str] = {
    "NLLLoss": _LOGITS.format("log-probabilities", "nn.CrossEntropyLoss"),
    "BCELoss": _LOGITS.format("probabilities", "nn.BCEWithLogitsLoss"),
    "KLDivLoss": _LOGITS.format("log-probabilities", "nn.CrossEntropyLoss with rows of them"),
    "L1Loss": _KINK.format("nn.HuberLoss and nn.SmoothL1Loss are smooth"),
    "MultiMarginLoss": _KINK.format("nn.CrossEntropyLoss is smooth"),
    "MultiLabelMarginLoss": _KINK.format("nn.MultiLabelSoftMarginLoss is smooth"),
    "HingeEmbeddingLoss": _KINK.format("nn.SoftMarginLoss is smooth"),
    "PoissonNLLLoss": "its gradient e^q - y is not Lipschitz (Assumption 2)",
    "GaussianNLLLoss": "it is not convex in mean and variance together (Assumption 2); with a "
    "variance that is not learned it is nn.MSELoss",
    "CTCLoss": "it is no function of one sample's outputs and target that is convex",
}
_FUNCTIONS = {
    "nll_loss": "NLLLoss",
    "binary_cross_entropy": "BCELoss",
    "kl_div": "KLDivLoss",
    "l1_loss": "L1Loss",
    "multi_margin_loss": "MultiMarginLoss",
    "multilabel_margin_loss": "MultiLabelMarginLoss",
    "hinge_embedding_loss": "HingeEmbeddingLoss",
    "poisson_nll_loss": "PoissonNLLLoss",
    "gaussian_nll_loss": "GaussianNLLLoss",
    "ctc_loss": "CTCLoss",
}
_OLD = ("size_average", "reduce")  # arguments that torch has given up


def resolve_loss(loss: Any) -> ConvexLoss:
    """The loss meant by the argument `loss` of the Trainer.

    A name; a loss of torch.nn, with its weight, pos_weight, label_smoothing, ignore_index, delta or
    beta; the function of torch.nn.functional, also as functools.partial with these by name; a
    `ConvexLoss`. Raises ValueError for an unknown name, another reduction than the mean, a loss of
    torch's that does not satisfy Assumption 2, which is said, and a callable that was not declared
    convex.
    """
    if isinstance(loss, ConvexLoss):
        return loss
    if isinstance(loss, str):
        if loss in NAMED:
            return NAMED[loss]
        raise ValueError(
            f"loss: expected one of {sorted(NAMED)}, a loss of torch.nn or a ConvexLoss, got "
            f"{loss!r}"
        )
    if found := _of_torch(loss):
        return found
    raise ValueError(
        f"loss: {getattr(loss, '__name__', type(loss).__name__)} is not declared convex in the "
        "output, which the guarantee needs (Assumption 2). If it is, wrap it: "
        "tp.ConvexLoss(function, smoothness=L_ell)"
    )


def _of_torch(loss: Any) -> TorchLoss | None:
    """Ours for one of torch's; None for what is none of them; ValueError where it is refused."""
    function: Any = loss
    settings: dict[str, Any] = {}
    while isinstance(function, partial) and not function.args:
        function, settings = function.func, {**function.keywords, **settings}
    kind = type(loss)
    name = kind.__name__ if isinstance(loss, nn.Module) else getattr(function, "__name__", "")
    if str(getattr(kind if isinstance(loss, nn.Module) else function, "__module__", "")).startswith(
        "torch.nn"
    ):
        name = _FUNCTIONS.get(name, name)
        if name in _REFUSED:
            raise ValueError(f"loss: nn.{name} is refused: {_REFUSED[name]}")
    for module, own, make in _TORCH:
        known = list(inspect.signature(make).parameters)
        if kind is module and not _altered(loss):
            settings = {key: getattr(loss, key) for key in known}
            reduction = loss.reduction
        elif function is own:
            settings = {k: v for k, v in settings.items() if k not in _OLD or v is not None}
            reduction = settings.pop("reduction", "mean")
        else:
            continue
        if reduction != "mean":
            raise ValueError(
                f"loss: expected reduction='mean' of {name}, got {reduction!r}: the theorem and "
                "its step sizes are those of the mean over the samples"
            )
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(
                f"loss: {', '.join(unknown)} of {name}: expected settings among {known}, which do "
                "not hang on the batch"
            )
        plain = all(v is None or v == d for v, d in _beside_defaults(make, settings))
        return CROSS_ENTROPY if plain and make is softmax_loss else make(**settings)
    return None


def _altered(loss: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return "forward" in vars(loss) or bool(loss._forward_hooks or loss._forward_pre_hooks)


def _beside_defaults(make: Callable[..., Any], settings: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(value, default) of each setting; tensors are never a default."""
    defaults = {k: p.default for k, p in inspect.signature(make).parameters.items()}
    return [
        (float("nan") if isinstance(v, Tensor) else v, defaults[k]) for k, v in settings.items()
    ]


def correct(loss: ConvexLoss, outputs: Tensor, y: Tensor) -> Tensor | None:
    """How many of a batch's labels the largest output names; None where there are no labels.

    Samples count once, whatever their weights.
    """
    y, _ = split(loss, y)
    own = unweighted(loss)
    labelled = isinstance(own, SoftmaxLoss) and own.labelled and not y.is_floating_point()
    return (outputs.argmax(1) == y).sum() if labelled else None


def has_labels(loss: ConvexLoss, y: Tensor) -> bool:
    """Whether `correct` has an answer for these targets, as `over` was told them."""
    return correct(loss, y.new_empty(0, 1, dtype=torch.float32), y[:0]) is not None


def counting(loss: ConvexLoss, y: Tensor) -> Tensor:
    """Which rows of prepared targets count, bool [n]: all but labels that the loss ignores, or of
    weight 0.
    """
    if isinstance(loss, WeightedLoss):
        return y[:, -1] > 0
    if isinstance(loss, SoftmaxLoss) and not y.is_floating_point():
        return y != loss.ignore_index
    return torch.ones(len(y), dtype=torch.bool, device=y.device)


def objective(loss: ConvexLoss, y: Tensor, outputs: int) -> ConvexLoss:
    """The loss as a mean over the rows that count, y their targets."""
    found = loss.over(y, outputs)
    plain = isinstance(loss, SoftmaxLoss) and loss.weight is None and not loss.label_smoothing
    return CROSS_ENTROPY if plain and not y.is_floating_point() else found


def prepare_targets(
    loss: ConvexLoss,
    y: Tensor,
    outputs: int,
    name: str,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Targets in the form that the loss takes: int64 labels [n], or float [n, m_y].

    Raises TypeError for complex targets and for labels that are not whole numbers, ValueError for
    labels outside [0, outputs) (the first such sample is named), a target of another shape, or one
    that the loss is not convex or bounded for. indices: the samples' numbers where y holds only
    some of them.
    """
    if y.is_complex():
        raise TypeError(f"{name}: expected real targets, got {y.dtype}")
    if isinstance(loss, TorchLoss):
        return loss.checked(y, outputs, name, indices)
    return y[:, None] if y.dim() == 1 and outputs == 1 else y
