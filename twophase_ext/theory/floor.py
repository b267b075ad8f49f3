"""L_floor: the least training loss that data with equal inputs leave any network.

G_1 .. G_N: the groups of equal inputs. A network gives one output q_g to a group, whatever its
weights, so that

    L(w) >= L_floor = (1 / n) sum_g inf_q sum_(i in G_g) l(q, y_i)    for every network and every w.

Under Assumption 1', rank [h_X', 1] = N over the distinct inputs X', the last layer gives the groups
any outputs: then L_floor is the infimum of L over all weights (docs/theory.md has the proof).
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.arguments import integer
from ..core.arrays import as_data, require_finite
from ..linalg.bounds import UNIT_ROUNDOFF, above, below, bound_text
from ..model.groups import firsts, groups_of
from ..model.labels import as_targets
from ..model.losses import ConvexLoss, prepare_targets, resolve_loss, split, unweighted
from ..model.torch_losses import HuberLoss, LogisticLoss, SoftmaxLoss, SquaresLoss, TorchLoss
from . import closed_floors
from .small_minimum import enclosed_infimum

ENTRIES = 1 << 22  # of targets, at a time
SOLVES = 200  # of declared losses: kinds of groups whose infimum is looked for


@dataclass(frozen=True)
class LossFloor:
    """lower <= L_floor <= upper, proved, rounding included.

    n: samples; distinct: N; repeated: groups of two samples or more; disagreeing: those of them
    whose targets are not all the same. loss: its name. attained: whether the infimum is a minimum
    over outputs (None: not known); cross-entropy of agreeing labels has the infimum 0 and no
    minimum. reason: why nothing better is known, "" where lower and upper are rounding apart.
    """

    lower: float
    upper: float
    n: int
    distinct: int
    repeated: int
    disagreeing: int
    loss: str
    attained: bool | None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """Two lines for a person."""
        groups = "1 group" if self.repeated == 1 else f"{self.repeated} groups"
        equal = (
            f"{self.n} samples, {self.distinct} distinct inputs; {groups} of equal inputs, "
            f"{self.disagreeing} with targets that disagree"
        )
        if not math.isfinite(self.lower):
            return f"no lower bound of {self.loss} is known: {self.reason}\n{equal}"
        text = f"{self.loss} >= {bound_text(self.lower, 6)} for all weights of every network"
        if self.reason:
            upper = bound_text(self.upper, 6, upper=True)
            text += f"; its infimum is at most {upper} ({self.reason})"
        return f"{text}\n{equal}"


def loss_floor(
    x: Any,
    y: Any,
    loss: Any = "cross_entropy",
    *,
    weights: Any = None,
    outputs: int | None = None,
) -> LossFloor:
    """The least training loss that any network, whatever its weights, can have on (x, y).

    x: n inputs as the model is fed, tensor or array [n, ...], or a dict or tuple of them; equal
    ones are found by content (`model/groups.py`). y: targets as the loss takes them. loss: as the
    Trainer's. weights [n] >= 0: of the samples; the objective is then the Trainer's weighted mean,
    sum_i c_i l_i / sum_i c_i (of a loss with class weights the sum of c_i times these, as torch's
    mean of repeated samples has it). outputs: m_y, needed only where the targets do not show it.

    Cross-entropy: (1 / n) sum_g sum_c n_gc log(n_g / n_gc), the entropy of the label given the
    input; squared error: the mean squared distance from the group's mean; binary cross-entropy,
    output by output, as cross-entropy; Huber losses by the root of a piecewise linear derivative;
    a `ConvexLoss` by a small minimisation with a certified lower bound, where its curvature allows
    one (assumed: the evaluation errs as loss_rounding.py says).

    Returns a LossFloor. Raises ValueError and TypeError as the Trainer for unusable inputs, targets
    and losses; ValueError for weights that are negative, not finite or all 0, and where `outputs`
    is needed.
    """
    resolved = resolve_loss(loss)
    groups = groups_of(x)
    targets = as_targets(y, "y")[0].cpu()
    if len(groups) == 0:
        raise ValueError("x: the data set is empty")
    if targets.dim() == 0 or len(targets) != len(groups) or targets.numel() == 0:
        raise ValueError(f"y: expected {len(groups)} targets, got {list(targets.shape)}")
    require_finite(targets, "y", "target")
    k = _outputs(resolved, targets) if outputs is None else integer("outputs", outputs, 1)
    targets = prepare_targets(resolved, targets, k, "y")
    found = floor_of(resolved, groups, targets, k, sample_weights(weights, len(groups)))
    # of labels alone: an output that no label names would keep the infimum from being attained
    guessed = outputs is None and targets.dim() == 1
    return replace(found, attained=None) if guessed and found.attained else found


def floor_of(
    loss: ConvexLoss,
    groups: Tensor,
    y: Tensor,
    outputs: int,
    weights: Tensor | None = None,
    *,
    solves: int = SOLVES,
) -> LossFloor:
    """`loss_floor` for groups as `groups_of` numbers them and prepared targets, on the CPU.

    Of a `WeightedLoss` the targets carry the weights, and `weights` is None.
    solves: small minimisations of a declared loss that are made at most.
    """
    n, name = len(groups), loss.name
    y, own = split(loss, y)
    c, loss = own.double() if weights is None else weights, unweighted(loss)
    d = loss.divisor(y) if isinstance(loss, TorchLoss) else torch.ones_like(c)
    whole = math.fsum((c * d).tolist())
    if not whole > 0:
        raise ValueError(f"loss: {name}: expected a sample that counts, got none")
    sizes = groups.bincount()
    counted = (c > 0) & (d > 0)
    apart = _disagreeing(groups, y, counted)
    lower, upper, attained, reason = _infimum(loss, groups, y, outputs, c, apart, solves)
    if isinstance(loss, TorchLoss):
        lower = max(lower, 0.0)  # a sum of functions >= 0
    return LossFloor(
        lower=_quotient(lower, whole, -math.inf),
        upper=_quotient(upper, whole, math.inf),
        n=n,
        distinct=len(sizes),
        repeated=int((sizes > 1).sum()),
        disagreeing=len(apart),
        loss=name,
        attained=attained,
        reason=reason,
    )


def _quotient(value: float, whole: float, towards: float) -> float:
    """value / whole, rounded towards an infinity; whole is within two units of exact."""
    if value == 0 or not math.isfinite(value):
        return towards if math.isnan(value) else value
    found = value / whole
    for _ in range(4):
        found = math.nextafter(found, towards)
    return found


def _disagreeing(groups: Tensor, y: Tensor, counted: Tensor) -> Tensor:
    """Numbers of the groups in which two samples that count have different targets."""
    members, rows = groups[counted], y[counted].reshape(int(counted.sum()), -1)
    own, inverse = members.unique(return_inverse=True)
    differ = (rows != rows[firsts(inverse)][inverse]).any(1) if len(own) else members.bool()
    return members[differ].unique()


def _infimum(
    loss: ConvexLoss,
    groups: Tensor,
    y: Tensor,
    outputs: int,
    c: Tensor,
    apart: Tensor,
    solves: int,
) -> tuple[float, float, bool | None, str]:
    """(lower, upper, attained, reason) of sum_g inf_q sum_i c_i g_i(q)."""
    chosen = c > 0
    only_apart = torch.isin(groups, apart)
    if isinstance(loss, SoftmaxLoss):
        plain = not y.is_floating_point() and not loss.label_smoothing
        # elsewhere one entry of t is positive, or none: the infimum is 0
        part = chosen & only_apart & (y != loss.ignore_index) if plain else chosen
        value, error, full = _entropy(loss, groups, y, outputs, c, part)
        return *_around(value, error, 1.0), full and bool(part[chosen].all()), ""
    if isinstance(loss, LogisticLoss):
        value, error, full = _entropy(loss, groups, y, outputs, c, chosen)
        return *_around(value, error, 1 / outputs), full, ""
    if isinstance(loss, SquaresLoss | HuberLoss):
        value, error = 0.0, 0.0
        for rows, members in _parts(groups, chosen & only_apart, outputs):
            aims, own = y[rows].double().numpy(), c[rows].numpy()
            if isinstance(loss, SquaresLoss):
                more, wrong = closed_floors.squares(aims, own, members)
            else:
                more, wrong = closed_floors.huber(aims, own, members, loss.delta)
            value, error = value + more, error + wrong
        return *_around(value, error, loss.scale(outputs)), True, ""
    return _declared(loss, groups, y, outputs, c, chosen, solves)


def _around(value: float, error: float, scale: float) -> tuple[float, float]:
    """Bounds of scale times a number within error of value; scale is within two units of exact."""
    if error == 0:  # every group agrees: nothing was rounded
        return value * scale, value * scale
    if not math.isfinite(value + error):
        return -math.inf, math.inf
    error = (error + 8 * UNIT_ROUNDOFF * abs(value)) * scale
    return below(value * scale - error), above(value * scale + error)


def _entropy(
    loss: SoftmaxLoss | LogisticLoss,
    groups: Tensor,
    y: Tensor,
    outputs: int,
    c: Tensor,
    part: Tensor,
) -> tuple[float, float, bool]:
    """Value and error over the samples in `part`; whether all of t is positive in every group."""
    value, error, full = 0.0, 0.0, True
    for rows, members in _parts(groups, part, 2 * outputs):
        t = loss.terms(y[rows], outputs)
        flat = (t * c[rows].reshape(-1, *[1] * (t.dim() - 1))).reshape(len(rows), -1).numpy()
        whole = np.add.reduceat(flat, closed_floors.starts_of(members), axis=0)
        if isinstance(loss, LogisticLoss):  # every output is a problem of two classes
            ones, zeros = whole[:, 0::2], whole[:, 1::2]
            whole = np.stack([ones.ravel(), zeros.ravel()], 1)
            members = np.repeat(members, outputs)
        more, wrong = closed_floors.entropy(whole, members)
        value, error = value + more, error + wrong
        full = full and bool(((whole > 0).all(1) | (whole == 0).all(1)).all())
    return value, error, full


def _parts(
    groups: Tensor, part: Tensor, columns: int
) -> Iterator[tuple[Tensor, np.ndarray[Any, np.dtype[np.int64]]]]:
    """(samples of whole groups, group by group; members of each), some ENTRIES at a time."""
    rows = part.nonzero().flatten()
    rows = rows[groups[rows].argsort(stable=True)]
    if not len(rows):
        return
    members = groups[rows].unique_consecutive(return_counts=True)[1]
    size = max(ENTRIES // max(columns, 1), 1)
    number = (members.cumsum(0) - 1).div(size, rounding_mode="floor")
    counts = number.unique_consecutive(return_counts=True)[1].tolist()
    for own in members.split(counts):
        taken = int(own.sum())
        yield rows[:taken], own.numpy()
        rows = rows[taken:]


def _declared(
    loss: ConvexLoss,
    groups: Tensor,
    y: Tensor,
    outputs: int,
    c: Tensor,
    chosen: Tensor,
    solves: int,
) -> tuple[float, float, bool | None, str]:
    """By a small minimisation for each kind of group."""
    if not solves:
        least = loss.least * math.fsum(c.tolist()) if loss.least else 0.0
        return below(least) if least else 0.0, math.inf, None, "no minimisation was made"
    kinds: dict[bytes, tuple[Tensor, int]] = {}
    for rows, members in _parts(groups, chosen, outputs):
        for own in rows.split(members.tolist()):
            flat = torch.cat([y[own].double().reshape(len(own), -1), c[own, None]], 1)
            key = torch.unique(flat, dim=0, return_counts=True)
            name = b"".join(part.numpy().tobytes() for part in key)
            kinds[name] = (own, kinds[name][1] + 1 if name in kinds else 1)
    lower, upper, reason = 0.0, 0.0, ""
    for number, (own, count) in enumerate(kinds.values()):
        targets, weight = y[own], c[own]
        if number < solves:
            low, high = enclosed_infimum(loss, targets, weight, outputs)
            why = "the infimum of a group is not attained, or has no curvature about it"
        else:
            low, high = -math.inf, math.inf
            why = f"there are more than {solves} kinds of groups"
        least = loss.least * float(weight.sum())
        if low < least or not math.isfinite(low):
            low, reason = least, why
        lower, upper = lower + count * low, upper + count * high
    slack = 1 + 8 * len(kinds) * UNIT_ROUNDOFF
    return lower - (slack - 1) * abs(lower), upper + (slack - 1) * abs(upper), None, reason


def _outputs(loss: ConvexLoss, y: Tensor) -> int:
    """m_y, where the targets or the loss show it."""
    if y.dim() > 1 and (y.shape[1] > 1 or not isinstance(loss, SoftmaxLoss)):
        return int(y.shape[1])
    if not isinstance(loss, SoftmaxLoss):
        if y.is_floating_point() or isinstance(loss, TorchLoss):
            return 1
    elif loss.weight is not None:
        return len(loss.weight)
    elif not loss.label_smoothing:
        return max(int(y.max()) + 1, 1)
    raise ValueError(
        f"outputs: expected the number of the network's outputs, which {loss.name} depends on"
    )


def sample_weights(weights: Any, n: int) -> Tensor | None:
    """The argument `weights`, float64 [n] on the CPU; ValueError where it is none."""
    if weights is None:
        return None
    c = as_data(weights, name="weights").cpu().double()
    if c.shape != (n,):
        raise ValueError(f"weights: expected the shape [{n}], got {list(c.shape)}")
    if not (bool((c >= 0).all() & c.isfinite().all()) and bool(c.any())):
        raise ValueError("weights: expected finite numbers >= 0, not all of them 0")
    return c
