"""A backbone that bounds can resolve: residual branches made small, or switched off.

A deep network's error bounds may exceed the spread of its features. Assumption 1 asks for some
weights, so a witness is free to choose tamer ones: factors on the weight and bias of the last
affine map of each residual branch. With factor 0 a branch need not be computed; a few branches
stay on where the samples would not be told apart without them (a class token sees the image through
attention alone).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..linalg.progress import Stage
from ..model.holding import trainable
from .bounded import Unbounded
from .problem import Problem
from .running.features import running
from .separation import separate
from .witness import whiten

PILOT = 64  # samples that choose the backbone
SHOWN = 2  # samples whose pass shows where the branches are
# Factors of residual branches (beside a shortcut with weights, beside an identity), tried in order.
DAMPINGS = ((1.0, 1.0), (1.0, 0.0), (0.25, 0.0), (0.0, 0.0))
KEPT = 6  # branches, of the first ones, that are tried as the only ones left
ENOUGH = 0.75  # of the directions that there can be: then no branch is tried alone


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
    free = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if trainable(module, name)
    }
    found = dict.fromkeys(
        Branch(names, plain) for names, plain in running(model, stop, x, norms).tape.branches()
    )
    return [branch for branch in found if free.issuperset(branch.parameters)]


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
    """what: for a person. factors: of the branches. enough: share of the directions that there can
    be; where an earlier choice resolves as many, this one is not tried.
    """

    what: str
    factors: list[float]
    enough: float


def _choices(found: list[Branch]) -> Iterator[_Choice]:
    """From the model's own backbone on; equal ones once."""
    tried: set[tuple[float, ...]] = set()

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

    for choice in choices():
        if tuple(choice.factors) not in tried:
            tried.add(tuple(choice.factors))
            yield choice


class _Tried(NamedTuple):
    apart: bool  # every two pilot samples, beyond their errors
    resolved: int
    possible: int
    what: str
    changes: dict[str, Tensor]


def choose_backbone(problem: Problem, stage: Stage, wide: nn.Linear) -> str:
    """Damp residual branches where that resolves more directions of the features.

    Tried on the first PILOT samples; what tells them all apart, then what resolves most wins, the
    earlier choice on a tie. wide:
    the layer that the features enter. Loads the choice and returns what it is, for a person. Raises
    Unbounded where no choice has bounds.
    """
    found = branches(problem.model, problem.chain(wide), problem.batches(SHOWN)[0], problem.norms)
    best: _Tried | None = None
    reason: Unbounded | None = None
    for choice in _choices(found):
        if best and best.apart and best.resolved >= choice.enough * best.possible:
            break
        changes = damped(problem.model, found, choice.factors)
        try:
            with _changed(problem.model, changes):
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


@contextmanager
def _changed(model: nn.Module, changes: dict[str, Tensor]) -> Iterator[None]:
    """The entries of the state dict are these, and what they were afterwards."""
    state = model.state_dict()
    own = {name: state[name].clone() for name in changes}
    with torch.no_grad():
        for name, value in changes.items():
            state[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                state[name].copy_(value)
