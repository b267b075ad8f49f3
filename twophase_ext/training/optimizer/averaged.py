"""Schedule-free optimizers: steps are made at y, what is used and kept is the average x."""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...model.network import Network
from .groups import Alone, averaging


class Averaged:
    """Calls an optimizer's train() before steps and its eval() after them; others have neither.

    Between them the model is at x: for the noise, the proof, measurements, callbacks, checkpoints
    and the result. eval() and train() round, so y is kept beside, and steps go on from its bits:
    how often a run is looked at or saved changes nothing.
    """

    def __init__(self, optimizer: Any) -> None:
        """optimizer: any."""
        self.optimizer, self.parts = optimizer, list(averaging(optimizer))
        self.kept: dict[str, Tensor] = {}  # y, while the model is at x
        self._moving: Mapping[str, nn.Parameter] = {}  # at y, while steps are made
        self._alone = False

    @contextmanager
    def steps(self, network: Network, second_phase: str, phase: int) -> Iterator[None]:
        """Within it a run makes steps: of all parameters, from tau on of the last layer alone."""
        moving, alone = network.parameters(), phase == 2
        if alone:  # theorems have steps of their own
            moving = network.last_parameters() if second_phase == "base" else {}
        with self.within(moving, alone):
            yield

    @contextmanager
    def within(self, moving: Mapping[str, nn.Parameter], alone: bool) -> Iterator[None]:
        """As `steps`, of the parameters `moving`; alone: the optimizer's others are frozen."""
        if not self.parts or not moving:
            yield
            return
        self._train(moving, alone)
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._eval(alone)
            raise
        self._eval(alone)

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Within it the model is at x, for a checkpoint, wherever steps are being made."""
        moving, alone = self._moving, self._alone
        if not moving:
            yield
            return
        self._eval(alone)
        try:
            yield
        finally:
            self._train(moving, alone)

    @torch.no_grad()
    def _train(self, moving: Mapping[str, nn.Parameter], alone: bool) -> None:
        self._call("train", moving, alone)
        for name, p in moving.items():
            if name in self.kept:
                p.copy_(self.kept[name])
        self.kept, self._moving, self._alone = {}, moving, alone

    @torch.no_grad()
    def _eval(self, alone: bool) -> None:
        self.kept = {name: p.detach().clone() for name, p in self._moving.items()}
        self._call("eval", self._moving, alone)
        self._moving = {}

    def _call(self, mode: str, moving: Mapping[str, nn.Parameter], alone: bool) -> None:
        """train() or eval(): of frozen parameters nothing moves."""
        if not alone:
            for part in list(self.parts):
                try:
                    getattr(part, mode)()
                except AttributeError:  # a wrapper's, for a base that has no such mode
                    self.parts.remove(part)
            return
        only = Alone(self.optimizer, moving.values())
        with only:
            for part in self.parts:
                if any(part is other for other in only.moving):
                    getattr(part, mode)()

    def forget(self, frozen: Mapping[str, nn.Parameter]) -> None:
        """These parameters make no more steps."""
        self.kept = {name: y for name, y in self.kept.items() if name not in frozen}
