"""The bound of Theorem 1 as a curve over the steps of the second phase.

The last layer's objective L is convex and L_H-smooth over fixed features, so that for *every*
comparator v, with R_v = ||v - w^tau||_F:

(i)  w <- w - grad L(w) / L_H:    L(w^t) <= L(v) + L_H R_v^2 / (2 (t - tau));
(ii) w <- w - eta_k g_k, E[g_k | w^k] = grad L(w^k), E ||g_k||^2 <= G^2:
     E[min_k L(w^k)] <= L(v) + (R_v^2 + G^2 sum_k eta_k^2) / (2 sum_k eta_k), k = tau .. t - 1.

The paper takes v among the minimisers. For cross-entropy over features of full rank the infimum 0
is not attained and there is none: its proof holds for every v, and the least right side is taken
over a family (comparators.py).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.arrays import as_data
from ..linalg.bounds import UNDERFLOW, bound_text, plus
from ..model.losses import (
    CROSS_ENTROPY,
    SQUARED_ERROR,
    ConvexLoss,
    Telling,
    loss_problem,
    prepare_targets,
    resolve_loss,
)
from ..ops._arguments import number
from .comparators import Blocks, Comparator, comparators
from .loss_rounding import ASSUMED

__all__ = ["Blocks", "Comparator", "Guarantee", "comparators", "guarantee", "smoothness"]

ENOUGH, ITERATIONS = 1.01, 30  # of the power iteration: upper / lower bound, passes at most
UNIT = 2.0**-53
ARITHMETIC = "float64 rounds to nearest, its exp and log within 4 units in the last place"
MEASURED = 32  # eps of the weights' dtype by which a measured loss may be off
CHECK = (
    "check that the loss is convex with the L_ell declared and a mean over the samples, that "
    "nothing but the steps changed weights or features (a callback?), and the rounding of the run "
    "(precision='float64')"
)


@dataclass
class Guarantee:
    """What Theorem 1 says of a run: the premise audit and, where it applies, the bound.

    mode: the second phase. premises: (name, "held" | "failed" | "not checked", evidence). curve:
    one dict a point: steps (t - tau), bound, comparator, and loss, the measured objective, where it
    is known; empty where no bound is claimed. in_expectation: the bound is one of the mean over the
    draws of mini-batches, and of the least loss so far. rigorous: False where a constant of it was
    measured. constants: L_H and l2, or G^2. assumptions: what the evaluation of the bound takes for
    granted. refuted: where a measured loss lies above its bound, and what to check then, as the
    bound is none; "" where none does. reason: why there is no curve where one was asked for. notes:
    what else there is to say: which weights the curve ends at, how far a minimum is.
    """

    mode: str
    premises: list[tuple[str, str, str]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    constants: dict[str, float] = field(default_factory=dict)
    in_expectation: bool = False
    rigorous: bool = True
    assumptions: list[str] = field(default_factory=list)
    refuted: str = ""
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def closest(self) -> dict[str, Any] | None:
        """The point where the bound is closest above the measured loss, as a ratio."""
        known = [p for p in self.curve if p["steps"] and p.get("loss", 0) > 0]
        return min(known, key=lambda p: p["bound"] / p["loss"], default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """The audit and the bound for a person."""
        lines = [f"Theorem 1, premises (second_phase={self.mode!r}):"]
        width = max((len(name) for name, _, _ in self.premises), default=0)
        lines += [f"  {n:<{width}}  {status:<11}  {why}" for n, status, why in self.premises]
        if not self.curve and self.notes:
            return "\n".join([*lines, *(f"  {note}" for note in self.notes)])
        if not self.curve:
            why = f": {self.reason}" if self.reason else ""
            return "\n".join([*lines, f"  no bound is claimed{why}"])
        last = self.curve[-1]
        kind = "on average over the draws" if self.in_expectation else "at every step"
        measured = f", measured {last['loss']:.4e}" if "loss" in last else ""
        bound = f"loss <= {bound_text(last['bound'], 5, upper=True)} after {last['steps']} steps"
        if self.refuted:
            lines.append(f"  REFUTED {kind}: {bound}{measured}")
            lines.append(f"  {self.refuted}")
        else:
            lines.append(f"  guaranteed {kind}: {bound}{measured}")
        closest = None if self.refuted else self.closest
        if closest:
            ratio = closest["bound"] / closest["loss"]
            lines.append(f"  closest: {ratio:.3g} times the loss after {closest['steps']} steps")
        if not self.rigorous:
            lines.append("  with a measured bound of the gradients: no proof")
        lines += [f"  {note}" for note in self.notes]
        if self.assumptions:
            lines.append(f"  assumed: {'; '.join(self.assumptions)}")
        return "\n".join(lines)


@torch.no_grad()
def smoothness(
    blocks: Blocks, *, loss: Any, form: str = "tight", ones: bool = True, l2: float = 0.0
) -> float:
    """L_H of the last layer's objective over fixed features, rounded up.

    blocks: a function that starts a pass over (h [b, m], targets), any floating dtype. form:
    "paper", (L_ell / n) sum_i ||[h_i, 1]||^2 as in Theorem 1, or "tight", an upper bound of
    (L_ell / n) lambda_max(M^T M), M = [h, 1]: Collatz's max_i (A x)_i / x_i for A = |M|^T |M| and
    x > 0 from a power iteration, at most the paper's form. Of samples that differ in curvature
    (weights of samples or classes) each row counts with its own constant, r_i L_ell. l2 is added.
    Raises ValueError for an
    unknown form, l2 < 0, no sample, and features that are not finite.
    """
    if form not in ("tight", "paper"):
        raise ValueError(f"form: expected 'tight' or 'paper', got {form!r}")
    if not 0 <= l2 < math.inf:
        raise ValueError(f"l2: expected a number >= 0, got {l2}")
    resolved = resolve_loss(loss)
    constant = resolved.smoothness
    x, trace, n, seen = None, 0.0, 0, False
    upper = math.inf
    for _ in range(ITERATIONS if form == "tight" else 1):
        product, trace, n = None, 0.0, 0
        for h, targets in blocks():
            m = _with_ones(h, ones).abs_()
            if (scale := resolved.row_scale(targets)) is not None:
                m *= scale[:, None]
            if x is None:
                x = m.new_ones(m.shape[1])
            trace, n = trace + float(m.square().sum()), n + len(m)
            seen = seen or bool(m.any())
            part = m.T @ (m @ x)
            product = part if product is None else product.add_(part)
        if product is None or x is None:
            raise ValueError("blocks: expected at least one sample, got none")
        rounding = 1 + 4 * (n + len(x) + 4) * UNIT  # sums of numbers >= 0, two in a row
        trace *= rounding
        upper = min(upper, float((product / x).max()) * rounding, trace)
        lower = float(x @ product) / float(x @ x)
        if upper <= ENOUGH * lower:
            break
        x = (product / product.max()).clamp_min(1e-9)
    largest = trace if form == "paper" else upper
    if seen:
        largest = max(largest, UNDERFLOW)  # squares that vanish
    if not largest < math.inf:
        raise ValueError("blocks: expected finite features, got NaN, infinity or too large ones")
    return float((constant / n * largest + l2) * (1 + 4 * UNIT))


@torch.no_grad()
@torch.inference_mode(False)
def guarantee(
    features: Blocks | tuple[Any, Any],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    loss: Any = "cross_entropy",
    mode: str = "gd",
    steps: Sequence[int],
    losses: Sequence[float] | None = None,
    smoothness: str | float = "tight",
    l2: float = 0.0,
    rates: Sequence[float] | None = None,
    gradient_bound: float | None = None,
    candidates: Sequence[tuple[Any, ...]] = (),
    ones: bool | None = None,
    passes: float = math.inf,
) -> Guarantee:
    """Theorem 1's bound at the given numbers of steps since tau, minimised over comparators.

    features: (h [n, m], targets), tensors or arrays, or a function that starts a pass over such
    blocks of tensors. weight [k, m], bias [k] or None: the last layer at tau; ones: whether the
    bias is trained (default: where there is one). loss, l2: the objective, mean loss +
    (l2 / 2) ||w||^2.
    steps: t - tau, >= 0; at 0 bound and loss are L(w^tau) itself. losses: measured objectives
    there. The theorem is one of exact arithmetic: a run's own rounding comes on top of the bound.
    mode "gd", part (i): smoothness is L_H, or the form in which it is computed. mode "sgd", part
    (ii): rates are eta of every step, as many as the largest of steps; G^2 = 2 max ||[h_i, 1]||^2
    for cross-entropy, because ||softmax - one-hot||_2^2 <= 2, and gradient_bound for another loss,
    measured. candidates: (name, weight, bias) of other comparators, such as the last weights.
    passes: see `comparators`.

    A measured loss above its bound, by more than rounding in the weights' dtype, refutes it: see
    `Guarantee`. In mode "sgd" the bound is one of a mean, which no single run refutes.

    Raises ValueError for an unknown mode, for missing or unfitting rates, losses, gradient_bound or
    shapes, for labels out of range, for features that are not finite, and for a loss that is seen
    not to be what it declares; TypeError for labels that are not integers and for complex numbers.
    """
    resolved = resolve_loss(loss)
    if not isinstance(steps, Iterable):
        raise TypeError(f"steps: expected integers, got {type(steps).__name__}")
    known = list(steps)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {tensor.dtype}")
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    l2 = number(l2, "l2")
    ones = bias is not None if ones is None else ones
    if weight.dim() != 2:
        raise ValueError(f"weight: expected 2 dimensions [k, m], got {list(weight.shape)}")
    blocks = _blocks(features, resolved, len(weight))
    if mode not in ("gd", "sgd"):
        raise ValueError(f"mode: expected 'gd' or 'sgd', got {mode!r}")
    if not known or not all(isinstance(t, int) and t >= 0 for t in known):
        raise ValueError(f"steps: expected integers >= 0, at least one, got {known[:5]}")
    if not 0 <= l2 < math.inf or (l2 and mode == "sgd"):
        raise ValueError(f"l2: expected a number >= 0, and 0 for mode 'sgd', got {l2}")
    resolved = _checked(blocks, weight, bias, resolved)
    if losses is not None and len(losses) != len(known):
        raise ValueError(f"losses: expected {len(known)}, as many as steps, got {len(losses)}")
    result = Guarantee(mode=mode, in_expectation=mode == "sgd", assumptions=[ARITHMETIC])
    if not resolved.known:
        result.assumptions.append(
            f"{resolved.name} is convex in the output with L_ell = {resolved.smoothness:g}, as "
            "declared"
        )
    if resolved not in (CROSS_ENTROPY, SQUARED_ERROR):
        result.assumptions.append(f"the evaluation of {resolved.name} in float64: {ASSUMED}")
    if mode == "gd":
        largest = _smoothness(blocks, resolved, smoothness, ones, l2)
        result.constants = {"L_H": largest, "l2": l2}
        weights = {t: (largest / (2 * t), 0.0) for t in known if t}
    else:
        weights = _sgd_weights(result, blocks, resolved, known, rates, gradient_bound, ones)
    family = comparators(
        blocks,
        weight,
        bias,
        loss=resolved,
        l2=l2,
        candidates=candidates,
        ones=ones,
        distances=[factor for factor, _ in weights.values()],
        passes=passes,
    )
    start = _known(family[0].loss)  # w^tau's own
    measured = [None] * len(known) if losses is None else list(losses)
    for t, loss_there in zip(known, measured, strict=True):
        point: dict[str, Any] = {"steps": t, "bound": start, "comparator": "w^tau"}
        if t:
            factor, rest = weights[t]
            rest *= 1 + 8 * UNIT
            value, best = min(
                (_known(plus(v.loss, factor * v.distance2 * (1 + 8 * UNIT), rest)), i)
                for i, v in enumerate(family)
            )
            point["bound"], point["comparator"] = value, family[best].name
        if loss_there is not None:  # at w^tau itself one evaluation serves for both
            point["loss"] = float(loss_there) if t else start
        result.curve.append(point)
    result.refuted = "" if result.in_expectation else refuted(result.curve, start, weight.dtype)
    return result


def refuted(curve: list[dict[str, Any]], start: float, dtype: torch.dtype) -> str:
    """Where the measured losses are above their bounds, "" where none is; start: at w^tau."""
    known = [p for p in curve if "loss" in p]
    eps = torch.finfo(dtype).eps
    above = [
        p
        for p in known
        if not p["loss"] <= p["bound"] + MEASURED * eps * (abs(p["loss"]) + abs(start))
    ]
    if not above:
        return ""
    p = above[0]
    return (
        f"measured above the bound at {len(above)} of {len(known)} points, first after "
        f"{p['steps']} steps: {p['loss']:.6g} > {bound_text(p['bound'], 6, upper=True)}; {CHECK}"
    )


def _known(bound: float) -> float:
    """Infinite, which is no bound, where it overflowed to NaN."""
    return math.inf if math.isnan(bound) else bound


def _blocks(features: Blocks | tuple[Any, Any], loss: ConvexLoss, outputs: int) -> Blocks:
    if not isinstance(features, tuple):
        return features
    h, y = (as_data(part, name=f"features[{i}]") for i, part in enumerate(features))
    targets = prepare_targets(loss, y, outputs, name="features[1]")
    return lambda: [(h, targets)]


def _checked(blocks: Blocks, weight: Tensor, bias: Tensor | None, loss: ConvexLoss) -> ConvexLoss:
    """The loss over these targets; ValueError for what does not fit, or is not finite.

    ValueError too for a loss that is not what it declares, TypeError for complex numbers.
    """
    n, telling, seen = 0, Telling(), list[Tensor]()
    for h, targets in blocks():
        for name, part in (("features", h), ("targets", targets)):
            if part.is_complex():
                raise TypeError(f"features: expected real {name}, got {part.dtype}")
        if h.device != weight.device:
            raise ValueError(
                f"features: expected the device of weight, {weight.device}, got {h.device}"
            )
        if h.dim() != 2 or h.shape[1] != weight.shape[1]:
            raise ValueError(
                f"weight: expected [k, m] beside features [n, m], got {list(weight.shape)} beside "
                f"{list(h.shape)}"
            )
        # NaN passes through both; one pass, where isfinite makes a copy
        if h.numel() and not all(bool(torch.isfinite(end)) for end in h.aminmax()):
            raise ValueError("features: expected finite numbers, got NaN or infinity")
        if len(targets) != len(h):
            raise ValueError(f"features: {len(h)} rows do not fit {len(targets)} targets")
        if targets.is_floating_point() and not bool(torch.isfinite(targets).all()):
            raise ValueError("features: expected finite targets, got NaN or infinity")
        telling.add(targets)
        seen.append(targets)
        n += len(h)
    if n == 0:
        raise ValueError("features: expected at least one sample, got none")
    if problem := loss_problem(loss, len(weight), telling.targets().to(weight.device)):
        raise ValueError(problem)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{len(weight)}], got {list(bias.shape)}")
    return loss.over(torch.cat(seen), len(weight))


def _smoothness(features: Blocks, loss: Any, given: str | float, ones: bool, l2: float) -> float:
    """L_H as given, or in the form asked for."""
    if isinstance(given, str):
        return smoothness(features, loss=loss, form=given, ones=ones, l2=l2)
    if not 0 < given < math.inf:
        raise ValueError(f"smoothness: expected a form or a number > 0, got {given}")
    return float(given)


def _sgd_weights(
    result: Guarantee,
    features: Blocks,
    loss: Any,
    steps: list[int],
    rates: Sequence[float] | None,
    gradient_bound: float | None,
    ones: bool,
) -> dict[int, tuple[float, float]]:
    """Step -> (factor of R_v^2, the rest of the right side)."""
    if rates is None or len(rates) < max(steps):
        got = "none" if rates is None else len(rates)
        raise ValueError(f"rates: expected one for each of {max(steps)} steps, got {got}")
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError("rates: expected finite numbers > 0")
    if loss is CROSS_ENTROPY:
        squares = [float(_with_ones(h, ones).square().sum(1).max()) for h, _ in features()]
        square = 2 * max(squares) * (1 + 2**-20)
    elif gradient_bound is None or not 0 <= gradient_bound < math.inf:
        raise ValueError(
            f"gradient_bound: expected E ||g||^2 <= G^2 for {loss.name}, got {gradient_bound}"
        )
    else:
        square, result.rigorous = float(gradient_bound), False
    result.constants = {"G^2": square}
    sums = torch.tensor(list(rates), dtype=torch.float64, device="cpu").cumsum(0)
    squares_of = torch.tensor(list(rates), dtype=torch.float64, device="cpu").square().cumsum(0)
    up = 1 + 2 * len(rates) * UNIT
    weights = {}
    for t in steps:
        if t:
            total = 2 * float(sums[t - 1]) / up
            weights[t] = (1 / total, square * float(squares_of[t - 1]) * up / total)
    return weights


def _with_ones(h: Tensor, ones: bool) -> Tensor:
    """M's rows in float64, a fresh tensor."""
    h = h.to(torch.float64, copy=True)
    return torch.cat([h, h.new_ones(len(h), 1)], 1) if ones else h
