"""A backbone that bounds can resolve: residual branches made small, or switched off.

A deep network's error bounds may exceed the spread of its features. Assumption 1 asks for some
weights, so a witness is free to choose tamer ones: factors on the weight and bias of the last
affine map of each residual branch. With factor 0 a branch need not be computed; a few branches
stay on where the samples would not be told apart without them (a class token sees the image through
attention alone). Where there are none that help, the affine maps after the first one become near
isometries: orthogonal matrices, in a convolution on its middle pixel, whose norm is 1.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..linalg.progress import Stage
from .bounded import Unbounded
from .problem import Problem
from .running.features import running
from .separation import separate
from .thinning import changed, free_names, thin_weights
from .witness import whiten

PILOT = 64  # samples that choose the backbone
SHOWN = 2  # samples whose pass shows where the branches are
# Factors of residual branches (beside a shortcut with weights, beside an identity), tried in order.
DAMPINGS = ((1.0, 1.0), (1.0, 0.0), (0.25, 0.0), (0.0, 0.0))
KEPT = 6  # branches, of the first ones, that are tried as the only ones left
ENOUGH = 0.75  # of the directions that there can be: then no branch is tried alone
# Of a backbone that costs little: numbers of a sample after each affine map, tried in order;
# channels at most, as so many features do for very many samples; samples that choose it; samples
# from which on it is tried.
THIN, CHANNELS, THIN_PILOT, MANY = (1 << 13, 1 << 14, 1 << 16), 256, 1024, 1024
# The same where features need only be distinct: numbers that are tried first, and distances over
# errors on the pilot samples, as among more samples there are nearer ones.
THINNEST, SPARE = 1 << 10, 1e6


class Branch(NamedTuple):
    """A residual branch: names of its last affine map's parameters, in the model's state dict.

    plain: whether the shortcut beside it has no affine map of its own.
    """

    parameters: tuple[str, ...]
    plain: bool


def branches(
    model: nn.Module, stop: list[nn.Module], x: Tensor, norms: dict[Any, Any] | None = None
) -> list[Branch]:
    """The residual branches of a float64 model before the layer stop[0], in order, as it runs on x.

    Those whose last affine map is frozen (requires_grad=False) are left out.
    """
    free = free_names(model)
    found = dict.fromkeys(
        Branch(names, plain) for names, plain in running(model, stop, x, norms).tape.branches()
    )
    return [branch for branch in found if free.issuperset(branch.parameters)]


def isometries(model: nn.Module, stop: list[nn.Module], x: Tensor) -> dict[str, Tensor]:
    """Entries of the state dict that make every trainable affine map but the first one orthogonal.

    Of convolutions the middle pixel, for each group; biases are zero.
    """
    state, free = model.state_dict(), free_names(model)
    steps = running(model, stop, x).tape.steps.values()
    weighted = list(dict.fromkeys(step.weights for step in steps if step.weights))
    changed: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for names in weighted[1:]:
        own = state[names[0]]
        groups = max(1, _channels(model, names[0]) // own.shape[1]) if own.dim() > 2 else 1
        if not free.issuperset(names) or own.dim() < 2 or own.shape[0] % groups:
            continue
        weight = torch.zeros(own.shape, dtype=own.dtype, device=own.device)
        if weight.dim() == 2:
            weight.copy_(_orthogonal(weight.shape[0], weight.shape[1], generator))
        else:
            parts = [
                _orthogonal(weight.shape[0] // groups, weight.shape[1], generator)
                for _ in range(groups)
            ]
            taps = weight.flatten(2)
            taps[:, :, _middle(weight.shape[2:])] = torch.cat(parts).to(weight)
        changed[names[0]] = weight
        changed |= {name: torch.zeros_like(state[name]) for name in names[1:]}
    return changed


def _middle(sizes: Sequence[int]) -> int:
    """The middle pixel of a kernel, counted row by row."""
    place = 0
    for size in sizes:
        place = place * size + size // 2
    return place


def _channels(model: nn.Module, name: str) -> int:
    """Channels that go into the convolution whose weight has this name."""
    found: int = getattr(model.get_submodule(name.rpartition(".")[0]), "in_channels", 1)
    return found


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows or columns, whichever are fewer."""
    size = max(rows, columns), min(rows, columns)
    drawn = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    found = torch.linalg.qr(drawn).Q
    return found if rows >= columns else found.T


def damped(model: nn.Module, found: list[Branch], factors: list[float]) -> dict[str, Tensor]:
    """Entries of the state dict that multiply every branch by its factor."""
    state = model.state_dict()
    return {
        name: state[name].detach() * factor
        for branch, factor in zip(found, factors, strict=True)
        for name in branch.parameters
        if factor != 1
    }


class _Choice(NamedTuple):
    """what: for a person. factors: of the branches; tame: whether the other maps are isometries.
    enough: share of the directions that there can be; where an earlier choice resolves as many,
    this one is not tried.
    """

    what: str
    factors: list[float]
    enough: float
    tame: bool = False


