"""torch's losses as means of convex functions, each with the Lipschitz constant of its gradient.

With reduction="mean" each is sum_i g_i(q_i) / sum_i d_i over the samples, q_i the m_y outputs of
sample i: d_i = 1 but for class weights and ignored labels. Of the whole data set that is a mean
over samples, of the functions (n / sum_j d_j) g_i; `over` makes it one, so that a mini-batch, too,
is a mean over its samples and its gradient is unbiased (torch would divide by the batch's own d_i).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .convex import ConvexLoss

IGNORED = -100  # torch's default label of samples that do not count
_SLACK = 1 + 2.0**-40  # above the rounding of a constant
EVEN = 1.01  # constants of samples that differ by less count as the same


@dataclass(frozen=True, eq=False)
class TorchLoss(ConvexLoss):
    """One of torch's losses; smoothness: L_ell, before `over` that of g_i alone, at most.

    name holds its settings too. `__call__` is torch's own value, to the bit, until `over`.
    """

    known: ClassVar[bool] = True
    uneven: int = 0  # m_y where samples differ in curvature, none of them being 0
    __eq__, __hash__ = object.__eq__, object.__hash__  # `over` other data it is another loss

    def checked(self, y: Tensor, outputs: int, name: str, indices: Sequence[int] | None) -> Tensor:
        """Targets [n, outputs] of a floating dtype; see `prepare_targets`."""
        if y.dim() == 1 and outputs == 1:
            y = y[:, None]
        if y.dim() != 2 or y.shape[1] != outputs:
            raise ValueError(
                f"{name}: expected targets of shape [n, {outputs}] for {self.name}, got "
                f"{list(y.shape)}"
            )
        return y if y.is_floating_point() else y.to(torch.get_default_dtype())

    def divisor(self, y: Tensor) -> Tensor:
        """d_i of each sample, float64 [b]; y: targets as `checked` leaves them."""
        return torch.ones(len(y), dtype=torch.float64, device=y.device)

    def curvature(self, y: Tensor, outputs: int) -> Tensor:
        """A Lipschitz constant of the gradient of each g_i in the 2-norm, float64 [b]."""
        raise NotImplementedError

    def total(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The sum of g_i over a batch."""
        return self.function(outputs, y) * len(y)

    def each(self, outputs: Tensor, y: Tensor) -> Tensor:
        """g_i of each sample of a batch [b], before `over`."""
        found = self.function(outputs, y, reduction="none")  # type: ignore[call-arg]
        return found if found.dim() == 1 else found.mean(1)

    def row_scale(self, y: Tensor) -> Tensor | None:
        """sqrt(r_i) [b], r_i L_ell the constant of a sample's own gradient; None where all are 1.

        The Hessian of the mean loss in a last layer's weights is at most (L_ell / n) sum_i r_i
        [h_i, 1] [h_i, 1]^T: rows sqrt(r_i) [h_i, 1] stand for the features.
        """
        if not self.uneven:
            return None
        share = self.function.share if isinstance(self.function, _Mean) else 1.0
        return (self.curvature(y, self.uneven) * (share * _SLACK / self.smoothness)).sqrt()

    def over(self, y: Tensor, outputs: int) -> Self:
        """The mean over the samples whose targets are y [n, ...]: the loss of a whole data set.

        Its smoothness is L_ell for these targets. ValueError where no sample counts.
        """
        d = self.divisor(y)
        whole = math.fsum(d.tolist())
        if not whole > 0:
            raise ValueError(
                f"loss: {self.name}: expected a sample that counts, got {len(y)} targets that are "
                "ignored or of weight 0"
            )
        share, own = len(y) / whole, self.curvature(y, outputs)
        least, largest = (float(part) * share * _SLACK for part in own.aminmax())
        found: dict[str, Any] = {
            "smoothness": max(largest, torch.finfo(torch.float64).tiny),
            "uneven": outputs if 0 < EVEN * least < largest else 0,
        }
        if bool((d == 1).all()):
            return replace(self, **found)
        return replace(self, function=_Mean(self, share), **found)


@dataclass(frozen=True)
class _Mean:
    """(n / sum_j d_j) times the mean of g_i over a batch."""

    loss: TorchLoss
    share: float

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self.loss.total(outputs, y) * (self.share / len(y))


