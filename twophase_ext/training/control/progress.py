"""What a person sees while a run goes on: a bar on a terminal, one line of text elsewhere."""

from typing import Any

from ...core.bars import bar


class Progress:
    """Epoch-by-epoch progress with time per epoch and time left; silent bars off a terminal."""

    def __init__(self, enabled: bool) -> None:
        """enabled: False prints nothing at all."""
        self.enabled = enabled
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

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

    def advance(self, name: str, steps: int = 1, note: str | None = None) -> None:
        """`steps` more of the stage are done."""
        if self._bar is not None:
            self._bar.update(self._tasks[name], advance=steps)
            if note is not None:
                self._bar.update(self._tasks[name], note=note)

    def end(self, name: str) -> None:
        """The stage is over."""
        if self._bar is not None:
            self._bar.remove_task(self._tasks.pop(name))
