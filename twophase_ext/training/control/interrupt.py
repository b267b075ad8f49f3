"""Ctrl-C, or SIGTERM, as a request: the step is finished and the state is saved."""

import signal
import threading
from types import FrameType
from typing import Any

from ..distributed.ranks import Ranks


class Interrupt:
    """Within the context, the first SIGINT only sets `.requested`; a second one raises as usual.

    SIGTERM likewise, which torchrun, SLURM and Kubernetes send before they kill.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        """Not requested yet. ranks: None is this process alone."""
        self.ranks, self._told = ranks or Ranks(), False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether any rank was told to stop: all ranks look, at the same step."""
        return self.ranks.all_reduce_any(self._told)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._told = True
        signal.signal(number, self._previous[number])

    def __enter__(self) -> "Interrupt":
        """Install the handler (Python allows that in the main thread only)."""
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            self._previous = {number: signal.getsignal(number) for number in numbers}
            for number in numbers:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
