"""Certified ranks by exact fractions, and the small functions."""

import hashlib
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

import twophase_ext as tp
from twophase_ext import ops

from . import harness
from .harness import Refused, again, attempt, close, same_bits
from .ops import usable, wide
from .values import FLOATS, STRANGE, numbers, relaid, wrong


def exact_rank(rows: list[list[Fraction]]) -> int:
    """By elimination over the rational numbers."""
    rank, columns = 0, len(rows[0]) if rows else 0
    for c in range(columns):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][c]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][c] / rows[rank][c]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


def rank_logdet(r: random.Random) -> None:
    """gram_logdet and rank_logdet: the rank never above the exact one."""
    dims = [r.randrange(5), r.randrange(6)]
    if r.random() < 0.3:
        dims = [r.randrange(3), *dims]
    x: Any = numbers(r, dims, r.choice(FLOATS), wild=0.5, scale=r.choice((1, 1, 1e-8, 1e12)))
    if r.random() < 0.4 and x.dim() > 1 and x.shape[-2] > 1:  # rows that depend on each other
        x[..., -1, :] = x[..., 0, :] * r.choice((1.0, 0.5, 1.0000001))
    x = relaid(r, x, True)
    ones: Any = r.random() < 0.5
    with_svd = r.random() < 0.4
    valid: bool | None = True
    odd = r.random()
    if odd < 0.15:
        x, valid = wrong(r, x), None
    elif odd < 0.2:
        ones, valid = r.choice(STRANGE), None
    extra: dict[str, Any] = {"method": r.choice(("auto", "gram", "svd"))} if with_svd else {}
    if with_svd and r.random() < 0.05:
        extra, valid = {"method": r.choice(STRANGE)}, None
    got = attempt(tp.rank_logdet if with_svd else tp.gram_logdet, x, append_ones=ones, **extra)
    if isinstance(got, Refused):
        assert not valid, f"refused: {got.error}"
        return
    x = torch.as_tensor(np.array(x)) if isinstance(x, np.ndarray | list) else x
    if not usable(x, *FLOATS) or x.dim() not in (2, 3):
        return
    rank, info = got[0], got.info if with_svd else got[2]
    logabsdet = got.logabsdet if with_svd else got[1]
    for k, matrix in enumerate(x if x.dim() == 3 else [x]):
        own = [t[k] if x.dim() == 3 else t for t in (rank, info, logabsdet)]
        _check_rank(matrix.resolve_neg(), bool(ones), int(own[0]), int(own[1]), float(own[2]))
    for _ in range(harness.REPEATS if valid else 0):
        found = again(tp.gram_logdet, relaid(r, x.clone()), ones)
        same_bits(found[2], info, "gram_logdet in another layout")
        if not with_svd:
            same_bits(found[1], logabsdet, "gram_logdet in another layout")


def _check_rank(matrix: Tensor, ones: bool, rank: int, info: int, logabsdet: float) -> None:
    if not bool(matrix.isfinite().all()):
        assert (rank, info) == (0, -1) and math.isnan(logabsdet)
        return
    one = [Fraction(1)] if ones else []
    rows = [[Fraction(v) for v in row] + one for row in matrix.double().tolist()]
    exact = exact_rank([list(row) for row in rows])
    n = len(rows)
    assert 0 <= rank <= exact, f"rank {rank} is claimed, {exact} is exact: {matrix.tolist()}"
    # A well-conditioned matrix must be recognised, with its log det.
    scaled = [[v / max(map(abs, row)) for v in row] for row in rows if any(row)]
    if n == 0 or len(scaled) < n or n > len(rows[0]):
        return
    if not all(2.0**-1000 <= float(max(map(abs, row))) <= 2.0**1000 for row in rows):
        return  # beyond them rows are not scaled to the same size
    sigma = np.linalg.svd(np.array([[float(v) for v in row] for row in scaled]), compute_uv=False)
    if sigma[-1] > 1e-4 * sigma[0]:
        assert rank == n and info == 0, f"rank {rank} of {n}, info {info}: {matrix.tolist()}"
        logs = sum(math.log(f.numerator) - math.log(f.denominator)
                   for f in (max(map(abs, row)) for row in rows))  # fmt: skip
        wanted = 2 * (float(np.log(sigma).sum()) + logs)
        assert abs(logabsdet - wanted) <= 1e-6 * (1 + abs(wanted)), (logabsdet, wanted)


# ---- small functions


def small(r: random.Random) -> None:
    """stream_seed, wide_units, logit_error_constant, build_info."""
    which = r.randrange(4)
    if which == 0:
        seed, name = r.choice((r.getrandbits(70), -r.getrandbits(9))), r.choice(("init", "é", ""))
        position = [r.getrandbits(8) for _ in range(r.randrange(3))]
        text = "/".join([str(seed), name, *map(str, position)])
        digest = hashlib.sha256(text.encode()).digest()
        got = attempt(tp.stream_seed, seed, name, *position)
        assert got == int.from_bytes(digest[:8], "little") // 2
    elif which == 1:
        n: Any = r.choice((r.randrange(1, 10**6), r.choice(STRANGE)))
        ratio: Any = r.choice((1.1, 1, r.randrange(1, 400) / 100, r.choice(STRANGE)))
        got = attempt(tp.nn.wide_units, n, ratio)
        if not isinstance(got, Refused):
            assert got == math.ceil(Fraction(repr(float(ratio))) * n)
        elif type(n) is int and type(ratio) in (int, float) and 0 < ratio < 1e9:
            assert Fraction(repr(float(ratio))) * n < 1
    elif which == 2:
        _logit_error(r)
    else:
        info = attempt(tp.build_info)
        assert info["isa"] in info["isa_variants"] and info["version"]


def _logit_error(r: random.Random) -> None:
    """One logit, seen in the gradient by the bias: 2 q where k = n = 1 and the target is 0."""
    dtype, m = r.choice(FLOATS), r.choice((0, 1, 3, 17, 64, 300))
    weight, h = numbers(r, (1, m), dtype, 0), numbers(r, (1, m), dtype, 0)
    bias = numbers(r, (1,), dtype, 0)
    c = attempt(ops.logit_error_constant, m, dtype)
    target = torch.zeros(1, 1, dtype=dtype)
    _, _, got = attempt(ops.last_layer_gradient, weight, bias, h, target, loss="squared_error")
    terms = wide(weight[0]) * wide(h[0])
    u = torch.finfo(dtype).eps / 2
    bound = 2 * c * u * (np.abs(terms).sum() + np.abs(wide(bias)))
    wanted = 2 * (terms.sum() + wide(bias))
    close(got, wanted, bound + 2 * u * np.abs(wanted), "logit_error_constant")


CASES: dict[str, tuple[Callable[[random.Random], None], float]] = {
    "rank_logdet": (rank_logdet, 10),
    "small": (small, 8),
}
