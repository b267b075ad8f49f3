"""Sizes of the columns of the inverse of a sparse triangular matrix, which is not kept."""

import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase

_ops = torch.ops.twophase


@torch.no_grad()
def triangular_inverse_squares(starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """sum_i (L^-1)_ij^2 of every column j, [n] float64: n nnz / 2 multiply-adds at most.

    L [n, n] is lower triangular, in rows: starts [n + 1] and columns [nnz] int64, values [nnz]
    float64, on the CPU; columns of a row increase, and its diagonal entry is there, the last one.
    Each column comes from plain forward substitution, so that it is column j of the inverse of
    L + E_j with |E_j| <= gamma_k |L|, k the most entries of a row (Higham 2002, Theorem 8.5), but
    for underflow. Memory: 136 bytes n for each thread. Raises ValueError for anything else.
    """
    return _ops.triangular_inverse_squares(starts, columns, values)


@torch.library.register_fake("twophase::triangular_inverse_squares")
def _(starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    return values.new_empty(starts.shape[0] - 1)
