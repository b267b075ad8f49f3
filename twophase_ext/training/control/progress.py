"""What a person sees while a run goes on: a bar on a terminal, lines of text elsewhere."""

import time
from dataclasses import dataclass
from typing import Any

from ...core.bars import bar

# seconds between two lines: SHARE of the time so far, within these
LEAST, MOST, SHARE = 10.0, 300.0, 0.05


@dataclass
class _Stage:
    """How far a stage is; began, first: when, and at which step."""

    total: int
    done: int
    began: float
    first: int
    note: str = ""


class Progress:
    """Epoch-by-epoch progress with time per epoch and time left.

    Off a terminal (a notebook, a log file) a line after the first epoch, and from then on at least
    10 seconds apart, ever less often.
    """

    def __init__(self, enabled: bool) -> None:
        """enabled: False prints nothing at all."""
        self.enabled = enabled
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._stages: dict[str, _Stage] = {}
        self._began = self._told = time.monotonic()

    def say(self, text: str) -> None:
        """One line that stays."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def __enter__(self) -> "Progress":
        """Start the bar where standard output is a terminal."""
        if self.enabled:
            self._bar = bar("{task.completed:.0f}/{task.total:.0f}", "{task.fields[note]}")
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def begin(self, name: str, total: int, done: int = 0) -> None:
        """A new stage of `total` steps, `done` of them done before."""
        if self._bar is not None:
            self._tasks[name] = self._bar.add_task(name, total=total, completed=done, note="")
        self._stages[name] = _Stage(total, done, time.monotonic(), done)

    def advance(self, name: str, steps: int = 1, note: str | None = None) -> None:
        """`steps` more of the stage are done."""
        if self._bar is not None:
            self._bar.update(self._tasks[name], advance=steps)
            if note is not None:
                self._bar.update(self._tasks[name], note=note)
            return
        stage, now = self._stages.get(name), time.monotonic()
        if stage is None:
            return
        stage.done += steps
        stage.note = stage.note if note is None else note
        pause = min(MOST, max(LEAST, SHARE * (now - self._began)))
        first = note is not None and stage.done == stage.first + 1
        if self.enabled and (first or now - self._told >= pause):
            self._told = now
            self.say(_line(name, stage, now))

    def end(self, name: str) -> None:
        """The stage is over."""
        if self._bar is not None:
            self._bar.remove_task(self._tasks.pop(name))
        self._stages.pop(name, None)


def _line(name: str, stage: _Stage, now: float) -> str:
    each = (now - stage.began) / max(1, stage.done - stage.first)
    left = each * (stage.total - stage.done)
    shown = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
    shown = shown if left < 6000 else f"{left / 3600:.1f} h"
    parts = [f"{name}: {stage.done:,} of {stage.total:,}", stage.note, f"about {shown} left"]
    return ", ".join(part for part in parts if part)
