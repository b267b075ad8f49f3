"""Sizes of the columns of the inverse of a triangular matrix."""

import torch
from torch import Tensor


def triangular_inverse_squares(lower: Tensor) -> Tensor:
    """sum_i (L^-1)_ij^2 of every column j, [n], of a dense lower triangular L [n, n]."""
    eye = torch.eye(len(lower), dtype=lower.dtype)
    return torch.linalg.solve_triangular(lower, eye, upper=False).square().sum(0)
