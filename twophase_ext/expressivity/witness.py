"""Weights of the wide softplus layer that make [h_X, 1] provably regular.

Assumption 1 asks for some weights: choose them. The features z_i (inputs of the wide layer) are
centred and whitened, q = R (z - mu), by weights alone: w . q + c is affine in z.

Local kinks, one neuron for each sample: kinks.py.

Spread kinks: random directions through the samples' centre, dense and for any m_H; the Gram
certificate's witness where the local one fails.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CONDITION = 1e9  # directions whose spread is smaller than the widest / CONDITION are dropped
ERROR_SHARE = 1e3  # so are those whose spread is not ERROR_SHARE times the features' error
FLOAT32_SHARE = 64.0  # nor that many roundings of float32 weights


@dataclass(frozen=True)
class Whitening:
    """q = (z - mean) map^T: map [r, d], mean [d], float64; spreads [r] before the division."""

    mean: Tensor
    map: Tensor
    spreads: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """q [n, r] of z [n, d]."""
        return (z - self.mean) @ self.map.T


def whiten(z: Tensor, error: Tensor, dtype: torch.dtype) -> Whitening:
    """Principal directions of z [n, d] with spread well above errors and roundings of `dtype`.

    error [n]: bounds of the features' errors. At least one direction is kept.
    """
    n = len(z)
    # by a power of two, so that no sum or square overflows
    scale = 2.0 ** min(max(-math.frexp(float(z.abs().max()))[1], -1000), 1000)
    scaled = z * scale
    mean = scaled.mean(0) / scale
    scaled = scaled - mean * scale
    if n < scaled.shape[1]:
        _, values, rows = torch.linalg.svd(scaled, full_matrices=False)
        spreads, vectors = values / math.sqrt(n) / scale, rows.T
    else:
        values, vectors = torch.linalg.eigh(scaled.T @ scaled / n)
        spreads = values.flip(0).clamp(min=0).sqrt() / scale
        vectors = vectors.flip(1)
    floor = max(
        float(spreads[0]) / CONDITION,
        ERROR_SHARE * float(error.max()),
        FLOAT32_SHARE * torch.finfo(dtype).eps * float(z.norm(dim=1).max()) if n else 0.0,
    )
    r = max(1, int((spreads > floor).sum()))
    kept = spreads[:r].clamp(min=torch.finfo(torch.float64).tiny)
    return Whitening(mean, vectors[:, :r].T / kept[:, None], spreads[:r])


def spread_kinks(
    whitening: Whitening, units: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(weight [units, d], bias [units]) float64: random directions, kinks at the samples' mean."""
    r = len(whitening.map)
    directions = torch.randn(units, r, dtype=torch.float64, generator=generator, device="cpu")
    directions /= directions.norm(dim=1, keepdim=True)
    weight = (directions.to(whitening.map.device) @ whitening.map).to(dtype).double()
    return weight, (-(weight @ whitening.mean)).to(dtype).double()
