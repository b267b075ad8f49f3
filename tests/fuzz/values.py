"""Random tensors of every kind, from a `random.Random`: hypothesis's own in tests, a seeded one in
`make fuzz`, so that a seed is all that a failure needs to come back."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)
ALL_FLOATS = (torch.float16, torch.bfloat16, *FLOATS)
NO_FLOATS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
# Things that are no tensor, no number, or neither.
STRANGE = (None, "a", b"a", object(), [], {}, (), 3, -1, 10**400, 1.5, float("nan"), True, len)


def specials(dtype: torch.dtype) -> tuple[float, ...]:
    """Values at the edges of a floating-point type."""
    info = torch.finfo(dtype)
    tiny = info.tiny
    return (
        *(0.0, -0.0, 1.0, tiny, -tiny, tiny * info.eps, -tiny / 2, 1 + info.eps),
        *(info.max, info.min, float("inf"), float("-inf"), float("nan")),
    )


def numbers(
    r: random.Random, shape: Sequence[int], dtype: torch.dtype, wild: float = 0.3, scale: float = 1
) -> Tensor:
    """Normal numbers; with probability `wild` some of them are `specials`."""
    generator = torch.Generator().manual_seed(r.getrandbits(32))
    out = torch.randn(tuple(shape), generator=generator).mul_(scale).to(dtype)
    if out.numel() and r.random() < wild:
        flat = out.view(-1)
        for _ in range(r.randrange(1, 4)):
            flat[r.randrange(out.numel())] = r.choice(specials(dtype))
    return out


def shape(r: random.Random, most: int = 3, longest: int = 5) -> tuple[int, ...]:
    """Up to `most` dimensions, some of them 0 or 1, now and then one that fills many vectors."""
    sizes = [r.randrange(longest + 1) for _ in range(r.randrange(most + 1))]
    if sizes and r.random() < 0.1:
        sizes[-1] = r.choice((16, 17, 63, 64, 65, 130))
    return tuple(sizes)


def relaid(r: random.Random, t: Tensor, expand: bool = False) -> Tensor:
    """The same numbers in other memory: permuted, with gaps, misaligned, with `expand` repeated."""
    kind = r.randrange(6 if expand else 5)
    if kind == 0 or not t.dim():
        return t
    if kind == 1:  # dimensions in another order
        order = list(range(t.dim()))
        r.shuffle(order)
        back = [order.index(d) for d in range(t.dim())]
        return t.permute(order).contiguous().permute(back)
    if kind == 2:  # gaps between elements, an offset
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)
        view = wide[..., 1::2]
        return view.copy_(t)
    if kind == 3:  # one element late: not aligned to a vector
        flat = t.new_zeros(t.numel() + 1)
        return flat[1:].view(t.shape).copy_(t)
    if kind == 4:  # gaps between rows
        wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + 3)
        return wide[..., : t.shape[-1]].copy_(t)
    dim = r.randrange(t.dim())
    return t.narrow(dim, 0, min(1, t.shape[dim])).expand(t.shape)


def overlapping(r: random.Random, t: Tensor) -> Tensor | None:
    """A view of t's shape whose elements share memory; None where the shape allows none."""
    if t.numel() < 2:
        return None
    wide = [d for d in range(t.dim()) if t.shape[d] > 1]
    strides = [0] * t.dim()
    if len(wide) > 1 and r.random() < 0.7:
        strides = [1 if d in wide else 0 for d in range(t.dim())]  # self-overlapping, no stride 0
    reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
    return torch.randn(reach).to(t.dtype).as_strided(t.shape, strides)


def wrong(r: random.Random, t: Tensor) -> Any:
    """Something in t's place that an operator must refuse or take correctly."""
    kind = r.randrange(10)
    if kind == 0:
        return r.choice(STRANGE)
    if kind == 1:
        return t.to(r.choice((*ALL_FLOATS, *NO_FLOATS)))
    if kind == 2:
        return t.to("meta")
    if kind == 3 and t.dim() and not t.is_complex():
        return t.to_sparse() if t.is_contiguous() else t.contiguous().to_sparse()
    if kind == 4:
        return torch._neg_view(t) if t.is_floating_point() else t
    if kind == 5:
        return t.unsqueeze(0)
    if kind == 6 and t.dim():
        return torch.cat([t, t[..., :1]], -1) if t.shape[-1] else t.new_zeros(*t.shape[:-1], 2)
    if kind == 7 and t.dim():
        return t[..., :-1]
    if kind == 8:
        array = t.numpy().copy() if t.dtype != torch.bfloat16 else np.zeros(3)
        array.flags.writeable = r.random() < 0.5
        return array
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def scalar(r: random.Random, low: float, high: float) -> float:
    """A number in the range, its ends now and then."""
    return r.choice((low, high, r.uniform(low, high), r.uniform(low, high)))
