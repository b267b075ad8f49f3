"""Named seed streams: each use of randomness has its own, so that one never shifts another."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch.utils.data import Sampler


def stream_seed(seed: int, name: str, *position: int) -> int:
    """A 63-bit seed for the stream `name` ("init", "shuffle", "augment", "noise", "model").

    The first 8 bytes of SHA-256 over the text "seed/name/position...", the top bit dropped. Streams
    of different names or positions are independent: changing noise_std does not change the
    shuffle, and the order of epoch e comes from (seed, e) alone.
    """
    text = "/".join([str(int(seed)), name, *(str(int(p)) for p in position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def epoch_order(seed: int, epoch: int, n: int) -> torch.Tensor:
    """The order in which epoch `epoch` visits the n samples: int64 [n], on the CPU."""
    generator = torch.Generator("cpu").manual_seed(stream_seed(seed, "shuffle", epoch))
    return torch.randperm(n, generator=generator, device="cpu")


class EpochSampler(Sampler[int]):
    """The Trainer's order of samples for a DataLoader: that of epoch e comes from (seed, e) alone.

    Call set_epoch(epoch) before each epoch, as for torch's DistributedSampler; Lightning and
    transformers do it themselves.
    """

    def __init__(self, n: int, *, seed: int = 1) -> None:
        """n: the number of samples."""
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order is asked for next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of samples."""
        return self.n

    def __iter__(self) -> Iterator[int]:
        """The indices of the epoch's samples."""
        return iter(epoch_order(self.seed, self.epoch, self.n).tolist())


@contextmanager
def host_stream(seed: int) -> Iterator[None]:
    """Within it Python's, NumPy's and torch's CPU generators start from `seed`; then as before.

    For random transforms, which draw from whichever of the three their author liked.
    """
    generator = torch.default_generator
    states = random.getstate(), numpy.random.get_state(), generator.get_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        generator.set_state(states[2])


def states(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators (CPU and `device`), as data."""
    drawn: Any = numpy.random.get_state()
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = [drawn[0], drawn[1].tolist(), *drawn[2:]]
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


@contextmanager
def global_stream(
    device: torch.device, seed: int, state: dict[str, Any] | None = None
) -> Iterator[None]:
    """Within it the global generators start from `seed`, or from `state`; then as before.

    Python's and NumPy's too: some optimizers draw from them.
    """
    devices = [device] if device.type == "cuda" else []
    with host_stream(seed), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        if state is not None and "python" in state:
            random.setstate(state["python"])
            numpy.random.set_state(tuple(state["numpy"]))
        if state is not None:
            torch.set_rng_state(state["cpu"])
            if devices:
                torch.cuda.set_rng_state(state["cuda"], device)
        yield
