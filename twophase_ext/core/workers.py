"""A DataLoader's worker processes: they fetch batches ahead, the same bits as without them."""

import signal
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .collated import Collated

Job = tuple[list[int], int]  # samples of a batch, and the seed of what their transforms draw
# arguments of a DataLoader that say how its workers run
_KEPT = ("prefetch_factor", "timeout", "multiprocessing_context")


class Workers:
    """Worker processes as a loader asks for them, kept from epoch to epoch.

    They begin when they are first asked for something, and are gone after `close`.
    """

    def __init__(self, collated: Collated, loader: Any, device: torch.device) -> None:
        """loader: whose num_workers, worker_init_fn, prefetch_factor, ... these are.

        Batches lie in pinned memory where the loader wants that and `device` is a GPU.
        """
        self.name, self._order = collated.name, list[Job]()  # filled anew for each pass
        asked = {key: getattr(loader, key, None) for key in _KEPT}
        self._loader = DataLoader(
            _Jobs(collated),
            batch_size=None,
            sampler=self._order,  # type: ignore[arg-type]
            num_workers=loader.num_workers,
            persistent_workers=True,
            collate_fn=_as_it_is,
            worker_init_fn=_Begin(collated.dataset, getattr(loader, "worker_init_fn", None)),
            pin_memory=device.type == "cuda" and bool(getattr(loader, "pin_memory", False)),
            generator=torch.Generator(),  # else it draws from the global one
            **{key: value for key, value in asked.items() if value is not None},
        )
        self._batches: Iterator[Any] | None = None
        self._asked: deque[Job] = deque()
        self._failed = False

    @contextmanager
    def ahead(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Within it `take` gives these batches in this order; a pass within a pass gets none."""
        if self._failed or self._asked or not jobs:
            yield
            return
        self._order[:] = jobs
        try:
            self._batches = iter(self._loader)
            self._asked.extend(jobs)
        except Exception as error:  # no process can begin, or the dataset does not go to one
            self._give_up(error)
        try:
            yield
        finally:
            self._asked.clear()

    def take(self, job: Job) -> tuple[Any] | None:
        """The batch, where it is the next one of `ahead`; None: fetch it in this process.

        None also where a worker fails, so that the error is that of a fetch in this process.
        """
        if not self._asked or self._asked[0] != job or self._batches is None:
            return None
        self._asked.popleft()
        try:
            return (next(self._batches),)
        except Exception as error:  # of the dataset, or of a process that is gone
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        self.close()
        warnings.warn(
            f"{self.name}: a worker of the DataLoader failed, from here samples are fetched in "
            f"this process: {str(error).strip().splitlines()[-1]}",
            stacklevel=2,
        )

    def close(self) -> None:
        """End the processes; they begin again when they are asked for something."""
        self._asked.clear()
        # deleting the iterator ends them, but an error's traceback may keep it for a while
        getattr(self._batches, "_shutdown_workers", int)()
        self._batches = self._loader._iterator = None


class _Jobs(Dataset[Any]):
    """Batches by job."""

    def __init__(self, collated: Collated) -> None:
        self.collated = collated

    def __getitem__(self, job: Job) -> Any:
        return self.collated(*job)


class _Begin:
    """What a worker does first."""

    def __init__(self, dataset: Any, own: Any) -> None:
        self.dataset, self.own = dataset, own

    def __call__(self, worker: int) -> None:
        # Ctrl-C and the SIGTERM of a batch system reach the whole group of processes, and the run
        # goes on to the end of its step.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _the_second_ends)
        # the user's function finds its own dataset there; the object refuses to be written to
        object.__setattr__(get_worker_info(), "dataset", self.dataset)
        if self.own is not None:
            self.own(worker)


def _the_second_ends(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _as_it_is(batch: Any) -> Any:
    return batch
