"""Training data in one form: batches by sample index, checked before anything is trained."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset, default_collate

from ...core.arrays import as_data, require_finite, sample_weights
from ...core.collated import Collated
from ...core.loaders import batching, chosen, drawn_with, is_loader, is_map_style, not_used
from ...core.memory import available_memory
from ...core.seeds import stream_seed
from ...core.workers import Job, Workers
from ...model.calling import Packing, is_several, pack
from ...model.labels import Classes, as_targets
from ...model.losses import ConvexLoss, Telling, objective, split, weighted
from .parts import (
    Content,
    Seen,
    check_augmented,
    check_classes,
    check_length,
    check_range,
    own_memory,
    parts_of,
    product,
)
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

    Targets are fetched row by row, [b each, ...] (rows.py), with their weights where there are any.
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
        self.drawn: Tensor | None = None  # weights of a WeightedRandomSampler, [n]
        self.classes: Classes | None = None  # of labels that were text, sorted
        # once `prepare` has looked at them all:
        self.telling = Telling()
        self.objective: ConvexLoss  # the loss as a mean over these samples
        self.targets: Tensor  # of all, on the CPU
        self.groups: Tensor | None = None  # of equal inputs, as the model is fed; see model/groups
        self.content: str | None = None  # a hash of inputs and targets; None where they are random

    @staticmethod
    def of(
        source: Any,
        *,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        classes: Classes | None = None,
    ) -> "Samples":
        """Samples from `source`, whose errors it names; classes: known ones, of text."""
        if is_loader(source):
            return _from_loader(source, name, device, dtype)
        if isinstance(source, IterableDataset):
            raise ValueError(f"{name}: expected a map-style dataset, got an IterableDataset")
        if isinstance(source, tuple | list) and len(source) in (2, 3):
            return _Arrays(source, name, device, dtype, classes=classes)
        other = (tuple, list, Mapping, str, bytes, Tensor)
        if (
            is_map_style(source)
            and not isinstance(source, other)
            and not hasattr(source, "__array__")
        ):
            return _from_dataset(Collated(source, default_collate, name), device, dtype)
        raise TypeError(
            f"{name}: expected (x, y), (x, y, weight), a Dataset or a DataLoader, got "
            f"{type(source).__name__}"
        )

    def fetch(self, index: Tensor, *, augmented: bool = True) -> tuple[Tensor, Tensor]:
        """(x, y) of the samples `index` (int64 on the CPU), on the device."""
        x, y = self._fetch(index)
        if not augmented or self.augment is None:
            return x, y
        # in one epoch a sample comes once: the first one tells the batch
        seed = stream_seed(self.seed, "augment", self.epoch, int(index[0]))
        changed = self.augment(x, torch.Generator().manual_seed(seed))
        check_augmented(changed, x)
        return changed, y

    def _fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def prepare(self, loss: ConvexLoss, outputs: int, each: int = 1) -> None:
        """Check every sample, and convert the targets for `loss` and `outputs` outputs.

        each: rows of outputs of a sample. ValueError where none counts, for weights of a loss that
        takes none, and for text where labels are none, or of more classes than outputs.
        """
        self.outputs, self.each = outputs, each
        if self.weighted:
            weighted(loss)
        if self.classes is not None:
            check_classes(self.classes, loss, outputs, self.name)
        self.keep(self._look_at_all(loss))
        if self.groups is not None:
            self.groups = self.of_rows(self.groups)

    def _look_at_all(self, loss: ConvexLoss) -> Tensor:
        """Which rows count, bool [n each], on the CPU."""
        raise NotImplementedError

    def _settle(self, loss: ConvexLoss, rows: Tensor) -> Tensor:
        """Objective and targets from those of all rows; which of them count, on the CPU."""
        own = weighted(loss) if self.weighted else loss
        counts = rows_that_count(own, rows)
        self.targets = rows[counts].cpu()
        if len(self.targets):
            self.objective = objective(own, self.targets, self.outputs)
            self.telling.add(self.targets)
        return counts.cpu()

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


class _Arrays(Samples):
    """Two arrays held whole, on the device where they fit: the batch is one index_select."""

    def __init__(
        self,
        arrays: Sequence[Any],
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        drawn: Tensor | None = None,
        classes: Classes | None = None,
    ) -> None:
        """arrays: x, y and maybe weights; drawn: weights of a sampler, which multiply them."""
        (x, y, *rest), packing = arrays, None
        if is_several(x):
            x, packing = pack(x, f"{name}[0]")
        self.x = as_data(x, name=f"{name}[0]")
        self.y, found = as_targets(y, f"{name}[1]", classes)
        for part, tensor in (("x", self.x), ("y", self.y)):
            if tensor.dim() == 0:
                raise ValueError(f"{name}: expected {part} with a sample dimension, got a scalar")
        check_length(name, len(self.x), len(self.y))
        require_finite(self.x, name, "input")
        require_finite(self.y, name, "target")
        check_range(self.x, name, dtype)
        super().__init__(name, len(self.x), device, dtype)
        self.packing, self.classes = packing, found
        c = sample_weights(rest[0], self.n, f"{name}[2]", dtype) if rest else None
        c = product(c, drawn, name, dtype)
        equal = c is None or bool(c.min() == c.max() > 0)
        self.weights, self.weighted = None if equal else c, not equal

    def _look_at_all(self, loss: ConvexLoss) -> Tensor:
        content, c = Content(self.dtype, self.classes), self.weights
        for start, end in self.batches(_CHECKED):
            own = None if c is None else c[start:end]
            content.add(self.x[start:end], self.y[start:end], own)
        self.content, self.groups = content.digest(weighted=c is not None), content.grouping.index()
        self.y = self.with_weights(self.targets_of(loss, self.y), c)
        if self.y.is_floating_point():
            self.y = self.y.to(self.dtype)
        rows = self.by_row(self.y)
        counts = self._settle(loss, rows)
        # Labels are small: on the device once. So are inputs that fit; others move batch by batch.
        self.y = self.y.to(self.device)
        if _SHARE * self.x.nbytes <= available_memory(self.device):
            self.x = self.x.to(self.device)
        return counts

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
        drawn: Tensor | None = None,
        workers: Workers | None = None,
    ) -> None:
        n = len(collated.dataset)
        check_length(collated.name, n, n)
        super().__init__(collated.name, n, device, dtype)
        self.drawn, self.weighted = drawn, drawn is not None
        self.collated, self.workers = collated, workers
        self.loss: ConvexLoss | None = None
        self._hashed: Content | None = None  # while all are looked at
        self._seen = Seen(n)
        self._weights: list[Tensor] = []  # while all are looked at
        self._kept: dict[Any, tuple[Tensor, Tensor, Tensor | None]] | None = None
        self._room = 0
        # Most transforms at random are known before training: the check there looks again.
        some = list(range(0, self.n, -(-self.n // _LOOKED_AT)))
        for i in some:
            x, y, c = self._checked(self.collated([i], 0), [i])
            self.weighted = self.weighted or c is not None
            self._compare(x, y, c, [i])

    def _checked(self, batch: Any, indices: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, y, weights) of the batch that came for these samples."""
        own = (indices, self.name, self.dtype, self.packing)
        x, y, c, self.packing = parts_of(batch, *own)
        return x, y, c

    def _compare(self, x: Tensor, y: Tensor, c: Tensor | None, indices: list[int]) -> None:
        """Set `random` where a sample is not what it was."""
        parts = [part for part in (x, y, c) if part is not None]
        i = None if self.random else self._seen.changed(parts, indices)
        if i is not None:
            self.random = True
            self.changed = f"sample {i} was another one when it was fetched again"

    @contextmanager
    def held(self) -> Iterator[None]:
        self._kept, self._room = {}, available_memory(torch.device("cpu")) // _SHARE
        try:
            yield
        finally:
            self._kept = None

    def _look_at_all(self, loss: ConvexLoss) -> Tensor:
        self.loss, self._weights = loss, []
        (self._kept or {}).clear()  # their targets are as they came
        self._hashed = content = Content(self.dtype)
        # nothing may be found wrong after hours of training
        rows = torch.cat([y for _, y in self.in_order(_CHECKED)])
        self._hashed = None
        if self.weighted and bool((c := torch.cat(self._weights)).min() == c.max() > 0):
            rows, self.weighted = split(weighted(loss), rows)[0], False  # as without
        if not self.random:
            self.content = content.digest(weighted=self.weighted)
            self.groups = content.grouping.index()
        return self._settle(loss, rows)

    def _fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        indices = index.tolist()
        key = self._key(indices)
        x, y, c = (self._kept or {}).get(key) or self._read(indices)
        if self._kept is not None:
            if key not in self._kept and x.nbytes + y.nbytes <= self._room:
                self._kept[key] = own_memory(x), y, c
                self._room -= x.nbytes + y.nbytes
            x = x.clone()  # a model may write into its inputs
        if self.loss is not None:
            y = self.by_row(self.with_weights(y, c))
        y = y.to(self.device)
        return self._place(x), y.to(self.dtype) if y.is_floating_point() else y

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

    def _read(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        job = self._job(indices)
        taken = None if self.workers is None else self.workers.take(job)
        x, y, c = self._checked(self.collated(*job) if taken is None else taken[0], indices)
        require_finite(x, self.name, "input", indices)
        require_finite(y, self.name, "target", indices)
        self._compare(x, y, c, indices)
        c = product(c, None if self.drawn is None else self.drawn[indices], self.name, self.dtype)
        if self._hashed is not None:
            self._hashed.add(x, y, c)
            self._weights += [] if c is None else [c]
        return x, y if self.loss is None else self.targets_of(self.loss, y, indices), c


def _from_dataset(
    collated: Collated,
    device: torch.device,
    dtype: torch.dtype,
    drawn: Tensor | None = None,
    loader: Any = None,
) -> Samples:
    """Those of a dataset; loader: the DataLoader that it came with, drawn: `drawn_with` of it."""
    dataset = collated.dataset
    plain = type(dataset) is TensorDataset and collated.collate is default_collate
    if plain and len(dataset.tensors) in (2, 3):
        return _Arrays(dataset.tensors, collated.name, device, dtype, drawn)
    parallel = getattr(loader, "num_workers", 0) > 0
    workers = Workers(collated, loader, device) if parallel else None
    return _Fetched(collated, device, dtype, drawn, workers)


def _from_loader(loader: Any, name: str, device: torch.device, dtype: torch.dtype) -> Samples:
    """A DataLoader's samples, collate function, workers and batch size; the order stays ours."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not is_map_style(dataset):
        raise ValueError(f"{name}: expected a loader over a map-style dataset")
    part, drawn = chosen(loader, name), drawn_with(loader, name, dtype)
    if part is not None and type(dataset) is TensorDataset:
        dataset = TensorDataset(*(tensor[part] for tensor in dataset.tensors))
    elif part is not None:
        dataset = Subset(dataset, part)
    collated = Collated(dataset, loader.collate_fn, name)
    samples = _from_dataset(collated, device, dtype, drawn, loader)
    samples.batch_size, samples.drawn = batching(loader)[1], drawn
    samples.not_used = not_used(loader, name, device, arrays=isinstance(samples, _Arrays))
    return samples
