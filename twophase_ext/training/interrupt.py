"""Ctrl-C as a request: the step in progress is finished and the state is saved."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """Within the context, the first SIGINT only sets `.requested`; a second one raises as usual."""

    def __init__(self) -> None:
        """Not requested yet."""
        self.requested = False
        self._previous: Any = None

    def _handle(self, _: int, __: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)

    def __enter__(self) -> "Interrupt":
        """Install the handler (Python allows that in the main thread only)."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Put the former handler back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
