"""Losses that satisfy Assumption 2: differentiable and convex in the output, Lipschitz gradient."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.messages import type_and_line

SAMPLES = 16  # that a declaration is tried on at least, where there are as many
KINDS = 1000  # of targets, at most, of which one each is tried
EXCESS = 1e-3  # of L_ell: a loss may compute in float32


@dataclass(frozen=True)
class ConvexLoss:
    """A loss averaged over samples, declared convex in the output by whoever builds it.

    function: (outputs [b, m_y], targets [b, ...]) -> 0-d tensor, the mean over the b samples, for
    outputs of any floating dtype: bounds are evaluated in float64.
    smoothness: L_ell, the Lipschitz constant of the gradient of one sample's loss in the 2-norm
    (Assumption 2), > 0. name appears in logs. least: a number that one sample's loss is never
    below, where there is one (0 for most): it bounds `tp.loss_floor` where nothing else does.

    A declaration is tried on a few samples: torch's own losses when it is made, others by the
    Trainer and `guarantee` with the targets. Raises TypeError for what is no function, ValueError
    for another reduction than the mean, and for a gradient that is seen to change by more than
    L_ell times the distance of the outputs, or not to be that of a convex function.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    smoothness: float
    name: str = "custom"
    least: float = -math.inf
    known: ClassVar[bool] = False  # whether the package has derived what is declared

    def __post_init__(self) -> None:
        """Check the declaration."""
        if not callable(self.function):
            raise TypeError(f"function: expected a callable, got {type(self.function).__name__}")
        if not (isinstance(self.smoothness, int | float) and 0 < self.smoothness < float("inf")):
            raise ValueError(f"smoothness: expected a number L_ell > 0, got {self.smoothness!r}")
        if not (isinstance(self.least, int | float) and self.least < math.inf):
            raise ValueError(f"least: expected a number, got {self.least!r}")
        reduction = getattr(self.function, "reduction", "mean")
        if reduction in ("sum", "none"):
            raise ValueError(
                f"function: expected the mean over samples, got reduction={reduction!r}"
            )
        if not self.known and _of_torch(self.function) and (reason := _tried_on_made_up(self)):
            raise ValueError(f"function: {reason}")

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch."""
        return self.function(outputs, targets)

    def over(self, y: Tensor, outputs: int) -> "ConvexLoss":
        """The loss as a mean over the samples whose targets are y: this one, as declared."""
        return self

    def row_scale(self, y: Tensor) -> Tensor | None:
        """None: one constant L_ell for all samples (see `TorchLoss`)."""
        return None


def zero_dim(value: Any) -> Tensor:
    """A loss's value; TypeError where it is no tensor without dimensions."""
    if not isinstance(value, Tensor) or value.dim() != 0:
        shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"expected a 0-d tensor, the mean over samples, got {shape}")
    return value


def counterexample(loss: ConvexLoss, outputs: int, targets: Tensor) -> str:
    """What of the declaration is seen to be wrong on a few samples; "" where nothing is.

    targets: those of b samples, as `prepare_targets` leaves them, best `Telling` ones; outputs:
    m_y. The loss of all, and of each two that follow each other, has to be the mean. Outputs are
    made up, in float64: random ones, zeros, and ties of two, where logistic losses bend most; they
    move along the axes, along differences of two axes and at random. What the function raises, on
    float64 or on anything else, is left to the caller.
    """
    y = targets.double() if targets.is_floating_point() else targets
    generator = torch.Generator().manual_seed(0)
    kind: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    steps = torch.randn(3, len(y), outputs, generator=generator, **kind)
    i, j = (torch.randint(outputs, (len(y),), generator=generator, device="cpu") for _ in "ij")
    axis, other = (torch.eye(outputs, **kind)[k] for k in (i, j))
    bases = [3 * steps[0], 0 * steps[0], 5 * (axis + other)]
    moves = [steps[1], 0.1 * steps[2], 0.1 * axis, 0.1 * (axis - other)]
    bases, moves = ([part.to(y.device) for part in parts] for parts in (bases, moves))

    def value(q: Tensor, y: Tensor) -> Tensor:
        return zero_dim(loss(q, y))

    with torch.enable_grad():
        rows = zip(bases[0].split(1), y.split(1), strict=True)
        each = [float(value(q, target).detach()) for q, target in rows]
        pairs = [slice(k, k + 2) for k in range(len(y) - 1)]
        for part in [slice(0, len(y)), *pairs]:
            whole, own = float(value(bases[0][part], y[part]).detach()), each[part]
            mean, size = sum(own) / len(own), sum(map(abs, own)) / len(own)
            if not abs(whole - mean) <= EXCESS * size + 1e-6:  # NaN is no mean
                return (
                    "expected the mean over samples (reduction='mean', no weights in the divisor, "
                    f"no sample ignored), got {whole:.4g} for {len(own)} samples whose own losses "
                    f"have the mean {mean:.4g}"
                )

        def gradient(q: Tensor) -> Tensor:
            q = q.clone().requires_grad_()
            return torch.autograd.grad(value(q, y), q)[0].double() * len(y)

        for base in bases:
            here = gradient(base)
            for move in moves:
                change, length = gradient(base + move) - here, move.norm(dim=1)
                slope = change.norm(dim=1) - (1 + EXCESS) * loss.smoothness * length
                if bool((slope > 1e-5).any()):
                    k = int(slope.argmax())
                    found = float(change[k].norm() / length[k])
                    return (
                        f"smoothness: expected L_ell, got {loss.smoothness:g}, but between two "
                        f"outputs of a sample the gradient changes by {found:.4g} times their "
                        "distance"
                    )
                if bool(((change * move).sum(1) < -EXCESS * loss.smoothness * length**2).any()):
                    return "expected a function convex in the output; along a line its slope falls"
    return ""


