"""What a pass is compared by with passes over other samples."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Trace:
    """A digest of operators, plain arguments, geometry, and constants nobody saw being made."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self._digest = hashlib.sha256()

    def add(self, name: str, given: Iterable[Any], seen: Callable[[Tensor], bool]) -> None:
        """An operator and all that it was given.

        seen: whether a tensor's numbers are the model's own, or were made or noted in the pass.
        Nothing of it is kept: a pass that its trace held would live on until the garbage collector
        comes, with all of its numbers.
        """
        found = [name]
        for value in given:
            if not isinstance(value, Tensor):
                found.append(repr(value))
                continue
            found.append(f"{value.dtype} {list(value.shape)}")
            if value.numel() and not seen(value):
                found.append(self.numbers(value))
        self._digest.update("\0".join(found).encode())

    def pin(self, value: Any) -> None:
        """A result that every pass has to have."""
        text = self.numbers(value) if isinstance(value, Tensor) else repr(value)
        self._digest.update(text.encode())

    def result(self) -> str:
        """Equal for two passes that did the same with other samples."""
        return self._digest.hexdigest()

    @staticmethod
    def numbers(value: Tensor) -> str:
        """SHA-256 of a tensor's numbers."""
        with torch._C._DisableTorchDispatch():
            flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