@dataclass(frozen=True, eq=False)
class SoftmaxLoss(TorchLoss):
    """Cross-entropy: g(q) = sum_c t_c (log sum_j e^(q_j) - q_c), with sums t of weights >= 0.

    Label y: t_c = (1 - e) w_y [c = y] + e w_c / m_y and d = w_y, both 0 where y is ignore_index; a
    row y of probabilities: t_c = w_c ((1 - e) y_c + e / m_y) and d = 1. e: label_smoothing, w:
    weight. The Hessian is T (diag(p) - p p^T), T = sum_c t_c and p = softmax(q); its form in v is
    T Var_p(v) <= T (max v - min v)^2 / 4 <= T ||v||^2 / 2 (Popoviciu): L_ell = T / 2.
    """

    weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = IGNORED
    labelled: bool = True  # whether every sample has a label, and accuracy a meaning

    def checked(self, y: Tensor, outputs: int, name: str, indices: Sequence[int] | None) -> Tensor:
        """int64 labels [n], or rows of probabilities [n, outputs]."""
        if self.weight is not None and len(self.weight) != outputs:
            raise ValueError(
                f"loss: {self.name}: expected a weight for each of {outputs} outputs, got "
                f"{len(self.weight)}"
            )
        if y.dim() == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.is_floating_point() and y.dim() == 2:
            y = super().checked(y, outputs, name, indices)
            if bool((y < 0).any()):
                raise ValueError(f"{name}: expected probabilities, got {float(y.min()):.4g}")
            return y
        if y.dim() != 1:
            raise ValueError(f"{name}: expected labels of shape [n], got {list(y.shape)}")
        whole = y.is_floating_point() and bool((y == y.round()).all())
        if y.dtype == torch.bool or (y.is_floating_point() and not whole):
            raise TypeError(f"{name}: expected integer class labels, got {y.dtype}")
        y = y.long()  # before the comparison: `outputs` need not fit into uint8
        wrong = (((y < 0) | (y >= outputs)) & (y != self.ignore_index)).nonzero()
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(
                f"{name}: expected labels in 0..{outputs - 1} (the last layer has {outputs} "
                f"outputs), got {int(y[i])} at sample "
                f"{indices[i] if indices else i} ({len(wrong)} such samples)"
            )
        return y

    def divisor(self, y: Tensor) -> Tensor:
        """w_y, or 0 where y is ignored; 1 for probabilities."""
        if y.is_floating_point():
            return super().divisor(y)
        return self._weight(y, None)[self._counted(y)] * (y != self.ignore_index)

    def curvature(self, y: Tensor, outputs: int) -> Tensor:
        """T / 2."""
        w, e = self._weight(y, outputs), self.label_smoothing
        if y.is_floating_point():
            return (y.double() * (1 - e) + e / outputs) @ w / 2
        of_label = (1 - e) * w[self._counted(y)] + e * w.mean()
        return of_label * (y != self.ignore_index) / 2

    def terms(self, y: Tensor, outputs: int) -> Tensor:
        """t, float64 [b, m_y]."""
        w, e = self._weight(y, outputs), self.label_smoothing
        if y.is_floating_point():
            return (y.double() * (1 - e) + e / outputs) * w
        counted = self._counted(y)
        t = (e / outputs * w).expand(len(y), -1).clone()
        t[torch.arange(len(y), device=y.device), counted] += (1 - e) * w[counted]
        return t * (y != self.ignore_index)[:, None]

    def total(self, outputs: Tensor, y: Tensor) -> Tensor:
        """By torch's reduction="sum", which is the sum of g_i."""
        return _cross_entropy(outputs, y, reduction="sum", **self._settings())

    def over(self, y: Tensor, outputs: int) -> Self:
        """See `TorchLoss.over`; labelled is settled too."""
        hard = not y.is_floating_point() and not bool((y == self.ignore_index).any())
        if hard and self.weight is None and not self.label_smoothing:
            return self  # the one that there are kernels for, where it is that
        return replace(super().over(y, outputs), labelled=hard)

    def _settings(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
        }

    def _weight(self, y: Tensor, outputs: int | None) -> Tensor:
        if self.weight is not None:
            return self.weight.to(y.device, torch.float64)
        count = int(y.max()) + 1 if outputs is None else outputs
        return torch.ones(max(count, 1), dtype=torch.float64, device=y.device)

    def _counted(self, y: Tensor) -> Tensor:
        """The labels, 0 in the place of those that are ignored."""
        return torch.where(y == self.ignore_index, 0, y)


