"""Samples of a map-style dataset as batches: fetched one by one, collated, told apart."""

from collections.abc import Callable, Mapping
from typing import Any

from .seeds import host_stream

TARGETS = ("y", "label", "labels", "target", "targets")  # names of y in samples that are dicts
WEIGHTS = ("weight", "weights", "sample_weight", "sample_weights")


class Collated:
    """What a DataLoader over the dataset makes of some samples, drawing from one seed.

    The same in whichever process. name: for errors.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], name: str) -> None:
        """Nothing is fetched yet."""
        self.dataset, self.collate, self.name = dataset, collate, name

    def __call__(self, indices: list[int], seed: int) -> Any:
        """The batch as the collate function returns it; what transforms draw comes from `seed`."""
        with host_stream(seed):
            if hasattr(self.dataset, "__getitems__"):  # as torch's DataLoader does
                items = self.dataset.__getitems__(indices)
            else:
                items = [self.dataset[i] for i in indices]
            try:
                return self.collate(items)
            except Exception as error:  # whatever the user's own function raises
                shown = ", ".join(map(str, indices[:3])) + (", ..." if len(indices) > 3 else "")
                raise ValueError(
                    f"{self.name}: the collate function fails on samples {shown}: "
                    f"{type(error).__name__}: {error}"
                ) from error


def told_apart(batch: Any, name: str) -> tuple[Any, Any, Any]:
    """x, y and weights (None without) of a collated batch; ValueError where they cannot be told."""
    if isinstance(batch, Mapping):
        targets = [key for key in batch if key in TARGETS]
        weights = [key for key in batch if key in WEIGHTS]
        inputs = inputs_of_mapping(batch)
        if len(targets) == 1 and len(weights) < 2 and len(batch) > 1 + len(weights):
            return inputs, batch[targets[0]], batch[weights[0]] if weights else None
        raise ValueError(
            f"{name}: expected samples (x, y), got a mapping with {list(batch)}; pass a DataLoader "
            "whose collate_fn returns (x, y)"
        )
    if not (isinstance(batch, tuple | list) and len(batch) in (2, 3)):
        raise ValueError(
            f"{name}: expected samples (x, y) or (x, y, weight), got {type(batch).__name__}"
        )
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


def inputs_of_mapping(batch: Mapping[Any, Any]) -> Any:
    """What is neither target nor weight: a dict, or the one entry itself."""
    inputs = {key: value for key, value in batch.items() if key not in TARGETS + WEIGHTS}
    return next(iter(inputs.values())) if len(inputs) == 1 else inputs
