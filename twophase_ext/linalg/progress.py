"""Stages of a long computation: a bar with GFLOP/s and time left, and what each of them took."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stage:
    """One stage under way."""

    def __init__(self, name: str) -> None:
        """name: what the record calls it."""
        self.name, self.flops, self.tiles = name, 0.0, 0
        self._started = time.perf_counter()
        self.show: Callable[[], None] = lambda: None

    def advance(self, flops: float, tiles: int = 0) -> None:
        """So many more operations were executed, and tiles finished."""
        self.flops += flops
        self.tiles += tiles
        self.show()

    def record(self) -> dict[str, Any]:
        """{name, seconds, flops, gflops (10^9 executed operations a second), tiles}."""
        seconds = time.perf_counter() - self._started
        rate = self.flops / max(seconds, 1e-9) / 1e9
        return {
            "name": self.name,
            "seconds": seconds,
            "flops": self.flops,
            "gflops": rate,
            "tiles": self.tiles,
        }


class Stages:
    """Runs stages one after another; `done` lists their records."""

    def __init__(self, progress: bool, say: Callable[[str], None] | None) -> None:
        """progress: a rich bar where standard output is a terminal. say: gets a line per stage."""
        self.done: list[dict[str, Any]] = []
        self._bar = progress and sys.stdout.isatty()
        self.say = say if say is not None else lambda text: None

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Stage]:
        """A stage of about `total` operations."""
        self.say(f"{name}: {total:.3g} operations")
        stage = Stage(name)
        try:
            if self._bar:
                with self._shown(stage, total):
                    yield stage
            else:
                yield stage
        finally:
            self.done.append(stage.record())
        r = self.done[-1]
        self.say(f"{name}: {r['seconds']:.1f} s, {r['gflops']:.1f} GFLOP/s, {r['tiles']} tiles")

    @contextmanager
    def _shown(self, stage: Stage, total: float) -> Iterator[None]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}")
        with Progress(*columns, TimeRemainingColumn()) as bar:
            task = bar.add_task(stage.name, total=total, rate="")

            def show() -> None:
                rate = f"{stage.record()['gflops']:.0f} GFLOP/s"
                bar.update(task, completed=stage.flops, rate=rate)

            stage.show = show
            yield
