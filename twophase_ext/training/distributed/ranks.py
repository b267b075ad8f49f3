"""The processes that share a run, as torchrun starts them; this process alone otherwise."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.messages import first_line
from .shared_memory import Lost, SharedMemory, shared_memory

T = TypeVar("T")
# Rank 0 may verify the condition for hours; a process that ends closes its connections at once.
PATIENCE = timedelta(days=365)


class Ranks:
    """Rank `rank` of `size` processes, and what they tell each other.

    Every method but `shard` is called by all of them in the same order. Where one does not come,
    the others get a RuntimeError that names the step: at once where it ended, after the group's
    timeout where it hangs.
    """

    def __init__(self, rank: int = 0, size: int = 1, cpu: Any = None, patient: Any = None) -> None:
        """Use `joined`. cpu: a group for CPU tensors; patient: one that waits for PATIENCE."""
        self.rank, self.size = rank, size
        self.memory: SharedMemory | None = None  # of processes on one machine
        self._cpu, self._patient = cpu, patient
        self.where: Callable[[], str] = lambda: "before the first step"

    @property
    def local_size(self) -> int:
        """How many of them run on this machine, as torchrun says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.size > 1 else 1

    def shard(self, n: int) -> slice:
        """This rank's contiguous part of n things; none is longer than rank 0's."""
        return slice(-(-n * self.rank // self.size), -(-n * (self.rank + 1) // self.size))

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in the place of `tensor`; the same bits everywhere."""
        if self.size > 1:
            with self.together():
                if self.memory is not None and self.memory.takes(tensor):
                    return self.memory.sum_(tensor)
                dist.all_reduce(tensor, group=None if tensor.is_cuda else self._cpu)
        return tensor

    def all_reduce_any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return (
            flag
            if self.size == 1
            else bool(self.all_reduce_(torch.tensor(int(flag), device="cpu")) > 0)
        )

    def all_reduce_min(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return min(self.all_gather_object(number))

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """`tensor` of the rank `source`, in the place of everyone's."""
        if self.size > 1:
            with self.together():
                dist.broadcast(tensor, source, group=None if tensor.is_cuda else self._cpu)
        return tensor

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Rank 0's buffers everywhere: BatchNorm's running statistics are of its parts."""
        for buffer in model.buffers():
            self.broadcast(buffer)

    def columns(self, own: Tensor, total: int) -> Tensor:
        """[b, total] from everyone's [b, columns of `shard(total)`]."""
        if self.size == 1:
            return own
        parts = [Ranks(rank, self.size).shard(total) for rank in range(self.size)]
        lengths = [part.stop - part.start for part in parts]
        padded = F.pad(own, (0, lengths[0] - own.shape[1])).contiguous()
        pieces = [torch.empty_like(padded) for _ in lengths]
        with self.together():
            if self.memory is not None and self.memory.takes(padded):
                pieces = self.memory.exchange(padded)
            else:
                dist.all_gather(pieces, padded, group=None if own.is_cuda else self._cpu)
        return torch.cat([p[:, :length] for p, length in zip(pieces, lengths, strict=True)], 1)

    def all_gather_object(self, value: T) -> list[T]:
        """Everyone's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.together():
            dist.all_gather_object(values, value, group=self._cpu)
        return values

    def agree(self, name: str, value: Any) -> None:
        """Raise RuntimeError where a rank has another value than rank 0."""
        values = self.all_gather_object(value)
        differing = [rank for rank, other in enumerate(values) if other != values[0]]
        if differing:
            raise RuntimeError(
                f"{name}: expected the same in every process, got {values[0]!r} on rank 0 and "
                f"{values[differing[0]]!r} on rank {differing[0]}"
            )

    def broadcast_object(self, function: Callable[[], T]) -> T:
        """What rank 0 gets from `function`, however long it takes; its error on every rank."""
        if self.size == 1:
            return function()
        found: list[Any] = [None, None]
        own: Exception | None = None
        if self.rank == 0:
            try:
                found[0] = function()
            except Exception as error:
                own, found[1] = error, (type(error).__name__, str(error))
        with self.together():
            dist.broadcast_object_list(found, 0, group=self._patient)
        if own is not None:
            raise own
        if found[1] is not None:
            name, text = found[1]
            kinds: dict[str, type[Exception]] = {
                kind.__name__: kind for kind in (ValueError, TypeError, FileNotFoundError)
            }
            raise kinds.get(name, RuntimeError)(text)
        return found[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What torch.distributed raises within it is reported as the loss of another process."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, (dist.DistError, Lost)) or "gloo" in str(error).lower():
                raise self._lost(error) from error
            raise

    def _lost(self, error: Exception) -> RuntimeError:
        text = re.sub(r"^\[[^]]*\] *", "", str(error))  # the file of gloo that says so
        reason = first_line(text or error)
        return RuntimeError(
            f"{self.where()}: another process ended or hung (seen by rank {self.rank} of "
            f"{self.size}: {reason}). Start again with resume=True, with any number of processes, "
            "to go on from the last checkpoint"
        )


_known: tuple[Any, Ranks] | None = None  # the default group, and its Ranks


def joined() -> Ranks:
    """The ranks of torch.distributed's default group, or one process where there is no group.

    A process that torchrun started joins the group first, if it has not. All ranks call it.
    """
    global _known
    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return Ranks()
        dist.init_process_group()
    if dist.get_world_size() == 1:
        return Ranks()
    if _known is None or _known[0] is not dist.group.WORLD:
        on_cpu = "gloo" in dist.get_backend_config()
        cpu = None if on_cpu else dist.new_group(backend="gloo")
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        found = Ranks(dist.get_rank(), dist.get_world_size(), cpu, patient)
        group: Any = dist.group.WORLD if cpu is None else cpu
        timeout = group._get_backend(torch.device("cpu")).options._timeout
        found.memory = shared_memory(found.rank, found.all_gather_object, timeout.total_seconds())
        _known = dist.group.WORLD, found
    return _known[1]