class Telling:
    """Targets on which a loss shows whether it is a mean over samples, wherever in the data.

    The first SAMPLES; the first of each label, or of each place of a row's largest entry, up to
    KINDS; of real numbers the least and the greatest.
    """

    def __init__(self) -> None:
        """None yet."""
        self._first: list[Tensor] = []
        self._kinds: dict[int, Tensor] = {}
        self._ends: list[tuple[float, Tensor]] = []

    def add(self, y: Tensor) -> None:
        """Targets of more samples, as `prepare_targets` leaves them: [b] or [b, ...]."""
        y = y.detach().cpu()
        if not len(y):
            return
        self._first += list(y[: SAMPLES - len(self._first)])
        rows = y.reshape(len(y), -1)
        if rows.shape[1] > 1:
            kinds = rows.double().argmax(1)
        elif not y.is_floating_point():
            kinds = rows[:, 0]
        else:
            for k in {int(rows.argmin()), int(rows.argmax())}:
                self._ends.append((float(rows[k]), y[k]))
            self._ends = sorted(self._ends, key=lambda end: end[0])
            self._ends = [self._ends[0], self._ends[-1]]
            return
        for kind in kinds.unique().tolist():
            if kind not in self._kinds and len(self._kinds) < KINDS:
                self._kinds[kind] = y[int((kinds == kind).nonzero()[0])]

    def targets(self) -> Tensor:
        """Those, [b] or [b, ...], on the CPU."""
        ends = [y for _, y in self._ends]
        return torch.stack([*self._first, *self._kinds.values(), *ends])


def loss_problem(loss: ConvexLoss, outputs: int, targets: Tensor) -> str:
    """Why bounds of `loss` would not hold or not be evaluated, for these targets; "" for no reason.

    targets: as of `counterexample`. Losses whose constants the package has derived are not tried.
    """
    if loss.known:
        return ""
    try:
        reason = counterexample(loss, outputs, targets)
    except Exception as error:  # whatever the user's own function raises
        reason = (
            f"fails on float64 outputs [{len(targets)}, {outputs}], in which bounds are "
            f"evaluated ({type_and_line(error)}); let its own tensors follow "
            "outputs.dtype and outputs.device"
        )
    if reason and _of_torch(loss.function):
        reason += "; one of torch's own needs no declaration: give it itself as the loss"
    return f"loss: {loss.name}: {reason}" if reason else ""


def _of_torch(function: Any) -> bool:
    """Whether calling it does what torch's documentation says, and nothing else."""
    if isinstance(function, partial):
        return _of_torch(function.func)
    kind = type(function) if isinstance(function, nn.Module) else function
    return str(getattr(kind, "__module__", "")).split(".")[0] == "torch"


def _tried_on_made_up(loss: ConvexLoss) -> str:
    """`counterexample` with labels, one-hot rows and 0 or 1, whichever the function takes."""
    labels = torch.tensor([0, 2, 1, 1], device="cpu")
    one_hot = F.one_hot(labels, 3).double()
    for outputs, targets in ((3, labels), (3, one_hot), (1, one_hot[:, :1])):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of shapes that do not fit
                reason = counterexample(loss, outputs, targets)
            if reason:
                return reason
        except Exception:  # noqa: S112  not its kind of targets: its own are tried later
            continue
    return ""
