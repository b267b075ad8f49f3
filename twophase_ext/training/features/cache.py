"""What the second phase keeps of the frozen network: h, the wide layer's input, or nothing."""

import errno
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.memory import available_memory
from ...core.messages import first_line
from ...model.network import Network
from ..data.samples import BATCH, Samples
from ..distributed.ranks import Ranks

MODES = ("auto", "hidden", "backbone", "disk", "hidden-bfloat16", "none")
SHARE = 0.6  # of the memory, or of the free disk, when the cache is planned


@dataclass(frozen=True)
class CachePlan:
    """The chosen mode and the inequality that chose it."""

    mode: str
    reason: str


def plan_cache(
    requested: str,
    *,
    n: int,
    width: int,
    backbone_width: int | None,
    itemsize: int,
    available: int,
    disk: int,
    random: bool,
    moving: str | None,
    copies: int | None = None,
    name: str = "feature_cache",
) -> CachePlan:
    """Choose what to cache for n rows (training, times its augmented copies, and validation).

    "hidden" keeps n * width numbers in memory, "backbone" n * backbone_width (the wide layer is
    then recomputed a batch at a time), "disk" n * width in a memory-mapped file, "none" nothing.
    "auto" takes the first for which n * columns * itemsize <= SHARE * available bytes (disk: of
    the `disk` bytes that are free, 0 on an accelerator). "hidden-bfloat16" keeps h rounded to
    bfloat16, which is another h: only where it is asked for.

    Features that change from visit to visit (random transforms without `copies`; `moving`, what
    else moves them, such as BatchNorm on batch statistics) cannot be cached: asking for it is a
    ValueError. So is a mode that does not fit at all. So are "backbone" without a wide
    softplus layer, "hidden-bfloat16" for other than float32, "disk" on an accelerator, and copies
    of data that do not change. `name` is the argument that errors name.
    """
    if requested not in MODES:
        raise ValueError(f"{name}: expected one of {MODES}, got {requested!r}")
    if copies is not None and not random:
        raise ValueError(
            f"augment_copies: expected None, got {copies}: the training data do not change from "
            "visit to visit"
        )
    if moving or (random and copies is None):
        cause = "the training data change from visit to visit" if random else moving
        if requested not in ("auto", "none"):
            raise ValueError(f"{name}: {requested!r} needs fixed features, but {cause}")
        return CachePlan("none", f"{cause}: features are recomputed every step")
    if requested == "backbone" and backbone_width is None:
        raise ValueError(
            f"{name}: 'backbone' needs a last hidden layer that is affine + "
            "twophase_ext.nn.Softplus (tp.nn.widen adds one); use 'hidden' or 'none'"
        )
    if requested == "hidden-bfloat16" and itemsize != 4:
        raise ValueError(f"{name}: 'hidden-bfloat16' needs precision='float32'")
    if requested == "disk" and not disk:
        raise ValueError(f"{name}: 'disk' needs a model on the CPU and free disk space")
    places = (
        ("hidden", width, available),
        ("backbone", backbone_width, available),
        ("disk", width, disk),
    )
    if requested != "auto":
        for mode, columns, bytes_there in places:
            size = 2 if requested == "hidden-bfloat16" else itemsize
            needed = n * (columns or 0) * size
            if requested.removesuffix("-bfloat16") == mode and needed > bytes_there:
                raise ValueError(
                    f"{name}: {requested!r} takes {needed / 2**30:.2f} GiB, there are "
                    f"{bytes_there / 2**30:.2f} GiB; 'auto' takes what fits"
                )
        return CachePlan(requested, "as asked")
    tried: list[str] = []
    for mode, columns, bytes_there in places:
        if columns is None:
            continue
        needed, budget = n * columns * itemsize, int(SHARE * bytes_there)
        sizes = f"{n} x {columns} x {itemsize} B = {needed / 2**30:.2f} GiB"
        if needed <= budget:
            return CachePlan(mode, "; ".join([*tried, f"{sizes} <= {budget / 2**30:.2f} GiB"]))
        tried.append(f"{mode}: {sizes} > {budget / 2**30:.2f} GiB")
    if copies is not None:
        raise ValueError(f"augment_copies: {copies} copies fit nowhere: {'; '.join(tried)}")
    return CachePlan("none", "; ".join(tried))


