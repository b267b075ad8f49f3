"""Training data in one form: batches by sample index, checked before anything is trained."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset, default_collate

from ...core.arrays import as_data, require_finite
from ...core.collated import Collated, pair
from ...core.loaders import batching, chosen, is_loader, is_map_style, not_used
from ...core.memory import available_memory
from ...core.seeds import stream_seed
from ...core.workers import Job, Workers
from ...model.calling import Packing, is_several, pack
from ...model.losses import ConvexLoss, Telling, objective
from .content import Content, bytes_of_rows, own_memory
from .rows import Rows, rows_that_count

Augment = Callable[[Tensor, torch.Generator], Tensor]
_CHECKED = 256  # samples of a Dataset looked at together before training
_SHARE = 4  # inputs that take at most 1 / _SHARE of the device's free memory are moved there
_LOOKED_AT = 8  # samples fetched at once, to be compared while all are checked before training
# Samples a forward pass outside training; fixed, so that a resumed run has the same bits.
BATCH = 256


class Samples(Rows):
    """n samples (x_i, y_i), fetched by index as tensors on one device.

    Made by `Samples.of` from a pair of arrays, a map-style Dataset or a DataLoader over one. uint8
    inputs are scaled to [0, 1] when they are fetched, so that images stay small in memory.
    random: fetching a sample again gave another one, at whichever fetch: every sample is compared,
    by a hash, with what it was before; `changed` says which. What its transforms draw comes from
    (seed, epoch), which the engine sets, and the batch. augment: a transform of whole batches,
    (x [b, ...], torch.Generator) -> x, likewise.

    Targets are fetched row by row, [b each, ...] (rows.py).
    """

    def __init__(self, name: str, n: int, device: torch.device, dtype: torch.dtype) -> None:
        """Use `Samples.of`."""
        super().__init__(name, n)
        self.device, self.dtype = device, dtype
        self.batch_size: int | None = None
        self.not_used: list[str] = []  # arguments of the DataLoader, and why
        self.packing: Packing | None = None  # of several inputs, as one tensor
        self.random, self.changed = False, "the inputs are transformed at random at every visit"
        self.seed, self.epoch = 0, 0
        self.augment: Augment | None = None
        # once `prepare` has looked at them all:
        self.telling = Telling()
        self.objective: ConvexLoss  # the loss as a mean over these samples
        self.targets: Tensor  # of all, on the CPU
        self.groups: Tensor | None = None  # of equal inputs, as the model is fed; see model/groups
        self.content: str | None = None  # a hash of inputs and targets; None where they are random

    @staticmethod
    def of(source: Any, *, name: str, device: torch.device, dtype: torch.dtype) -> "Samples":
        """Samples from `source`; see the class. Errors name the argument `name`."""
        if is_loader(source):
            return _from_loader(source, name, device, dtype)
        if isinstance(source, IterableDataset):
            raise ValueError(f"{name}: expected a map-style dataset, got an IterableDataset")
        if isinstance(source, tuple | list) and len(source) == 2:
            return _Arrays(source[0], source[1], name, device, dtype)
        other = (tuple, list, Mapping, str, bytes, Tensor)
        if (
            is_map_style(source)
            and not isinstance(source, other)
            and not hasattr(source, "__array__")
        ):
            return _from_dataset(Collated(source, default_collate, name), device, dtype)
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

    def prepare(self, loss: ConvexLoss, outputs: int, each: int = 1) -> None:
        """Check every sample, and convert the targets for `loss` and `outputs` outputs.

        each: rows of outputs of a sample. ValueError where no label counts.
        """
        self.outputs, self.each = outputs, each
        self.keep(self._look_at_all(loss))
        if self.groups is not None:
            self.groups = self.of_rows(self.groups)

    def _look_at_all(self, loss: ConvexLoss) -> Tensor:
        """Which rows count, bool [n each], on the CPU."""
        raise NotImplementedError

    @property
    def distinct(self) -> int:
        """N, the rows of distinct inputs; all rows where they are random."""
        known = None if self.random else self.groups
        return self.rows if known is None else len(known.unique())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it no batch is fetched twice, as far as memory allows."""
        yield

    @contextmanager
    def ahead(self, batches: Iterable[Tensor]) -> Iterator[None]:
        """Within it these are fetched next, in this order: a loader's workers do it ahead."""
        yield

    def close(self) -> None:
        """End the worker processes, where there are some."""

    def example(self) -> Tensor:
        """Inputs of the first two samples."""
        return self.fetch(torch.arange(min(self.n, 2), device="cpu"), augmented=False)[0]

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
        indices = [torch.arange(start, end, device="cpu") for start, end in batches]
        with self.ahead(indices):
            for index in indices:
                yield self.fetch(index, augmented=augmented)

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
        packing = None
        if is_several(x):
            x, packing = pack(x, f"{name}[0]")
        self.x = as_data(x, name=f"{name}[0]")
        self.y = as_data(y, name=f"{name}[1]")
        for part, tensor in (("x", self.x), ("y", self.y)):
            if tensor.dim() == 0:
                raise ValueError(f"{name}: expected {part} with a sample dimension, got a scalar")
        _check_length(name, len(self.x), len(self.y))
        require_finite(self.x, name, "input")
        require_finite(self.y, name, "target")
        largest = torch.finfo(dtype).max
        wide = self.x.dtype is torch.float64 and self.x.numel() > 0
        if wide and float(torch.stack(self.x.aminmax()).abs().max()) > largest:
            raise ValueError(f"{name}: expected inputs within {dtype}'s range, up to {largest:.3g}")
        super().__init__(name, len(self.x), device, dtype)
        self.packing = packing

    def _look_at_all(self, loss: ConvexLoss) -> Tensor:
        content = Content(self.dtype)
        for start, end in self.batches(_CHECKED):
            content.add(self.x[start:end], self.y[start:end])
        self.content, self.groups = content.digest(), content.grouping.index()
        self.y = self.targets_of(loss, self.y)
        if self.y.is_floating_point():
            self.y = self.y.to(self.dtype)
        rows = self.by_row(self.y)
        counts = rows_that_count(loss, rows)
        self.telling.add(rows[counts])
        self.targets = rows[counts].cpu()
        self.objective = objective(loss, rows[counts], self.outputs)
        # Labels are small: on the device once. So are inputs that fit; others move batch by batch.
        self.y = self.y.to(self.device)
        if _SHARE * self.x.nbytes <= available_memory(self.device):
            self.x = self.x.to(self.device)
        return counts.cpu()

    def _fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.x.device, non_blocking=True)
        x = self.x.index_select(0, index)
        return self._place(x), self.by_row(self.y.index_select(0, index.to(self.y.device)))


