"""What a DataLoader, of whatever library, says about the training data."""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from .arrays import sample_weights
from .seeds import host_stream


def is_loader(source: Any) -> bool:
    """Whether it is a DataLoader, or wraps one as Lightning Fabric does."""
    parts = ("dataset", "sampler", "collate_fn", "batch_size")
    return isinstance(source, DataLoader) or all(hasattr(source, part) for part in parts)


def is_dataset(source: Any) -> bool:
    """Whether it is a Dataset of torch's or of Hugging Face's: no array, no list of samples."""
    return isinstance(source, Dataset) or hasattr(source, "__getitems__")


def is_map_style(dataset: Any) -> bool:
    """Whether samples come by their number, 0 to len - 1."""
    if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")):
        return False
    try:
        return len(dataset) >= 0
    except (TypeError, NotImplementedError):
        return False


def batching(loader: Any) -> tuple[Any, int | None]:
    """The sampler and the batch size, which accelerate hands over as a BatchSampler."""
    batches = getattr(loader, "batch_sampler", None)
    if loader.batch_size is None and type(batches) is BatchSampler:
        return batches.sampler, batches.batch_size
    return loader.sampler, loader.batch_size


def chosen(loader: Any, name: str) -> list[int] | None:
    """The samples that the loader's sampler visits once an epoch, ascending; None where all.

    Their order stays the Trainer's. All for a WeightedRandomSampler with replacement, whose weights
    `drawn_with` gives. Raises ValueError, which names the argument `name`, for another sampler that
    repeats samples or whose epochs are not of the same ones, for a batch_sampler and for a loader
    without batches.
    """
    (sampler, size), n, refused = batching(loader), len(loader.dataset), ""
    if size is None:
        refused = "a batch_sampler or without batches"
    elif isinstance(sampler, RandomSampler):
        if sampler.replacement or sampler.num_samples != n:
            refused = "replacement or num_samples"
        found = set(range(n))
    elif isinstance(sampler, WeightedRandomSampler):
        if not sampler.replacement:  # what is drawn then is no expectation of independent samples
            refused = "a WeightedRandomSampler without replacement"
        found = set(range(max(n, len(sampler.weights))))
    elif isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        refused = "DistributedSampler"  # every process of a run takes its part by itself
    elif isinstance(sampler, SequentialSampler):
        found = set(range(len(sampler.data_source)))
    else:
        visits = _visits(sampler)
        found = set(visits[0])
        if any(len(set(visit)) < len(visit) or set(visit) != found for visit in visits):
            refused = f"{type(sampler).__name__}, which draws other samples in every epoch,"
        elif len(found) < n and hasattr(sampler, "set_epoch"):
            refused = f"{type(sampler).__name__}, whose samples may depend on the epoch,"
    if refused:
        raise ValueError(
            f"{name}: the order of samples comes from the Trainer's seed; a DataLoader with "
            f"{refused} cannot be honoured, pass its dataset"
        )
    if not found <= set(range(n)):
        raise ValueError(f"{name}: the sampler draws samples beyond the {n} of the dataset")
    if not found:
        raise ValueError(f"{name}: the sampler draws no sample")
    return None if len(found) == n else sorted(found)


def drawn_with(loader: Any, name: str, dtype: torch.dtype) -> Tensor | None:
    """The weights [n] of the loader's WeightedRandomSampler, None of another one.

    A mini-batch of it has the expected loss sum_i c_i l_i / sum_i c_i: c are weights of samples, of
    which each is then fetched once an epoch.
    """
    sampler = batching(loader)[0]
    if not isinstance(sampler, WeightedRandomSampler):
        return None
    given = torch.as_tensor(sampler.weights, dtype=torch.float64)
    c = torch.zeros(len(loader.dataset), dtype=torch.float64, device="cpu")
    c[: len(given)] = given  # the sampler never draws what it has no weight for
    return sample_weights(c, len(c), f"{name}: weights of the WeightedRandomSampler", dtype)


def _visits(sampler: Any) -> list[list[int]]:
    """Two epochs of a sampler; no generator is moved by it."""
    generator = getattr(sampler, "generator", None)
    own = generator if isinstance(generator, torch.Generator) else None
    state = None if own is None else own.get_state()
    visits = []
    for seed in (0, 1):
        with host_stream(seed):
            visits.append([int(i) for i in sampler])
    if own is not None and state is not None:
        own.set_state(state)
    return visits


def not_used(loader: Any, name: str, device: torch.device, *, arrays: bool) -> list[str]:
    """Arguments that the loader was given and that change nothing here, each with the reason.

    name: the Trainer's argument. arrays: its samples are tensors in memory, of which batches are
    taken at once.
    """
    sampler, _ = batching(loader)
    batches = getattr(loader, "batch_sampler", None)
    workers, found = getattr(loader, "num_workers", 0), []
    if isinstance(sampler, SequentialSampler) and name == "train":
        found.append("shuffle=False (training shuffles, by the Trainer's seed)")
    if getattr(loader, "generator", None) is not None:
        found.append("generator (the order comes from the Trainer's seed)")
    if getattr(loader, "drop_last", False) or getattr(batches, "drop_last", False):
        found.append("drop_last=True (no sample is dropped)")
    if workers and arrays:
        found.append(f"num_workers={workers} (its tensors are in memory already)")
    if getattr(loader, "pin_memory", False) and device.type == "cuda" and (arrays or not workers):
        found.append("pin_memory=True (without workers)")
    return found