def _choices(found: list[Branch]) -> Iterator[_Choice]:
    """From the model's own backbone on; equal ones once."""
    tried: set[tuple[Any, ...]] = set()

    def choices() -> Iterator[_Choice]:
        for first, second in DAMPINGS:
            factors = [second if branch.plain else first for branch in found]
            own = all(factor == 1 for factor in factors)
            what = f"residual branches times {first:g} (beside an identity: {second:g})"
            yield _Choice("the model's own" if own else what, factors, 1.0)
        for width in (1, 2):
            for k in range(min(KEPT, len(found) - width + 1)):
                factors = [float(k <= i < k + width) for i in range(len(found))]
                kept = ", ".join(found[i].parameters[0] for i in range(k, k + width))
                yield _Choice(f"residual branches off but for {kept}", factors, ENOUGH)
        for factor in (1.0, 0.0) if found else (1.0,):
            what = f"isometries after the first map, residual branches times {factor:g}"
            yield _Choice(what, [factor] * len(found), ENOUGH, tame=True)

    for choice in choices():
        key = choice.tame, *choice.factors
        if key not in tried:
            tried.add(key)
            yield choice


class _Tried(NamedTuple):
    apart: bool  # every two pilot samples, beyond their errors
    resolved: int
    possible: int
    what: str
    changes: dict[str, Tensor]


def choose_backbone(problem: Problem, stage: Stage, wide: nn.Linear, *, apart: bool = False) -> str:
    """Damp residual branches where that resolves more directions of the features.

    Tried on the first PILOT samples; what tells them all apart, then what resolves most wins, the
    earlier choice on a tie. wide: the layer that the features enter. apart: nothing but distinct
    features is wanted, for which the fewest channels do. Loads the choice and returns what it is,
    for a person. Raises Unbounded where no choice has bounds.
    """
    few = problem.version > 1 and problem.n >= MANY and not problem.all_channels
    key = wide, problem.all_channels, few and apart
    return problem.chosen(key, lambda: _choose(problem, stage, wide, few, apart))


def _choose(problem: Problem, stage: Stage, wide: nn.Linear, few: bool, apart: bool) -> str:
    found = branches(problem.model, problem.chain(wide), problem.first(SHOWN), problem.norms)
    if few and (what := _thin(problem, stage, wide, found, apart)):
        return what
    best: _Tried | None = None
    reason: Unbounded | None = None
    for choice in _choices(found):
        if best and best.apart and best.resolved >= choice.enough * best.possible:
            break
        changes = damped(problem.model, found, choice.factors)
        if choice.tame:
            x = problem.first(SHOWN)
            off = {name for name, value in changes.items() if not bool(value.any())}
            tamed = isometries(problem.model, problem.chain(wide), x)
            changes |= {name: value for name, value in tamed.items() if name not in off}
        try:
            with changed(problem.model, changes):
                features = problem.features(wide, stage, PILOT)
        except Unbounded as error:
            reason = reason or error
            continue
        resolved = len(whiten(features.z, features.error, problem.dtype).map)
        apart = separate(features.z, features.error).proved
        if best is None or (apart, resolved) > (best.apart, best.resolved):
            possible = min(len(features.z) - 1, features.z.shape[1])
            best = _Tried(apart, resolved, possible, choice.what, changes)
    if best is None:
        raise reason or Unbounded("no backbone has bounds")
    problem.load({name: value.to(problem.dtype) for name, value in best.changes.items()})
    problem.damped = problem.damped or bool(best.changes)
    return f"{best.what} ({best.resolved} directions resolved on {min(PILOT, problem.n)} samples)"


def _thin(problem: Problem, stage: Stage, wide: nn.Linear, found: list[Branch], apart: bool) -> str:
    """Load the first backbone of few channels that is good enough, and say which; "" for none."""
    x, stop = problem.first(SHOWN), problem.chain(wide)
    for numbers in (THINNEST, *THIN) if apart else THIN:
        for factor in (1.0, 0.0) if found else (1.0,):
            factors = [0.0 if branch.plain else factor for branch in found]
            changes = damped(problem.model, found, factors)
            try:
                with changed(problem.model, changes):
                    thin = thin_weights(problem.model, stop, x, numbers, CHANNELS, problem.norms)
                if not thin:
                    continue
                changes |= thin
                with changed(problem.model, changes):
                    features = problem.features(wide, stage, THIN_PILOT)
            except Unbounded:
                continue
            resolved = len(whiten(features.z, features.error, problem.dtype).map)
            possible = min(CHANNELS, features.z.shape[1], len(features.z) - 1)
            pilot = separate(features.z, features.error)
            enough = pilot.margin > SPARE if apart else resolved >= ENOUGH * possible
            if enough and pilot.proved:
                problem.load({n: value.to(problem.dtype) for n, value in changes.items()})
                problem.damped, problem.thin = True, max(4, (1 << 14) // numbers)
                rest = f", residual branches times {factor:g} (beside an identity: 0)"
                return (
                    f"channels of {numbers} numbers a layer{rest if found else ''} ({resolved} "
                    f"directions resolved on {len(features.z)} samples)"
                )
    return ""