def smaller_mode(
    mode: str, error: BaseException, *, network: Network, device: torch.device, copies: int | None
) -> str:
    """The mode to go on with where memory ran out in `mode`; raises `error` where it is another."""
    out = isinstance(error, MemoryError | torch.OutOfMemoryError)
    out = out or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
    if not (out or "can't allocate memory" in str(error)):
        raise error
    modes = ["hidden"]  # from the largest to nothing
    modes += ["backbone"] if network.wide is not None else []
    modes += ["disk"] if free_disk(device) else []
    modes += ["none"] if copies is None else []
    smaller = modes[modes.index(mode) + 1 :] if mode in modes else modes[1:]
    if not smaller:
        raise error
    warnings.warn(
        f"feature_cache: memory ran out in mode {mode!r} ({first_line(error)}); going on "
        f"with {smaller[0]!r}",
        stacklevel=2,
    )
    return smaller[0]


def plan_for(
    network: Network,
    sets: Sequence[Samples],
    requested: str,
    *,
    moving: str | None = None,
    copies: int | None = None,
    name: str = "feature_cache",
    ranks: Ranks | None = None,
) -> CachePlan:
    """`plan_cache` for the training samples, the first of `sets`, and those measured beside.

    ranks: each keeps its columns of h, in its share of the memory of the fullest machine.
    """
    ranks = ranks or Ranks()
    train, device = sets[0], sets[0].device
    return plan_cache(
        requested,
        n=train.rows * (copies or 1) + sum(samples.rows for samples in sets[1:]),
        width=-(-network.width // ranks.size),
        backbone_width=None if network.wide is None else network.wide.linear.in_features,
        itemsize=train.dtype.itemsize,
        available=ranks.all_reduce_min(available_memory(device)) // ranks.local_size,
        disk=ranks.all_reduce_min(free_disk(device)) // ranks.local_size,
        copies=copies,
        random=any(samples.random for samples in sets),
        moving=moving,
        name=name,
    )


def free_disk(device: torch.device) -> int:
    """Bytes free where a mapped cache is kept (tempfile.gettempdir()); 0 on an accelerator."""
    return shutil.disk_usage(tempfile.gettempdir()).free if device.type == "cpu" else 0


class Stored(NamedTuple):
    """What a cache holds: rows of h or z [n, ...], targets [n, ...]; n counts rows."""

    rows: Tensor
    targets: Tensor


class Features:
    """h(x_i) and y_i of samples under a frozen network, from the cache or recomputed.

    Numbered by row: a sample each, or each of its outputs that counts. Filled in index order in
    batches of BATCH rows; the same network and number of threads give the same bits again.
    With copies, the samples are visited so many times, each with its own random transforms, and
    `copy` says which visit `batch` and `rows` mean; `in_order` and `n` are of all.
    """

    def __init__(
        self,
        samples: Samples,
        network: Network,
        mode: str,
        on_batch: Any = None,
        copies: int | None = None,
    ) -> None:
        """mode: one of MODES but "auto"; on_batch(count) is called as samples are done."""
        self.samples, self.network, self.mode = samples, network, mode
        self.copies, self.copy = copies or 1, 0
        self.n = samples.rows * self.copies
        self.stored = None if mode == "none" else self._fill(copies, on_batch)

    def _fill(self, copies: int | None, on_batch: Any) -> Stored:
        kept: Tensor | None = None
        done, targets = 0, list[Tensor]()
        for rows, y in self._computed(copies):
            kept = self._empty(rows) if kept is None else kept
            kept[done : done + len(rows)] = rows
            targets.append(y)
            done += len(rows)
            if on_batch is not None:
                on_batch(len(rows))
        if kept is None:
            raise ValueError("samples: expected at least one")
        return Stored(kept, torch.cat(targets))

    def _computed(self, copies: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows to keep and their targets, batch by batch."""
        function = self.network.backbone if self.mode == "backbone" else self.network.hidden
        for copy in range(self.copies):
            with self._as_copy(copy, copies):
                for x, y in self.samples.visit(self._batches(), augmented=True):
                    counted = self.samples.counted(y)
                    yield function(x)[counted], y[counted]

    def _batches(self) -> list[tuple[int, int]]:
        """(start, end) of the batches that fill the cache, some BATCH rows each."""
        return self.samples.batches(max(1, BATCH // self.samples.each))

    @contextmanager
    def _as_copy(self, copy: int, copies: int | None) -> Iterator[None]:
        """Within it the samples are those of this visit; copies: None where there is but one."""
        epoch = self.samples.epoch
        self.samples.epoch = epoch + (0 if copies is None else copy)
        try:
            yield
        finally:
            self.samples.epoch = epoch

    def _empty(self, rows: Tensor) -> Tensor:
        shape = (self.n, *rows.shape[1:])
        if self.mode == "hidden-bfloat16":
            return rows.new_empty(shape, dtype=torch.bfloat16)
        if self.mode != "disk":
            return rows.new_empty(shape)
        size = self.n * rows[0].numel()
        length = size * rows.element_size()
        # The file lives as long as its mapping: its name is gone at once, whatever happens.
        with tempfile.NamedTemporaryFile(prefix="twophase-features-") as file:
            # Taken now, or an error now: a write to a mapped page without room ends the process.
            os.posix_fallocate(file.fileno(), 0, length)
            flat = torch.from_file(
                file.name, shared=True, size=size, dtype=rows.dtype, device="cpu"
            )
        return flat.view(shape)

    def beside_inputs(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x, h, which of their rows these are) of the batches that filled the cache.

        Without copies: the inputs again.
        """
        done = 0
        for x, y in self.samples.visit(self._batches(), augmented=True):
            places = torch.arange(len(y), device=y.device)[self.samples.counted(y)].cpu()
            rows = torch.arange(done, done + len(places), device="cpu")
            yield x, self.batch(rows)[0], places
            done += len(places)

    @property
    def hidden(self) -> Stored | None:
        """What is stored, where that is h itself, in whatever precision."""
        return None if self.mode == "backbone" else self.stored

    @property
    def targets(self) -> Tensor:
        """Those of all rows, on the device."""
        known = self.stored
        return self.samples.targets.to(self.samples.device) if known is None else known.targets

    @property
    def bytes(self) -> int:
        """Memory, or disk, held by the cache."""
        return 0 if self.stored is None else self.stored.rows.nbytes

    def rows(self, index: Tensor) -> Tensor:
        """The cache's rows of the rows `index` in this copy."""
        return index + self.copy * self.samples.rows

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(h [b, m_H], y) of the rows `index` (int64 on the CPU)."""
        if self.stored is None:
            return self._recomputed(index)
        kept, targets = self.stored
        index = self.rows(index).to(kept.device)
        return self._h(kept.index_select(0, index)), targets.index_select(0, index)

    def in_order(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (h, y) of `size` in index order, of all copies; without a cache not augmented."""
        if self.stored is None:
            each = self.samples.each
            for x, y in self.samples.in_order(max(1, size // each) if each > 1 else size):
                counted = self.samples.counted(y)
                yield self._hidden(x)[counted], y[counted]
            return
        for start in range(0, self.n, size):
            end = min(start + size, self.n)
            kept, targets = self.stored
            yield self._h(kept[start:end]), targets[start:end]

    def _recomputed(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(h, y) of the rows `index`; of whole samples, as the model gives them."""
        owners, rows = self._owners(index)
        x, y = self.samples.fetch(owners)
        if rows is None:
            return self._hidden(x), y
        rows = rows.to(y.device)
        return self._hidden(x)[rows], y[rows]

    def _owners(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The samples whose rows these are, and where among theirs; None: a row each."""
        samples, each = self.samples, self.samples.each
        if each == 1 and samples.kept is None:
            return index, None
        numbers = index if samples.kept is None else samples.kept[index]
        owners, place = (numbers // each).unique(return_inverse=True)
        return owners, place * each + numbers % each

    def ahead(self, batches: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Within it `batch` is asked for these rows next, in this order."""
        if self.stored is not None:
            return nullcontext()
        return self.samples.ahead(self._owners(index)[0] for index in batches)

    def _hidden(self, x: Tensor) -> Tensor:
        return self.network.hidden(x)

    @torch.no_grad()
    def outputs(self, network: Network, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (logits, y) of `size` in index order, by the last layer of `network`.

        Branches share features, and each has a last layer of its own.
        """
        for h, y in self.in_order(size):
            yield network.logits(h), y

    def _h(self, rows: Tensor) -> Tensor:
        if self.mode == "backbone":
            return self.network.widen(rows)
        return rows.float() if rows.dtype == torch.bfloat16 else rows
