"""Stages of a long computation: a bar with GFLOP/s and time left, and what each of them took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..core.bars import bar

# Lines of text: at the beginning of a stage of so much, at the end of one that took so long.
LARGE = {"operations": 1e11, "samples": 4096}
QUICK = 1.0  # seconds
EVERY = 60.0  # seconds between two lines about one stage, where no bar is shown


class Stage:
    """One stage under way."""

    def __init__(self, name: str, unit: str = "operations") -> None:
        """name: what the record calls it. unit: what is counted."""
        self.name, self.unit, self.count, self.tiles = name, unit, 0.0, 0
        self._started = time.perf_counter()
        self.show: Callable[[], None] = lambda: None

    def left(self, total: float) -> str:
        """For a person: how much of `total` is done, and the time that the rest will take."""
        seconds = (time.perf_counter() - self._started) * (total / self.count - 1)
        return f"{self.name}: {self.count / total:.0%}, about {max(seconds, 0) / 60:.0f} min left"

    def advance(self, count: float, tiles: int = 0) -> None:
        """So many more operations were executed (or samples done), and tiles finished."""
        self.count += count
        self.tiles += tiles
        self.show()

    def record(self) -> dict[str, Any]:
        """{name, seconds, and for operations flops, gflops (10^9 executed a second), tiles}."""
        seconds = time.perf_counter() - self._started
        if self.unit != "operations":
            return {"name": self.name, "seconds": seconds, self.unit: self.count}
        rate = self.count / max(seconds, 1e-9) / 1e9
        work = {"flops": self.count, "gflops": rate, "tiles": self.tiles}
        return {"name": self.name, "seconds": seconds, **work}

    @property
    def rate(self) -> str:
        """For a person."""
        r = self.record()
        if self.unit != "operations":
            return f"{self.count / max(r['seconds'], 1e-9):.3g} {self.unit}/s"
        return f"{r['gflops']:.1f} GFLOP/s" + (f", {self.tiles} tiles" if self.tiles else "")


class Stages:
    """Runs stages one after another; `done` lists their records."""

    def __init__(self, progress: bool, say: Callable[[str], None] | None) -> None:
        """progress: a rich bar where standard output is a terminal. say: gets a line per stage."""
        self.done: list[dict[str, Any]] = []
        self._bar = progress
        self.say = say if say is not None else lambda text: None
        self._announced: set[str] = set()

    def announce(self, plan: str, when: str = "") -> None:
        """Say what a computation will take, unless that was said before."""
        if plan not in self._announced:
            self._announced.add(plan)
            self.say(f"{when}{plan}")

    @contextmanager
    def stage(self, name: str, total: float, unit: str = "operations") -> Iterator[Stage]:
        """A stage of about `total` operations, or of another unit."""
        if total >= LARGE[unit]:
            size = f"{total:.3g}" if unit == "operations" else f"{total:,.0f}"
            self.say(f"{name}: {size} {unit}")
        stage = Stage(name, unit)
        try:
            shown = bar("{task.fields[rate]}") if self._bar else None
            if shown is None:
                stage.show = self._lines(stage, total)
                yield stage
            else:
                with self._showing(shown, stage, total):
                    yield stage
        finally:
            self.done.append(stage.record())
        seconds = self.done[-1]["seconds"]
        if seconds > QUICK:
            rate = f", {stage.rate}" if stage.count else ""
            self.say(f"{name}: done in {seconds:.1f} s{rate}")

    def _lines(self, stage: Stage, total: float) -> Callable[[], None]:
        """Says now and then how much is left."""
        said = time.perf_counter()

        def show() -> None:
            nonlocal said
            if time.perf_counter() - said > EVERY and 0 < stage.count < total:
                said = time.perf_counter()
                self.say(stage.left(total))

        return show

    @contextmanager
    def _showing(self, shown: Any, stage: Stage, total: float) -> Iterator[None]:
        with shown:
            task = shown.add_task(stage.name, total=total, rate="")

            def show() -> None:
                shown.update(task, completed=stage.count, rate=stage.rate)

            stage.show = show
            yield
