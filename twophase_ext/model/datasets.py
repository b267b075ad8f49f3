"""The inputs of a Dataset or a DataLoader, whole: for what is said about all of them."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset, default_collate

from ..core.arrays import as_data
from ..core.collated import Collated, inputs_of_mapping
from ..core.loaders import chosen, is_dataset, is_loader, is_map_style
from ..core.workers import Job, Workers

_BATCH = 256  # samples that are collated together
_LOOKED_AT = 8  # samples that are fetched twice


def inputs_of(x: Any, name: str) -> Any:
    """x itself, or where it is a Dataset or a DataLoader the inputs of all its samples.

    These are tensors [n, ...], or dicts or tuples of them, as its samples are: inputs, pairs
    (inputs, target), triples with a weight, or dicts. A loader's sampler, collate function and
    workers are used. Raises ValueError, which names the argument `name`, where samples do not come
    by number, are empty, are of several shapes, or where one is another when it is fetched again.
    """
    loader = x if is_loader(x) else None
    if loader is None and not is_dataset(x):
        return x
    dataset, collate = (x, default_collate) if loader is None else (x.dataset, x.collate_fn)
    if isinstance(dataset, IterableDataset) or not is_map_style(dataset):
        raise ValueError(f"{name}: expected samples by number, got {type(dataset).__name__}")
    part = None if loader is None else chosen(loader, name)
    if type(dataset) is TensorDataset and collate is default_collate and len(dataset.tensors) < 4:
        return dataset.tensors[0] if part is None else dataset.tensors[0][part]
    collated = Collated(dataset if part is None else Subset(dataset, part), collate, name)
    if len(collated.dataset) == 0:
        raise ValueError(f"{name}: the data set is empty")
    _require_fixed(collated)
    return _joined([_inputs(batch, name) for batch in _batches(collated, loader)], name)


def _require_fixed(collated: Collated) -> None:
    """ValueError where some sample is another one when it is fetched again."""
    n = len(collated.dataset)
    for i in range(0, n, -(-n // _LOOKED_AT)):
        first, again = (_inputs(collated([i], seed), collated.name) for seed in (0, 1))
        pairs = zip(_arrays(first, collated.name), _arrays(again, collated.name), strict=True)
        if any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs):
            raise ValueError(
                f"{collated.name}: sample {i} was another one when it was fetched again, but a "
                "proof is about fixed inputs; turn off what transforms them at random"
            )


def _batches(collated: Collated, loader: Any) -> Iterator[Any]:
    """All samples in index order, by the loader's workers where it has some."""
    n = len(collated.dataset)
    starts = range(0, n, _BATCH)
    jobs: list[Job] = [(list(range(i, min(i + _BATCH, n))), i) for i in starts]
    parallel = getattr(loader, "num_workers", 0) > 0
    workers = Workers(collated, loader, torch.device("cpu")) if parallel else None
    try:
        with nullcontext() if workers is None else workers.ahead(jobs):
            for job in jobs:
                taken = None if workers is None else workers.take(job)
                yield collated(*job) if taken is None else taken[0]
    finally:
        if workers is not None:
            workers.close()


def _inputs(batch: Any, name: str) -> Any:
    """Without targets and weights."""
    if isinstance(batch, Mapping):
        return inputs_of_mapping(batch)
    if not isinstance(batch, tuple | list):
        return batch
    if not 1 <= len(batch) <= 3:
        raise ValueError(
            f"{name}: expected samples x, (x, y) or (x, y, weight), got {len(batch)} entries"
        )
    return batch[0]


def _arrays(inputs: Any, name: str) -> list[Tensor]:
    """Those among the inputs that are arrays."""
    if isinstance(inputs, Mapping):
        parts: list[Any] = list(inputs.values())
    else:
        parts = list(inputs) if isinstance(inputs, tuple | list) else [inputs]
    plain = bool | int | float | str | None
    return [as_data(part, name=name) for part in parts if not isinstance(part, plain)]


def _joined(batches: list[Any], name: str) -> Any:
    first = batches[0]
    if isinstance(first, Mapping):
        plain = bool | int | float | str | None
        return {
            key: value
            if isinstance(value, plain)
            else _joined([batch[key] for batch in batches], name)
            for key, value in first.items()
        }
    if isinstance(first, tuple | list):
        return tuple(_joined([batch[k] for batch in batches], name) for k in range(len(first)))
    parts = [as_data(batch, name=name) for batch in batches]
    if len({(part.shape[1:], part.dtype) for part in parts}) > 1:
        found = sorted({str(list(part.shape[1:])) for part in parts})
        raise ValueError(f"{name}: expected inputs of one shape, got {', '.join(found)}")
    return torch.cat(parts)
