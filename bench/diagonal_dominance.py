"""Whether a certificate of given weights could do with n^2 numbers: diagonal dominance of G.

    python bench/diagonal_dominance.py [n ...]

G = M M^T of MNIST's first n images (TWOPHASE_DATA names their folder) behind 1.1 n random softplus
units, less its k largest directions, which only makes it smaller: G >= R = G - sum s^2 u u^T. R is
diagonally dominant under some scaling exactly where the spectral radius of |R_ij| / sqrt(R_ii
R_jj), i != j, is below 1 (Perron-Frobenius). Prints that radius, the largest ratio without a
scaling, and the share of entries of M that vanish, of which a sparse factorization would live.
"""

import sys

import torch

import twophase_ext as tp
from twophase.data import as_float, load


def main() -> None:
    """See the module."""
    for n in map(int, sys.argv[1:] or ("500", "1000", "2000")):
        x = as_float(load("mnist", "train", download=False)[0][:n]).flatten(1).double()
        torch.manual_seed(0)
        layer = torch.nn.Linear(x.shape[1], int(1.1 * n)).double()
        h = tp.softplus(layer(x).detach(), 100.0)
        matrix = torch.cat([h, h.new_ones(n, 1)], 1)
        u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
        zeros = float((h < 1e-12).double().mean())
        print(f"n = {n:,}: sigma_min {float(s[-1]):.3g}, {zeros:.1%} of h below 1e-12")
        for k in (0, n // 10, n // 2, 9 * n // 10):
            rest = matrix @ matrix.T - (u[:, :k] * s[:k] ** 2) @ u[:, :k].T
            own = rest.diagonal()
            off = rest.abs().fill_diagonal_(0.0)
            ratio = float((off.sum(1) / own).max())
            radius = float(torch.linalg.eigvalsh(off / (own[:, None] * own).sqrt())[-1])
            print(f"  less {k:,} directions: radius {radius:.1f}, largest ratio {ratio:.1f}")


if __name__ == "__main__":
    main()
