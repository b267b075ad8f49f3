"""What the second phase keeps of the frozen network: h, the wide layer's input, or nothing."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..network import Network
from .data import Samples

MODES = ("auto", "hidden", "backbone", "none")
# Samples a forward pass outside training; fixed, so that a resumed run has the same bits.
BATCH = 256
SHARE = 0.6  # of the memory available when the cache is planned


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
    random: bool,
    fixed_features: bool,
) -> CachePlan:
    """Choose what to cache for n samples (training and validation together).

    "hidden" keeps n * width numbers, "backbone" n * backbone_width (the wide layer is then
    recomputed a batch at a time), "none" nothing. "auto" takes the first for which
    n * columns * itemsize <= SHARE * available bytes. Features that change from visit to visit
    (random transforms, BatchNorm on batch statistics) cannot be cached: asking for it is a
    ValueError. "backbone" without a wide softplus layer is a ValueError as well.
    """
    if requested not in MODES:
        raise ValueError(f"feature_cache: expected one of {MODES}, got {requested!r}")
    if not fixed_features or random:
        cause = "the training data change from visit to visit" if random else "batch_norm='batch'"
        if requested in ("hidden", "backbone"):
            raise ValueError(f"feature_cache: {requested!r} needs fixed features, but {cause}")
        return CachePlan("none", f"{cause}: features are recomputed every step")
    if requested == "backbone" and backbone_width is None:
        raise ValueError(
            "feature_cache: 'backbone' needs a last hidden layer that is affine + "
            "twophase_ext.nn.Softplus (tp.nn.widen adds one); use 'hidden' or 'none'"
        )
    if requested != "auto":
        return CachePlan(requested, "as asked")
    budget = int(SHARE * available)
    tried: list[str] = []
    for mode, columns in (("hidden", width), ("backbone", backbone_width)):
        if columns is None:
            continue
        needed = n * columns * itemsize
        sizes = f"{n} x {columns} x {itemsize} B = {needed / 2**30:.2f} GiB"
        if needed <= budget:
            return CachePlan(mode, "; ".join([*tried, f"{sizes} <= {budget / 2**30:.2f} GiB"]))
        tried.append(f"{mode}: {sizes} > {budget / 2**30:.2f} GiB")
    return CachePlan("none", "; ".join(tried))


class Features:
    """h(x_i) and y_i of samples under a frozen network, from the cache or recomputed.

    Filled in index order in batches of BATCH samples; the same network gives the same bits again.
    """

    def __init__(self, samples: Samples, network: Network, mode: str, on_batch: Any = None) -> None:
        """mode: "hidden", "backbone" or "none"; on_batch(count) is called as samples are done."""
        self.samples, self.network, self.mode = samples, network, mode
        self.cache: Tensor | None = None
        self.targets: Tensor | None = None
        if mode == "none":
            return
        function = network.hidden if mode == "hidden" else network.backbone
        done, targets = 0, []
        for x, y in samples.in_order(BATCH):
            rows = function(x)
            if self.cache is None:
                self.cache = rows.new_empty(samples.n, *rows.shape[1:])
            self.cache[done : done + len(rows)] = rows
            targets.append(y)
            done += len(rows)
            if on_batch is not None:
                on_batch(len(rows))
        self.targets = torch.cat(targets)

    @property
    def bytes(self) -> int:
        """Memory held by the cache."""
        return 0 if self.cache is None else self.cache.numel() * self.cache.element_size()

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(h [b, m_H], y) of the samples `index` (int64 on the CPU)."""
        if self.cache is None or self.targets is None:
            x, y = self.samples.fetch(index)
            return self.network.hidden(x), y
        index = index.to(self.cache.device)
        rows = self.cache.index_select(0, index)
        return (
            rows if self.mode == "hidden" else self.network.widen(rows),
            self.targets.index_select(0, index),
        )

    def in_order(self, size: int) -> Any:
        """Batches (h, y) of `size` in index order."""
        for start in range(0, self.samples.n, size):
            end = min(start + size, self.samples.n)
            if self.cache is None or self.targets is None:
                yield self.batch(torch.arange(start, end))
            else:
                rows = self.cache[start:end]
                h = rows if self.mode == "hidden" else self.network.widen(rows)
                yield h, self.targets[start:end]
