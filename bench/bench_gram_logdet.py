"""gram_logdet against PyTorch and NumPy.

A batch of small matrices: one call against a batched product and Cholesky in float64, which give
log det but no rank. One larger matrix: against numpy.linalg.matrix_rank and slogdet. And
rank_logdet as it comes: against torch's numerical rank alone, or for larger matrices its product
and Cholesky.
"""

import numpy as np
import pytest
import torch

from twophase_ext import rank_logdet
from twophase_ext.ops import gram_logdet

BATCH, BATCH_SMALL = (64, 64, 72), (3, 8, 12)
LARGE, LARGE_SMALL = (1_000, 1_100), (260, 280)

# What torch is asked: its numerical rank of the float32 features, or log det as in test_batch.
RANKS = {"1000x16x32": "rank", "200x64x80": "rank", "32x256x300": "rank"}
RANKS |= {"4x1000x1100": "log det", "1x2000x2200": "log det"}


def with_ones(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features.double(), features.new_ones(*features.shape[:-1], 1).double()], -1)


def work(n: int, m: int) -> int:
    """Flops of a symmetric product and one Cholesky factorization."""
    return n * n * (m + 1) + n**3 // 3


def product_and_cholesky(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """info and log det of [h, 1][h, 1]^T."""
    matrix = with_ones(features)
    factor, info = torch.linalg.cholesky_ex(matrix @ matrix.mT)
    return info, 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@pytest.mark.parametrize("which", range(3), ids=["ours", "cholesky_ex", "matmul"])
def test_batch(which, row, interleaved, small):
    b, n, m = BATCH_SMALL if small else BATCH
    features = torch.randn(b, n, m, generator=torch.Generator().manual_seed(0))
    matrices = with_ones(features)

    def by_torch():
        return product_and_cholesky(features)

    rows = [
        (
            "ours",
            "twophase_ext.ops.gram_logdet (with certified rank)",
            lambda: gram_logdet(features),
        ),
        ("baseline", "torch matmul + cholesky_ex (no rank)", by_torch),
        ("limit", "torch matmul of the same matrices", lambda: matrices @ matrices.mT),
    ]
    rank, logabsdet, info = gram_logdet(features)
    assert rank.eq(n).all()
    assert torch.equal(info, by_torch()[0].long())
    torch.testing.assert_close(logabsdet, by_torch()[1])
    role, name, target = rows[which]
    row(f"gram_logdet {b}x{n}x{m}", role, name, flops=b * work(n, m))
    interleaved(target, [f for i, (_, _, f) in enumerate(rows) if i != which])


@pytest.mark.parametrize("which", range(3), ids=["ours", "numpy", "matmul"])
def test_large(which, row, interleaved, small):
    n, m = LARGE_SMALL if small else LARGE
    features = torch.randn(n, m, generator=torch.Generator().manual_seed(0))
    matrix = with_ones(features)

    def by_numpy():
        array = with_ones(features).numpy()
        return np.linalg.matrix_rank(array), np.linalg.slogdet(array @ array.T)[1]

    rows = [
        ("ours", "twophase_ext.ops.gram_logdet (certified)", lambda: gram_logdet(features)),
        ("baseline", "numpy matrix_rank + slogdet (not certified)", by_numpy),
        ("limit", "torch matmul", lambda: matrix @ matrix.T),
    ]
    rank, logabsdet, _ = gram_logdet(features)
    expected_rank, expected = by_numpy()
    assert rank == expected_rank == n
    assert float(logabsdet) == pytest.approx(expected, rel=1e-12)
    role, name, target = rows[which]
    row(f"gram_logdet {n}x{m}", role, name, flops=work(n, m))
    interleaved(target, [f for i, (_, _, f) in enumerate(rows) if i != which], rounds=5)


@pytest.mark.parametrize("which", range(3), ids=["ours", "torch", "matmul"])
@pytest.mark.parametrize("size", RANKS)
def test_rank(size, which, row, interleaved, small):
    """The limit is a product of as many flops: of the half Gram matrix and two factorizations."""
    b, n, m = (3, 8, 12) if small else map(int, size.split("x"))
    features = torch.randn(b, n, m, generator=torch.Generator().manual_seed(0))
    inner = max(1, (m + 1) // 2 + n // 3)
    left, right = (torch.randn(b, *shape).double() for shape in ((n, inner), (inner, n)))
    by_torch = {
        "rank": ("torch.linalg.matrix_rank", lambda: torch.linalg.matrix_rank(features)),
        "log det": (
            "torch cat, matmul and cholesky_ex in float64 (no rank)",
            lambda: product_and_cholesky(features),
        ),
    }[RANKS[size]]
    rows = [
        ("ours", "twophase_ext.rank_logdet (both ranks, log det)", lambda: rank_logdet(features)),
        ("baseline", *by_torch),
        ("limit", f"torch matmul, inner dimension {inner}", lambda: left @ right),
    ]
    found = rank_logdet(features)
    assert found.rank.eq(n).all() and found.numerical_rank.eq(n).all() and found.method == "gram"
    torch.testing.assert_close(
        found.logabsdet, product_and_cholesky(features)[1], rtol=1e-12, atol=0
    )
    role, name, target = rows[which]
    row(f"rank_logdet {b}x{n}x{m}", role, name, flops=2 * b * n * n * inner)
    interleaved(
        target, [f for i, (_, _, f) in enumerate(rows) if i != which], rounds=5 if n >= 1000 else 11
    )
