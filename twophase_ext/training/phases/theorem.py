"""What "gd", "agd" and "sgd" share: w^tau kept, the constants of the bound, the bound itself."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.messages import first_line
from ...model.gate import intercepted
from ...theory.guarantee import Guarantee, guarantee, smoothness
from ...theory.premises import UNCHECKED
from ..audit import premises
from ..control.interrupt import Interrupt
from ..data.samples import BATCH
from ..faults import Stopped
from ..features.agreement import cache_disagreement
from ..run import Run
from ..steps.gradient import row_norms
from .last_layer import LastLayer

AT_THE_END = 1024  # samples on which the model is looked at once more
SAME = 1e-4  # relative, of two machines' norms of the same features


class TheoremPhase(LastLayer):
    """Steps of which Theorem 1 says how far they come."""

    def __init__(self, run: Run) -> None:
        """ValueError for training data that change from visit to visit."""
        super().__init__(run)
        config = self.context.config
        if self.context.train.random and config.augment_copies is None:
            raise ValueError(
                f"train: second_phase={config.second_phase!r} needs fixed features, but the "
                "inputs change from visit to visit; augment_copies=k fixes k visits"
            )

    def train_epoch(self, interrupt: Interrupt) -> bool:
        """As of Phase; the weights are watched between epochs."""
        if self.state.batch == 0:
            self.look_for_other_steps()
        done = super().train_epoch(interrupt)
        self.note_weights()
        return done

    @property
    def ones(self) -> bool:
        """Whether the last layer trains a bias: M = [h_X, 1]."""
        bias = self.context.network.last.module.bias
        return bias is not None and bias.requires_grad

    def parameters(self) -> list[nn.Parameter]:
        """The last layer's weight and, where it has a trainable one, bias."""
        return [p for p in self.context.network.last.module.parameters() if p.requires_grad]

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over features and targets."""
        return self.features.in_order(BATCH)

    def fill_caches(self) -> None:
        """As of SecondPhase; then the constants of the bound, once in a run."""
        super().fill_caches()
        known = self.state.second
        if known.start is not None and known.norms is not None:
            self._compare_norms(known.norms)
            return
        with self.run.timed("smoothness"):
            norms = row_norms(self.features)
            largest = self._usable_smoothness(norms)
            known.start = [p.detach().clone() for p in self.parameters()]
            known.norms, known.smoothness = norms, largest

    def _look_once_more(self) -> None:
        """At the end: the weights, the last layer and the model are still what the bound is of."""
        self.look_for_other_steps()
        run, context = self.run, self.context
        if run.unfixed or run.train_features is None or context.ranks.size > 1:
            return
        why = intercepted(context.network.last.module)
        rounded = self.state.cache_mode == "hidden-bfloat16" or context.config.augment_copies
        evidence = f"the last layer is not its weights alone: {why}" if why else None
        features = run.train_features
        if evidence is None and not rounded and features.mode != "none":
            # all were compared at tau: what has changed since shows on some
            size = context.config.batch_size
            evidence = cache_disagreement(features, context.network, size, AT_THE_END)
        if evidence is not None:
            self.state.second.unfixed = f"after the last step: {evidence}"
            warnings.warn(f"nothing is claimed: {self.state.second.unfixed}", stacklevel=2)

    def _compare_norms(self, known: Tensor) -> None:
        """A resumed run's features are those that its constants were computed from, or no claim."""
        now = row_norms(self.features)
        if self.state.second.unfixed or (
            now.shape == known.shape
            and bool(((now - known.to(now.device)).abs() <= SAME * now).all())
        ):
            return
        self.state.second.unfixed = (
            "the features of the resumed run are not the checkpoint's: the model computes "
            "something else than when its verdict and constants were made"
        )
        warnings.warn(f"nothing is claimed: {self.state.second.unfixed}", stacklevel=2)

    def _usable_smoothness(self, norms: Tensor) -> float:
        """L_H, where steps of 1 / L_H can be made; Stopped otherwise."""
        dtype = self.context.network.last.module.weight.dtype
        try:
            largest = self.smoothness(norms)
        except (ValueError, OverflowError) as error:  # features that are not finite
            raise Stopped(f"L_H cannot be computed at tau: {first_line(error)}") from error
        if not 1 / torch.finfo(dtype).max <= largest < math.inf:
            raise Stopped(
                f"L_H = {largest:g} at tau: no step of 1 / L_H can be made in {dtype}; the "
                "features are 0 or beyond its range (dead units? too much noise?)"
            )
        return largest

    def smoothness(self, norms: Tensor) -> float:
        """L_H, that of the loss as a function of the last layer's weights; norms: `row_norms`."""
        return smoothness(self.blocks, loss=self.context.loss, form="tight", ones=self.ones)

    def fixed_bias(self) -> Tensor | None:
        """A bias of the last layer that does not move."""
        bias = self.context.network.last.module.bias
        return None if bias is None or self.ones else bias.detach()

    def bound(self, status: str, evaluate: Callable[[], Guarantee] | None = None) -> Guarantee:
        """The curve that `evaluate` gives, where the run has come to its end, and the audit."""
        context, known = self.context, self.state.second
        found, failed = Guarantee(mode=context.config.second_phase), ""
        if self.stopped:
            found.reason = self.stopped
        if status == "completed":
            self._look_once_more()
        claimed = status == "completed" and not self.run.unfixed and not known.changed
        if claimed and known.start is not None and evaluate is not None:
            context.progress.say("guarantee: the bound is minimised over comparators")
            try:
                with self.run.timed("guarantee"):
                    found = evaluate()
            except Exception as error:  # the run is fine without its bound
                failed = f"not evaluated: {type(error).__name__}: {error}"
                warnings.warn(f"guarantee {failed}", stacklevel=2)
        found.premises = premises(context, self.state)
        if failed:
            found.premises.append(("bound", UNCHECKED, failed))
        return found

    def theorem_1(self, **arguments: Any) -> Guarantee:
        """Theorem 1's bound; arguments: of `guarantee`."""
        context, config = self.context, self.context.config
        start = self.state.second.start
        if start is None:
            raise RuntimeError("the bound was asked for before w^tau was kept")
        # A pass in float64, with what is bounded, costs less than three of the phase's steps.
        rows = context.row_batch if config.second_phase == "sgd" else context.train.rows
        return guarantee(
            self.blocks,
            start[0],
            start[1] if self.ones else self.fixed_bias(),
            loss=context.loss,
            mode=config.second_phase,
            ones=self.ones,
            candidates=[("the last weights", *(p.detach() for p in self.parameters()))],
            passes=max(arguments["steps"]) * rows / context.train.rows / 3,
            **arguments,
        )
