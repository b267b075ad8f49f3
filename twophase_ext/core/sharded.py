"""DTensor, torch's tensor in shards on several processes, where a program has imported it."""

import sys
from typing import Any

from torch import Tensor

_MODULE = "torch.distributed.tensor"  # importing it takes longer than this package


def in_use() -> bool:
    """Whether there can be DTensors."""
    return _MODULE in sys.modules


def is_sharded(x: Any) -> bool:
    """Whether x is a DTensor."""
    return in_use() and isinstance(x, sys.modules[_MODULE].DTensor)


def local(x: Any) -> Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    shard: Tensor = x.to_local() if is_sharded(x) else x
    return shard


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """This process's shard of `whole`, the same everywhere, laid out as the DTensor `like`."""
    own: Any = like
    found = sys.modules[_MODULE].distribute_tensor(
        whole, own.device_mesh, own.placements, src_data_rank=None
    )
    return local(found)


def from_local(shard: Tensor, like: Tensor) -> Tensor:
    """The DTensor whose shard this is, laid out as the DTensor `like`."""
    own: Any = like
    return sys.modules[_MODULE].DTensor.from_local(
        shard,
        own.device_mesh,
        own.placements,
        run_check=False,
        shape=own.shape,
        stride=own.stride(),
    )
