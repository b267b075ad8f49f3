"""Other weights for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def drawn(parameters: list[nn.Parameter], scale: float, *, keep: bool = False) -> Iterator[None]:
    """Within it the parameters hold random numbers, `scale` times as large as their own (1, where
    these are all zero), or with `keep` their own and these; then their own bits.

    Their version counters do not move: a graph that was made before can still be gone through.
    """
    own = [p.detach().clone() for p in parameters]
    generator = torch.Generator("cpu").manual_seed(1)
    for p, value in zip(parameters, own, strict=True):
        size = value.abs().mean() if bool(value.any()) else value.new_tensor(1.0)
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu")
        noise = drawn.to(p).mul_(scale * size)
        p.data.copy_(noise.add_(value) if keep else noise)
    try:
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.data.copy_(value)
