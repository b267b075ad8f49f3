"""A posteriori: what any factor proves, whoever computed it."""

import math

import torch

from .bounds import SLACK, gamma
from .gram_tiles import lower_product, new_tile
from .tiles import Tiles


def residual_bound(gram: Tiles, factor: Tiles, shift: float) -> float:
    """Bound of || L L^T - (G - shift I) ||_2 but for underflow, for any lower triangular L.

    With A = G - shift I, its diagonal rounded up by one u at most:
    || fl(L L^T) - A ||_F + gamma_(b+N) ||L||_F^2 + u (max g_ii + shift), b the tile's width, N tile
    columns, each product of tiles formed apart and then added. lambda_min(M M^T) >= shift - e_G
    less this. NaN or inf where L is not finite. n^3/3 operations.
    """
    grid = gram.grid
    buffer = new_tile((grid.tile**2,), gram.read(0, 0).device)
    squares, size, largest = 0.0, 0.0, 0.0
    for i in range(grid.count):
        for j in range(i + 1):
            wanted = gram.read(i, j).clone()
            if i == j:
                wanted.diagonal().sub_(shift)
                largest = max(largest, float(wanted.diagonal().abs().max()))
            total = torch.zeros_like(wanted)
            product = buffer[: wanted.numel()].view(wanted.shape)
            for k in range(j + 1):
                lower_product(factor.read(i, k), factor.read(j, k), i == j, product)
                total += product
            squares += 2 * float((total - wanted).square().sum())
            size += float(factor.read(i, j).square().sum())
    k = min(grid.tile, grid.n) + grid.count
    return (math.sqrt(squares) + gamma(k) * size + gamma(1) * largest) * SLACK