class _Fetched(Samples):
    """A map-style dataset: samples are fetched one by one and collated."""

    def __init__(
        self,
        collated: Collated,
        device: torch.device,
        dtype: torch.dtype,
        workers: Workers | None = None,
    ) -> None:
        n = len(collated.dataset)
        _check_length(collated.name, n, n)
        super().__init__(collated.name, n, device, dtype)
        self.collated, self.workers = collated, workers
        self.loss: ConvexLoss | None = None
        self._hashed: Content | None = None  # while all are looked at
        self._seen = np.zeros((self.n, 2), np.int64)  # of each sample: its form, and a hash of it
        self._kept: dict[Any, tuple[Tensor, Tensor]] | None = None
        self._room = 0
        # Most transforms at random are known before training: the check there looks again.
        some = list(range(0, self.n, -(-self.n // _LOOKED_AT)))
        for i in some:
            self._compare(*self._checked(self.collated([i], 0), [i]), [i])

    def _checked(self, batch: Any, indices: list[int]) -> tuple[Tensor, Tensor]:
        """(x, y) of the batch that came for these samples."""
        x, y = pair(batch, self.name)
        if is_several(x):
            x = self._packed(x)
        x, y = (as_data(part, name=self.name) for part in (x, y))
        for part, what in ((x, "inputs"), (y, "targets")):
            if part.dim() == 0 or len(part) != len(indices):
                got = f"of shape {list(part.shape)}" if part.dim() == 0 else f"for {len(part)}"
                raise ValueError(
                    f"{self.name}: expected {what} for {len(indices)} samples from the collate "
                    f"function, got {what} {got}: one that adds or drops samples, or lists numbers "
                    "by column, has to do so in the dataset (Hugging Face's: with_format('torch'))"
                )
        return x, y

    def _packed(self, inputs: Any) -> Tensor:
        x, packing = pack(inputs, self.name)
        if self.packing is not None and packing != self.packing:
            raise ValueError(
                f"{self.name}: expected inputs of the shapes and types of the first ones, "
                f"{self.packing.shapes} {self.packing.dtypes}, got {packing.shapes} "
                f"{packing.dtypes}; pad all samples to one length"
            )
        self.packing = packing
        return x

    def _compare(self, x: Tensor, y: Tensor, indices: list[int]) -> None:
        """Set `random` where a sample is not what it was. Forms differ where batches are padded."""
        if self.random:
            return
        form = hash((x.shape[1:], x.dtype, y.shape[1:], y.dtype)) | 1
        for i, *parts in zip(indices, bytes_of_rows(x), bytes_of_rows(y), strict=True):
            known, value = self._seen[i].tolist(), hash(tuple(parts))
            if known[0] == form and known[1] != value:
                self.random = True
                self.changed = f"sample {i} was another one when it was fetched again"
                return
            self._seen[i] = form, value

    @contextmanager
    def held(self) -> Iterator[None]:
        self._kept, self._room = {}, available_memory(torch.device("cpu")) // _SHARE
        try:
            yield
        finally:
            self._kept = None

    def _look_at_all(self, loss: ConvexLoss) -> Tensor:
        self.loss = loss
        self._hashed = content = Content(self.dtype)
        counts, targets = [], []
        for _, y in self.in_order(_CHECKED):  # nothing may be found wrong after hours of training
            counts.append(rows_that_count(loss, y))
            targets.append(y[counts[-1]])
            self.telling.add(targets[-1])
        whole = torch.cat(targets)
        self.objective, self.targets = objective(loss, whole, self.outputs), whole.cpu()
        self._hashed = None
        if not self.random:
            self.content, self.groups = content.digest(), content.grouping.index()
        return torch.cat(counts).cpu()

    def _fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        indices = index.tolist()
        key = self._key(indices)
        x, y = (self._kept or {}).get(key) or self._read(indices)
        if self._kept is not None:
            if key not in self._kept and x.nbytes + y.nbytes <= self._room:
                self._kept[key] = own_memory(x), own_memory(y)
                self._room -= x.nbytes + y.nbytes
            x = x.clone()  # a model may write into its inputs
        y = y.to(self.device)
        y = y.to(self.dtype) if y.is_floating_point() else y
        return self._place(x), y if self.loss is None else self.by_row(y)

    def _key(self, indices: list[int]) -> tuple[int | None, tuple[int, ...]]:
        return self.epoch if self.random else None, tuple(indices)

    def _job(self, indices: list[int]) -> Job:
        # in one epoch a sample comes once: the first one tells the batch
        return indices, stream_seed(self.seed, "augment", self.epoch, indices[0])

    @contextmanager
    def ahead(self, batches: Iterable[Tensor]) -> Iterator[None]:
        if self.workers is None:
            yield
            return
        asked = [index.tolist() for index in batches]
        kept = self._kept or {}
        with self.workers.ahead([self._job(i) for i in asked if i and self._key(i) not in kept]):
            yield

    def close(self) -> None:
        if self.workers is not None:
            self.workers.close()

    def _read(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        job = self._job(indices)
        taken = None if self.workers is None else self.workers.take(job)
        x, y = self._checked(self.collated(*job) if taken is None else taken[0], indices)
        require_finite(x, self.name, "input", indices)
        require_finite(y, self.name, "target", indices)
        self._compare(x, y, indices)
        if self._hashed is not None:
            self._hashed.add(x, y)
        return x, y if self.loss is None else self.targets_of(self.loss, y, indices)


def _from_dataset(
    collated: Collated, device: torch.device, dtype: torch.dtype, loader: Any = None
) -> Samples:
    """Those of a dataset; loader: the DataLoader that it came with."""
    dataset, name = collated.dataset, collated.name
    plain = type(dataset) is TensorDataset and collated.collate is default_collate
    if plain and len(dataset.tensors) == 2:
        return _Arrays(dataset.tensors[0], dataset.tensors[1], name, device, dtype)
    parallel = getattr(loader, "num_workers", 0) > 0
    workers = Workers(collated, loader, device) if parallel else None
    return _Fetched(collated, device, dtype, workers)


def _from_loader(loader: Any, name: str, device: torch.device, dtype: torch.dtype) -> Samples:
    """A DataLoader's samples, collate function, workers and batch size; the order stays ours."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not is_map_style(dataset):
        raise ValueError(f"{name}: expected a loader over a map-style dataset")
    part = chosen(loader, name)
    if part is not None and type(dataset) is TensorDataset:
        dataset = TensorDataset(*(tensor[part] for tensor in dataset.tensors))
    elif part is not None:
        dataset = Subset(dataset, part)
    samples = _from_dataset(Collated(dataset, loader.collate_fn, name), device, dtype, loader)
    samples.batch_size = batching(loader)[1]
    samples.not_used = not_used(loader, name, device, arrays=isinstance(samples, _Arrays))
    return samples
