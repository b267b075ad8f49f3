"""What samples consist of: inputs, targets, weights; told apart, checked, hashed."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.arrays import as_data, require_finite
from ...core.hashing import flat
from ...model.groups import Grouping
from ...model.labels import Classes, as_text
from ...model.losses import ConvexLoss, SoftmaxLoss

TARGETS = ("y", "label", "labels", "target", "targets")  # names of y in samples that are dicts
WEIGHTS = ("weight", "weights", "sample_weight", "sample_weights")


class Content:
    """A hash of samples in index order, however they are batched, and groups of equal inputs.

    dtype: inputs are equal that are equal in it. classes: what the targets number, text.
    """

    def __init__(self, dtype: torch.dtype, classes: Classes | None = None) -> None:
        """Of no sample yet."""
        self._parts = [hashlib.sha256() for _ in range(3)]
        if classes is not None:
            self._parts[1].update(repr(classes).encode())
        self._dtype, self.grouping = dtype, Grouping()

    def add(self, x: Tensor, y: Tensor, c: Tensor | None = None) -> None:
        """More samples, with their weights."""
        self.grouping.add(x.to(self._dtype) if x.is_floating_point() else x)
        for part, t in zip(self._parts, (x, y, c), strict=True):
            if t is not None:
                part.update(flat(t).view(torch.uint8).numpy().data)

    def digest(self, *, weighted: bool = False) -> str:
        """Of inputs and targets, and of the weights where they count."""
        return " ".join(part.hexdigest() for part in self._parts[: 3 if weighted else 2])


def parts_of(batch: Any, name: str) -> tuple[Any, Any, Any]:
    """x, y and weights (None without) of a collated batch; ValueError where they cannot be told.

    TypeError for targets that are text: which classes there are would be known at the end alone.
    """
    x, y, c = _told(batch, name)
    if as_text(y) is not None:
        raise TypeError(
            f"{name}: labels that are text are taken as one array, (x, y); let the dataset give "
            "numbers"
        )
    return x, y, c


def _told(batch: Any, name: str) -> tuple[Any, Any, Any]:
    if isinstance(batch, Mapping):
        targets = [key for key in batch if key in TARGETS]
        weights = [key for key in batch if key in WEIGHTS]
        inputs = [key for key in batch if key not in TARGETS + WEIGHTS]
        if len(targets) == 1 and len(weights) < 2 and inputs:
            several = {key: batch[key] for key in inputs}
            x = several if len(inputs) > 1 else batch[inputs[0]]
            return x, batch[targets[0]], batch[weights[0]] if weights else None
        raise ValueError(
            f"{name}: expected samples (x, y), got a mapping with {list(batch)}; pass a DataLoader "
            "whose collate_fn returns (x, y)"
        )
    if not (isinstance(batch, tuple | list) and len(batch) in (2, 3)):
        raise ValueError(
            f"{name}: expected samples (x, y) or (x, y, weight), got {type(batch).__name__}"
        )
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


def sample_weights(
    weights: Any,
    n: int,
    name: str,
    dtype: torch.dtype = torch.float64,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Weights of n samples, or of their tokens or pixels: float64 [n, ...] on the CPU.

    Raises TypeError for complex ones, ValueError where they are of another shape, negative, not
    finite, or above 0 and not so in `dtype`; indices: the samples' numbers where n is some of them.
    """
    c = as_data(weights, name=name).cpu()
    if c.is_complex():
        raise TypeError(f"{name}: expected real weights, got {c.dtype}")
    if c.dim() == 0 or len(c) != n:
        raise ValueError(f"{name}: expected {n} weights, one a sample, got {list(c.shape)}")
    require_finite(c, name, "weight", None if indices is None else list(indices))
    c = c.double()
    there = c.to(dtype)
    wrong = (c < 0) | ~there.isfinite() | ((c > 0) & (there == 0))
    if bool(wrong.any()):
        i, *_ = wrong.nonzero()[0].tolist()
        value = float(c[wrong][0])
        raise ValueError(
            f"{name}: expected weights >= 0 within {dtype}'s range, got {value:g} at sample "
            f"{i if indices is None else indices[i]}"
        )
    return c


def product(c: Tensor | None, drawn: Tensor | None, name: str, dtype: torch.dtype) -> Tensor | None:
    """Samples' own weights [n, ...] times those with which they are drawn [n]; None of neither."""
    if c is None or drawn is None:
        return drawn if c is None else c
    both = c * drawn.reshape(-1, *[1] * (c.dim() - 1))
    return sample_weights(both, len(both), name, dtype)


def check_classes(classes: Classes, loss: ConvexLoss, outputs: int, name: str) -> None:
    """ValueError where labels that are text do not fit the loss, or the network's outputs."""
    if not isinstance(loss, SoftmaxLoss):
        raise ValueError(
            f"{name}: the labels are text, {classes[0]!r}, which {loss.name} does not take; "
            "cross-entropy does"
        )
    if len(classes) > outputs:
        shown = ", ".join(map(repr, classes[:5])) + (", ..." if len(classes) > 5 else "")
        raise ValueError(
            f"{name}: {len(classes)} classes, {shown}, where the last layer has {outputs} outputs"
        )


def row_bytes(x: Tensor) -> list[bytes]:
    """The bytes of each sample."""
    if x[0].numel() == 0:
        return [b""] * len(x)
    rows = x.cpu().contiguous().reshape(len(x), -1).view(torch.uint8).numpy()
    return [row.tobytes() for row in rows]


def check_length(name: str, n: int, n_targets: int) -> None:
    """ValueError for other numbers of inputs and targets, and for no sample."""
    if n != n_targets:
        raise ValueError(f"{name}: expected as many targets as inputs ({n}), got {n_targets}")
    if n == 0:
        raise ValueError(f"{name}: the data set is empty")


def check_range(x: Tensor, name: str, dtype: torch.dtype) -> None:
    """ValueError for finite inputs that are not so in `dtype`."""
    largest, wide = torch.finfo(dtype).max, x.dtype is torch.float64 and x.numel() > 0
    if wide and float(torch.stack(x.aminmax()).abs().max()) > largest:
        raise ValueError(f"{name}: expected inputs within {dtype}'s range, up to {largest:.3g}")


def check_augmented(changed: Any, x: Tensor) -> None:
    """ValueError where `augment` returned no tensor like x."""
    if not isinstance(changed, Tensor) or changed.shape != x.shape or changed.dtype != x.dtype:
        got = changed if isinstance(changed, Tensor) else None
        found = type(changed).__name__ if got is None else f"{list(got.shape)} {got.dtype}"
        raise ValueError(f"augment: expected {list(x.shape)} {x.dtype}, got {found}")