@dataclass(frozen=True, eq=False)
class LogisticLoss(TorchLoss):
    """Binary cross-entropy of each output: g(q) = (1 / m_y) sum_j A_j s(-q_j) + B_j s(q_j).

    s(z) = log(1 + e^z). With weight v and pos_weight p: A = v p y, B = v (1 - y), 0 <= y <= 1. For
    the soft margin log(1 + e^(-y q)), y = 1 or -1: A = [y = 1], B = [y = -1]. s'' <= 1/4, and the
    Hessian is diagonal: L_ell = max_j (A_j + B_j) / (4 m_y).
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    signs: bool = False  # targets are 1 and -1

    def checked(self, y: Tensor, outputs: int, name: str, indices: Sequence[int] | None) -> Tensor:
        """[n, outputs], each within 0..1, or 1 or -1."""
        for what, tensor in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if tensor is not None and tensor.shape not in ((), (1,), (outputs,)):
                raise ValueError(
                    f"loss: {self.name}: expected a {what} for each of {outputs} outputs, got the "
                    f"shape {list(tensor.shape)}"
                )
        y = super().checked(y, outputs, name, indices)
        fits = (y.abs() == 1) if self.signs else (y >= 0) & (y <= 1)
        if not bool(fits.all()):
            i, j = (~fits).nonzero()[0].tolist()
            known = "1 or -1" if self.signs else "0 to 1"
            raise ValueError(
                f"{name}: expected targets {known} for {self.name}, got {float(y[i, j]):.4g} at "
                f"sample {indices[i] if indices else i}"
            )
        return y

    def terms(self, y: Tensor, outputs: int) -> Tensor:
        """(A, B) without the factor 1 / m_y, float64 [b, m_y, 2]."""
        y = y.double()
        if self.signs:
            return torch.stack([y > 0, y < 0], -1).double()
        v, p = (1.0 if part is None else part.to(y) for part in (self.weight, self.pos_weight))
        return torch.stack([v * p * y, v * (1 - y)], -1)

    def curvature(self, y: Tensor, outputs: int) -> Tensor:
        """max_j (A_j + B_j) / (4 m_y)."""
        return self.terms(y, outputs).sum(-1).amax(1) / (4 * outputs)


@dataclass(frozen=True, eq=False)
class SquaresLoss(TorchLoss):
    """g(q) = ||q - y||^2, the paper's, or torch's mean over the outputs too: L_ell = 2, 2 / m_y."""

    averaged: bool = True

    def scale(self, outputs: int) -> float:
        """What ||q - y||^2 is multiplied by."""
        return 1 / outputs if self.averaged else 1.0

    def curvature(self, y: Tensor, outputs: int) -> Tensor:
        """2, or 2 / m_y."""
        return torch.full((len(y),), 2 * self.scale(outputs), dtype=torch.float64, device=y.device)

    def over(self, y: Tensor, outputs: int) -> Self:
        """See `TorchLoss.over`."""
        return super().over(y, outputs) if self.averaged else self  # there are kernels for it


@dataclass(frozen=True, eq=False)
class HuberLoss(TorchLoss):
    """g(q) = (1 / m_y) sum_j H(q_j - y_j) / e, e = 1, or delta for the smooth L1 loss.

    H(r) = r^2 / 2 where |r| <= delta, else delta (|r| - delta / 2): H'' <= 1, L_ell = 1 / (e m_y).
    """

    delta: float = 1.0
    divided: bool = False

    def scale(self, outputs: int) -> float:
        """What the sum of H is multiplied by."""
        return 1 / (outputs * (self.delta if self.divided else 1.0))

    def curvature(self, y: Tensor, outputs: int) -> Tensor:
        """1 / (e m_y)."""
        return torch.full((len(y),), self.scale(outputs), dtype=torch.float64, device=y.device)


def _cross_entropy(q: Tensor, y: Tensor, *, weight: Tensor | None, **settings: Any) -> Tensor:
    y = y.to(q.dtype) if y.is_floating_point() else y
    return F.cross_entropy(q, y, weight=None if weight is None else weight.to(q), **settings)


def _binary(q: Tensor, y: Tensor, *, reduction: str = "mean", **weights: Tensor | None) -> Tensor:
    own: dict[str, Any] = {k: None if part is None else part.to(q) for k, part in weights.items()}
    return F.binary_cross_entropy_with_logits(q, y, reduction=reduction, **own)


def _multi_label(q: Tensor, y: Tensor, *, weight: Tensor | None, reduction: str = "mean") -> Tensor:
    own = None if weight is None else weight.to(q)
    return F.multilabel_soft_margin_loss(q, y, weight=own, reduction=reduction)


def softmax_loss(
    weight: Any = None, label_smoothing: float = 0.0, ignore_index: int = IGNORED
) -> SoftmaxLoss:
    """nn.CrossEntropyLoss(weight, ignore_index, label_smoothing); ValueError for weights < 0."""
    weight = _weights(weight, "weight")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"loss: expected label_smoothing within 0..1, got {label_smoothing}")
    own: dict[str, Any] = {
        "weight": weight,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
    }
    function = partial(_cross_entropy, **own)
    largest = 1.0 if weight is None else float(weight.double().max())
    name = _named("cross_entropy", own, softmax_loss)
    return SoftmaxLoss(function, max(largest, 1e-300) / 2 * _SLACK, name, **own)


def logistic_loss(weight: Any = None, pos_weight: Any = None) -> LogisticLoss:
    """nn.BCEWithLogitsLoss(weight, pos_weight); ValueError for weights < 0."""
    own: dict[str, Any] = {
        "weight": _weights(weight, "weight"),
        "pos_weight": _weights(pos_weight, "pos_weight"),
    }
    v, p = (1.0 if part is None else float(part.double().max()) for part in own.values())
    smoothness = max(v * max(p, 1.0), 1e-300) / 4 * _SLACK
    name = _named("bce_with_logits", own, logistic_loss)
    return LogisticLoss(partial(_binary, **own), smoothness, name, **own)


def multi_label_loss(weight: Any = None) -> LogisticLoss:
    """nn.MultiLabelSoftMarginLoss(weight): binary cross-entropy, averaged over the outputs."""
    own: dict[str, Any] = {"weight": _weights(weight, "weight")}
    binary = logistic_loss(**own)
    name = _named("multilabel_soft_margin", own, multi_label_loss)
    return replace(binary, function=partial(_multi_label, **own), name=name)


def soft_margin_loss() -> LogisticLoss:
    """nn.SoftMarginLoss(): log(1 + e^(-y q)) for y = 1 or -1."""
    return LogisticLoss(F.soft_margin_loss, 0.25, "soft_margin", signs=True)


def squares_loss() -> SquaresLoss:
    """nn.MSELoss(): the mean over samples and outputs."""
    return SquaresLoss(F.mse_loss, 2.0, "mse")


def huber_loss(delta: float = 1.0) -> HuberLoss:
    """nn.HuberLoss(delta)."""
    return _huber(F.huber_loss, "huber", "delta", delta, divided=False)


def smooth_l1_loss(beta: float = 1.0) -> HuberLoss:
    """nn.SmoothL1Loss(beta), the Huber loss over beta."""
    return _huber(F.smooth_l1_loss, "smooth_l1", "beta", beta, divided=True)


def _huber(
    function: Callable[..., Tensor], name: str, what: str, width: float, *, divided: bool
) -> HuberLoss:
    if not 0 < width < math.inf:
        raise ValueError(f"loss: expected {what} > 0 (at 0 it has a kink), got {width!r}")
    smoothness = (1 / width if divided else 1.0) * _SLACK
    title = name if width == 1 else f"{name}({what}={width:g})"
    own = partial(function, **{what: width})
    return HuberLoss(own, smoothness, title, delta=float(width), divided=divided)


def _weights(value: Any, name: str) -> Tensor | None:
    """A copy of a loss's weights; ValueError where they are negative or not finite."""
    if value is None:
        return None
    found = torch.as_tensor(value).detach().cpu().clone()
    if not bool((found >= 0).all() & found.isfinite().all()):
        raise ValueError(f"loss: expected {name} >= 0, of finite numbers, got {found.tolist()[:5]}")
    return found


def _named(name: str, settings: dict[str, Any], factory: Callable[..., Any]) -> str:
    """The name with the settings that are not the factory's defaults."""
    shown = []
    for key, default in zip(settings, factory.__defaults__ or (), strict=True):
        value = settings[key]
        if isinstance(value, Tensor):
            numbers = value.double().flatten()
            text = ", ".join(f"{v:g}" for v in numbers.tolist())
            digest = hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:8]
            shown.append(f"{key}=[{text}]" if len(numbers) <= 4 else f"{key}={digest}")
        elif value != default:
            shown.append(f"{key}={value:g}")
    return f"{name}({', '.join(shown)})" if shown else name
