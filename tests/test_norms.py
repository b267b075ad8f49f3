"""Upper bounds of norms: above NumPy's norms and near them, of numbers of every size."""

import math

import numpy as np
import pytest
import torch

from twophase_ext.linalg import norms
from twophase_ext.linalg.norms import frobenius_upper, norm_upper, norms_upper


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("rows", "columns", "scale"), [(1, 1, 1.0), (7, 30, 1e-200), (200, 40, 1e200), (64, 64, 1.0)]
)
def test_norms_lie_above_the_truth_and_near_it(rows, columns, scale):
    a = drawn(rows, columns) * scale
    truth = np.linalg.norm(a.numpy() / scale, 2) * scale
    assert truth <= norm_upper(a) <= 1.05 * truth
    size = np.linalg.norm(a.numpy() / scale) * scale
    assert size <= frobenius_upper(a) <= (1 + 1e-4) * size


@pytest.mark.parametrize("shape", [(9, 1, 9), (9, 7, 7), (9, 12, 5), (3, 0, 4)])
def test_norms_of_a_stack(shape):
    a = (
        drawn(*shape)
        * (10.0 ** torch.linspace(-300, 300, shape[0], dtype=torch.float64))[:, None, None]
    )
    a[1] = 0
    found = norms_upper(a)
    for matrix, bound in zip(a, found.tolist(), strict=True):
        size = float(matrix.abs().max()) if matrix.numel() else 0.0
        truth = np.linalg.norm(matrix.numpy() / size, 2) * size if size else 0.0
        assert truth <= bound <= 1.05 * truth
        assert bound == pytest.approx(norm_upper(matrix), rel=1e-12)


def test_norms_of_a_large_matrix(monkeypatch):
    a = drawn(40, 70)
    sharp = norm_upper(a)
    monkeypatch.setattr(norms, "LARGE", 39)
    assert np.linalg.norm(a.numpy(), 2) <= sharp < norm_upper(a) <= 1.3 * sharp


def test_norms_of_special_matrices():
    assert norm_upper(torch.zeros(3, 4, dtype=torch.float64)) == 0
    assert norm_upper(torch.zeros(0, 4, dtype=torch.float64)) == 0
    ones = torch.ones(50, 20, dtype=torch.float64)
    assert math.sqrt(1000) <= norm_upper(ones) <= math.sqrt(1000) * (1 + 1e-5)
    assert norm_upper(torch.full((3, 3), 1e-320, dtype=torch.float64)) >= 3e-320
    assert frobenius_upper(torch.full((3, 3), 1e-320, dtype=torch.float64)) >= 3e-320
    assert norm_upper(torch.full((3, 3), 1e308, dtype=torch.float64)) >= 1e308
    wild = torch.ones(4, 50, 20, dtype=torch.float64)
    wild[1, 3, 3], wild[2, 3, 3], wild[3] = float("nan"), -math.inf, 1e-320
    found = norms_upper(wild)
    assert found[1:3].tolist() == [math.inf] * 2
    assert math.sqrt(1000) <= found[0] <= math.sqrt(1000) * (1 + 1e-5)
    assert math.sqrt(1000) * 1e-320 <= found[3] <= 1e-300
    for matrix in wild[1:3]:
        assert not norm_upper(matrix) < math.inf
