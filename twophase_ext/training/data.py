"""Training data in one form: batches by sample index, checked before anything is trained."""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from ..arrays import as_tensor, require_finite
from ..losses import ConvexLoss, prepare_targets
from ..memory import available_memory
from .streams import host_stream, stream_seed

Augment = Callable[[Tensor, torch.Generator], Tensor]
_CHECKED = 256  # samples of a Dataset looked at together before training
_SHARE = 4  # inputs that take at most 1 / _SHARE of the device's free memory are moved there
_VISITED_TWICE = 16  # samples fetched twice to see whether a Dataset is random


class Samples:
    """n samples (x_i, y_i), fetched by index as tensors on one device.

    Made by `Samples.of` from a pair of arrays, a map-style Dataset or a DataLoader over one. uint8
    inputs are scaled to [0, 1] when they are fetched, so that images stay small in memory.
    random: fetching a sample twice gives different inputs; what its transforms draw comes from
    (seed, epoch), which the engine sets, and the batch. augment: a transform of whole batches,
    (x [b, ...], torch.Generator) -> x, likewise.
    """

    def __init__(self, name: str, n: int, device: torch.device, dtype: torch.dtype) -> None:
        """Use `Samples.of`."""
        self.name, self.n, self.device, self.dtype = name, n, device, dtype
        self.batch_size: int | None = None
        self.random = False
        self.seed, self.epoch = 0, 0
        self.augment: Augment | None = None

    @staticmethod
    def of(source: Any, *, name: str, device: torch.device, dtype: torch.dtype) -> "Samples":
        """Samples from `source`; see the class. Errors name the argument `name`."""
        if isinstance(source, DataLoader):
            return _from_loader(source, name, device, dtype)
        if isinstance(source, IterableDataset):
            raise ValueError(f"{name}: expected a map-style dataset, got an IterableDataset")
        if isinstance(source, Dataset):
            return _from_dataset(source, default_collate, name, device, dtype)
        if isinstance(source, tuple | list) and len(source) == 2:
            return _Arrays(source[0], source[1], name, device, dtype)
        raise TypeError(
            f"{name}: expected (x, y), a Dataset or a DataLoader, got {type(source).__name__}"
        )

    def fetch(self, index: Tensor, *, augmented: bool = True) -> tuple[Tensor, Tensor]:
        """(x, y) of the samples `index` (int64 on the CPU), on the device."""
        x, y = self._fetch(index)
        if not augmented or self.augment is None:
            return x, y
        # in one epoch a sample comes once: the first one tells the batch
        seed = stream_seed(self.seed, "augment", self.epoch, int(index[0]))
        changed = self.augment(x, torch.Generator().manual_seed(seed))
        if not isinstance(changed, Tensor) or changed.shape != x.shape or changed.dtype != x.dtype:
            got = changed if isinstance(changed, Tensor) else None
            found = type(changed).__name__ if got is None else f"{list(got.shape)} {got.dtype}"
            raise ValueError(f"augment: expected {list(x.shape)} {x.dtype}, got {found}")
        return changed, y

    def _fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def prepare(self, loss: ConvexLoss, outputs: int) -> None:
        """Check every sample, and convert the targets for `loss` and `outputs` outputs."""
        raise NotImplementedError

    def in_order(self, size: int, *, augmented: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `size` in index order; see `batches`."""
        yield from self.visit(self.batches(size), augmented=augmented)

    def batches(self, size: int, part: slice = slice(None)) -> list[tuple[int, int]]:
        """(start, end) of batches of `size` in index order, of the samples in `part`.

        A last single sample joins the batch before it (BatchNorm has no variance over one sample).
        """
        begin, end, _ = part.indices(self.n)
        starts = list(range(begin, end, size))
        if len(starts) > 1 and end - starts[-1] == 1:
            starts.pop()
        return list(pairwise([*starts, end]))

    def visit(
        self, batches: Iterable[tuple[int, int]], *, augmented: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples start to end - 1 of each batch."""
        for start, end in batches:
            yield self.fetch(torch.arange(start, end), augmented=augmented)

    def _place(self, x: Tensor) -> Tensor:
        x = x.to(self.device, non_blocking=True)
        if x.dtype == torch.uint8:
            return x.to(self.dtype).div_(255)
        return x.to(self.dtype) if x.is_floating_point() else x


def _check_length(name: str, n: int, n_targets: int) -> None:
    if n != n_targets:
        raise ValueError(f"{name}: expected as many targets as inputs ({n}), got {n_targets}")
    if n == 0:
        raise ValueError(f"{name}: the data set is empty")


class _Arrays(Samples):
    """Two arrays held whole, on the device where they fit: the batch is one index_select."""

    def __init__(self, x: Any, y: Any, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.x = as_tensor(x, name=f"{name}[0]")
        self.y = as_tensor(y, name=f"{name}[1]")
        for part, tensor in (("x", self.x), ("y", self.y)):
            if tensor.is_meta:
                raise ValueError(f"{name}: expected {part} with data, got a meta tensor")
            if tensor.dim() == 0:
                raise ValueError(f"{name}: expected {part} with a sample dimension, got a scalar")
        _check_length(name, len(self.x), len(self.y))
        require_finite(self.x, name, "input")
        require_finite(self.y, name, "target")
        super().__init__(name, len(self.x), device, dtype)

    def prepare(self, loss: ConvexLoss, outputs: int) -> None:
        self.y = prepare_targets(loss, self.y, outputs, name=self.name)
        if self.y.is_floating_point():
            self.y = self.y.to(self.dtype)
        # Labels are small: on the device once. So are inputs that fit; others move batch by batch.
        self.y = self.y.to(self.device)
        if _SHARE * self.x.nbytes <= available_memory(self.device):
            self.x = self.x.to(self.device)

    def _fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.x.device, non_blocking=True)
        x = self.x.index_select(0, index)
        return self._place(x), self.y.index_select(0, index.to(self.y.device))


class _Fetched(Samples):
    """A map-style dataset: samples are fetched one by one and collated."""

    def __init__(
        self,
        dataset: Any,
        collate: Any,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        _check_length(name, len(dataset), len(dataset))
        super().__init__(name, len(dataset), device, dtype)
        self.dataset, self.collate = dataset, collate
        self.loss: ConvexLoss | None = None
        self.outputs = 0
        # A random transform gives another x at every visit: such features cannot be cached.
        some = list(range(0, self.n, -(-self.n // _VISITED_TWICE)))
        with host_stream(0):
            self.random = any(
                not torch.equal(self._collate([i])[0], self._collate([i])[0]) for i in some
            )

    def _collate(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        batch = self.collate([self.dataset[i] for i in indices])
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise ValueError(f"{self.name}: expected samples (x, y), got {type(batch).__name__}")
        x, y = (as_tensor(part, name=self.name) for part in batch)
        return x, y

    def prepare(self, loss: ConvexLoss, outputs: int) -> None:
        self.loss, self.outputs = loss, outputs
        for _ in self.in_order(_CHECKED):  # nothing is to be found wrong after hours of training
            pass

    def _fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        indices = index.tolist()
        if self.random:  # in one epoch a sample comes once: the first one tells the batch
            with host_stream(stream_seed(self.seed, "augment", self.epoch, indices[0])):
                x, y = self._collate(indices)
        else:
            x, y = self._collate(indices)
        require_finite(x, self.name, "input", indices)
        require_finite(y, self.name, "target", indices)
        if self.loss is not None:
            y = prepare_targets(self.loss, y, self.outputs, name=self.name, indices=indices)
        y = y.to(self.device)
        return self._place(x), y.to(self.dtype) if y.is_floating_point() else y


def _from_dataset(
    dataset: Any, collate: Any, name: str, device: torch.device, dtype: torch.dtype
) -> Samples:
    if type(dataset) is TensorDataset and collate is default_collate and len(dataset.tensors) == 2:
        return _Arrays(*dataset.tensors, name, device, dtype)
    return _Fetched(dataset, collate, name, device, dtype)


def _from_loader(
    loader: DataLoader, name: str, device: torch.device, dtype: torch.dtype
) -> Samples:
    """A DataLoader's dataset, collate function and batch size; the order stays the Trainer's."""
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(f"{name}: expected a loader over a map-style dataset")
    sampler, refused = loader.sampler, ""
    if not isinstance(sampler, RandomSampler | SequentialSampler):
        refused = type(sampler).__name__
    elif isinstance(sampler, RandomSampler) and (
        sampler.replacement or sampler.num_samples != len(loader.dataset)  # type: ignore[arg-type]
    ):
        refused = "replacement or num_samples"
    elif loader.batch_size is None:
        refused = "a batch_sampler or without batches"
    if refused:
        raise ValueError(
            f"{name}: the order of samples comes from the Trainer's seed; a DataLoader with "
            f"{refused} cannot be honoured, pass its dataset"
        )
    samples = _from_dataset(loader.dataset, loader.collate_fn, name, device, dtype)
    samples.batch_size = loader.batch_size
    return samples
