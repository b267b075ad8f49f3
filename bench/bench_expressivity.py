"""Certificates of the expressivity condition against what a user of PyTorch or NumPy would do.

Separation: against all pairwise distances, which bound no error. Certificates: against the rank by
numpy.linalg.matrix_rank, and against product and Cholesky in float64, neither of which proves
anything. The long measurements are bench/certificate_scale.py's.
"""

import math

import numpy as np
import pytest
import torch

from twophase_ext.expressivity.certify import WideSource
from twophase_ext.expressivity.kinks import local_kinks
from twophase_ext.expressivity.one_sided import exact_softplus
from twophase_ext.expressivity.separation import separate
from twophase_ext.expressivity.triangular import certify_triangular
from twophase_ext.expressivity.witness import spread_kinks, whiten
from twophase_ext.linalg.certificate import certify_gram

SOFTPLUS, ERROR = exact_softplus(100.0), 1e-11
SEPARATION, SEPARATION_SMALL = [(1_000, 512), (4_000, 512)], [(40, 6), (80, 6)]
WITNESS, WITNESS_SMALL = (1_000, 64), (48, 8)
GRAM, GRAM_SMALL = (2_000, 64), (48, 8)


def features(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(z [n, d], bounds of their errors [n])."""
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z, ERROR * z.norm(dim=1)


def wide_source(z: torch.Tensor, error: torch.Tensor) -> WideSource:
    m = math.ceil(1.1 * len(z))
    generator = torch.Generator().manual_seed(0)
    weight, bias = spread_kinks(whiten(z, error, torch.float32), m, torch.float32, generator)
    return WideSource(z, weight, bias, SOFTPLUS, True)


def whole(source: WideSource) -> torch.Tensor:
    return source.panel(0, source.columns)


@pytest.mark.parametrize("size", range(2))
@pytest.mark.parametrize("which", range(3), ids=["ours", "cdist", "copy"])
def test_separation(which, size, row, interleaved, small):
    n, d = (SEPARATION_SMALL if small else SEPARATION)[size]
    z, error = features(n, d)

    def by_torch():
        return torch.cdist(z, z).fill_diagonal_(math.inf).min()

    rows = [
        ("ours", "separate (proved)", lambda: separate(z, error)),
        ("baseline", "torch.cdist, least (not proved)", by_torch),
        ("limit", "copy of the features", z.clone),
    ]
    found = separate(z, error)
    assert found.proved and by_torch() > 0
    same = torch.cat([z, z[:1]])
    assert not separate(same, torch.cat([error, error[:1]])).proved
    role, name, target = rows[which]
    row(f"separation {n}x{d}", role, name, bytes=2 * z.numel() * 8)
    interleaved(target, [f for i, (_, _, f) in enumerate(rows) if i != which], rounds=5)


@pytest.mark.parametrize("which", range(3), ids=["ours", "numpy", "matmul"])
def test_triangular(which, row, interleaved, small):
    n, d = WITNESS_SMALL if small else WITNESS
    z, error = features(n, d)
    array = whole(wide_source(z, error)).numpy()  # numpy is given h

    def ours():
        kinks = local_kinks(z, whiten(z, error, torch.float32), torch.float32, SOFTPLUS)
        return certify_triangular(
            z, error, kinks.weight, kinks.bias, kinks.order, SOFTPLUS, near=kinks.near
        )

    rows = [
        ("ours", "witness and triangular certificate", ours),
        ("baseline", "numpy matrix_rank (not proved)", lambda: np.linalg.matrix_rank(array)),
        ("limit", "torch matmul, z by one neuron a sample", lambda: z @ z.T),
    ]
    assert ours().proved and rows[1][2]() == n
    role, name, target = rows[which]
    row(f"rank n exists {n}x{d}", role, name)
    interleaved(target, [f for i, (_, _, f) in enumerate(rows) if i != which], rounds=3)


@pytest.mark.parametrize("which", range(3), ids=["ours", "torch", "matmul"])
def test_gram(which, row, interleaved, small):
    n, d = GRAM_SMALL if small else GRAM
    source = wide_source(*features(n, d))
    matrix = whole(source)

    def by_torch():
        columns = whole(source)
        factor, info = torch.linalg.cholesky_ex(columns @ columns.T)
        return int(info), 2 * float(factor.diagonal().log().sum())

    rows = [
        ("ours", "certify_gram", lambda: certify_gram(source, scale_rows=False)),
        ("baseline", "torch features, matmul, cholesky_ex (not proved)", by_torch),
        ("limit", "torch matmul of stored features", lambda: matrix @ matrix.T),
    ]
    proof, (info, logdet) = rows[0][2](), by_torch()
    assert proof.proved and info == 0
    smallest = float(torch.linalg.svdvals(matrix)[-1]) if small else math.inf
    assert 0 < proof.sigma_min_lower <= smallest and proof.logdet_lower <= logdet
    role, name, target = rows[which]
    row(f"certificate {n}x{source.columns}", role, name, flops=n * n * source.columns + n**3 // 3)
    interleaved(target, [f for i, (_, _, f) in enumerate(rows) if i != which], rounds=3)
