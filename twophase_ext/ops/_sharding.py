"""How softplus acts on DTensors: on each shard by itself, whatever dimension is sharded."""

from functools import cache
from typing import Any

import torch

_ops = torch.ops.twophase
_TENSORS = {  # tensor arguments, results
    _ops.softplus.default: (1, 1),
    _ops.softplus_backward.default: (2, 1),
    _ops.softplus_double_backward.default: (3, 2),
}


@cache
def register() -> None:
    """Tell torch, once; called when the first DTensor comes, as the module of DTensors is large."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    for op, (taken, given) in _TENSORS.items():

        def strategies(x: Any, *_: Any, taken: int = taken, given: int = given) -> list[Any]:
            layouts = [Replicate(), *(Shard(k) for k in range(x.ndim))]
            return [([own] * given, [*[own] * taken, None]) for own in layouts]

        register_sharding(op)(strategies)
