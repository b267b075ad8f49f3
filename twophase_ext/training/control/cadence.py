"""How often a run is saved."""

import re
import time

from ...core.arguments import integer

WITHIN = 600.0  # seconds: by default, the longest time within an epoch that a kill can cost
_UNITS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
_FORM = re.compile(r"(\d+(?:\.\d+)?) *(epochs?|steps?|seconds?|minutes?|hours?)")


class Cadence:
    """When the next checkpoint is due, in epochs, steps or time since the last one.

    every: k or "k epochs" (at the end of every k-th epoch), "k steps", "k seconds", "k minutes",
    "k hours" (within epochs too), or None: at the end of every epoch and, within one, every ten
    minutes. The end of training is always saved. ValueError or TypeError name checkpoint_every.
    """

    def __init__(self, every: int | str | None) -> None:
        """See the class."""
        self.epochs: int | None = None
        self.steps: int | None = None
        self.seconds: float | None = None
        if every is None:
            self.epochs, self.seconds = 1, WITHIN
        elif isinstance(every, str):
            self._parse(every)
        else:
            self.epochs = integer("checkpoint_every", every, 1)
        self.saved()

    def _parse(self, every: str) -> None:
        form = _FORM.fullmatch(every.strip())
        number, unit = form.groups() if form else ("0", "")
        unit = unit.rstrip("s") + "s"
        if float(number) <= 0 or (unit in ("epochs", "steps") and not number.isdigit()):
            raise ValueError(
                "checkpoint_every: expected a number of epochs, or a text such as '500 steps', "
                f"'90 seconds' or '10 minutes', got {every!r}"
            )
        if unit in _UNITS:
            self.seconds = float(number) * _UNITS[unit]
        elif unit == "steps":
            self.steps = int(number)
        else:
            self.epochs = int(number)

    def saved(self) -> None:
        """A checkpoint has been written, or the run begins."""
        self._since, self._started = 0, time.monotonic()

    def most(self, steps: int) -> int:
        """So many of the next `steps` steps can be made without missing a checkpoint."""
        return steps if self.steps is None else max(1, min(steps, self.steps - self._since))

    def step(self, count: int = 1) -> bool:
        """Whether a checkpoint is due after `count` more steps, within an epoch."""
        self._since += count
        if self.steps is not None and self._since >= self.steps:
            return True
        return self.seconds is not None and time.monotonic() - self._started >= self.seconds

    def epoch(self, done: int) -> bool:
        """Whether a checkpoint is due at the end of an epoch, `done` being finished."""
        return self.step(0) if self.epochs is None else done % self.epochs == 0
