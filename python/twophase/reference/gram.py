"""rank [h, 1] and log det [h, 1][h, 1]^T (Assumption 1) from the singular values."""

import torch
from torch import Tensor


def gram_logdet(features: Tensor, append_ones: bool = True) -> tuple[Tensor, Tensor]:
    """(rank int64, logabsdet float64) of features [n, m] or [b, n, m], in float64.

    rank by numpy.linalg.matrix_rank's rule; logabsdet = 2 sum log sigma, -inf where n > columns.
    """
    matrix = features.double()
    if append_ones:
        matrix = torch.cat([matrix, matrix.new_ones(*matrix.shape[:-1], 1)], -1)
    n, columns = matrix.shape[-2:]
    sigma = torch.linalg.svdvals(matrix)
    largest = sigma[..., :1] if sigma.shape[-1] else sigma.new_zeros(*sigma.shape[:-1], 1)
    tolerance = largest * max(n, columns) * torch.finfo(torch.float64).eps
    rank = (sigma > tolerance).sum(-1)
    logabsdet = 2 * sigma.log().sum(-1)
    return rank, logabsdet if n <= columns else torch.full_like(logabsdet, -torch.inf)
