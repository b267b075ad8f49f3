"""Weights of the wide softplus layer that make [h_X, 1] provably regular.

Assumption 1 asks for some weights: choose them. The features z_i (inputs of the wide layer) are
centred and whitened, q = R (z - mu), by weights alone: w . q + c is affine in z.

Local kinks, one neuron for each sample. Order the samples by ||q_i||. For i before j,
q_i . q_j / ||q_j|| = (||q_i||^2 + ||q_j||^2 - ||q_i - q_j||^2) / (2 ||q_j||)
                   <= ||q_j|| - ||q_i - q_j||^2 / (2 ||q_j||),
so a neuron along q_j whose kink lies between is on at sample j and off at every earlier one: h is
triangular, and sparse as far as later samples do not lie behind many kinks. Distinct samples always
have such neurons; their distances, not the one-dimensional gaps of a projection, set the gap. This
is also a proof of Assumption 1 from distinct features alone. triangular.py turns it into numbers.

Spread kinks: random directions through the samples' centre, dense and for any m_H; the Gram
certificate's witness where the local one fails.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024  # samples at a time
KINK = 0.5  # the kink's place between the own sample (0) and the nearest earlier one (1)
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


@dataclass(frozen=True)
class LocalKinks:
    """Neuron j: row j of weight [n, d] and bias [n] (float64, exact in the dtype asked for).

    order [n]: neuron j belongs to sample order[j]. gaps [n]: distance, in whitened units, between
    sample order[j] and the nearest earlier sample along the neuron; nearest [n]: that sample.
    """

    weight: Tensor
    bias: Tensor
    order: Tensor
    gaps: Tensor
    nearest: Tensor


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


def local_kinks(
    z: Tensor,
    whitening: Whitening,
    dtype: torch.dtype,
    advance: Callable[[int], object] = lambda _: None,
) -> LocalKinks:
    """One neuron for each of the n samples z [n, d] (float64), rounded to `dtype`.

    Each neuron is 1 at its own sample before rounding. n^2 r operations. advance: called with the
    number of neurons done.
    """
    n = len(z)
    q = whitening(z)
    order = q.norm(dim=1).argsort()
    q = q.index_select(0, order)
    sizes = q.norm(dim=1)
    directions = q / sizes.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    gaps, nearest = q.new_empty(n), torch.empty(n, dtype=torch.int64, device=z.device)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        along = q[:end] @ directions[start:end].T  # sample, neuron
        along[start:end].masked_fill_(
            torch.ones(end - start, end - start, dtype=torch.bool, device=z.device).tril(),
            -torch.inf,
        )
        reach, nearest[start:end] = along.max(0)
        gaps[start:end] = sizes[start:end] - reach
        advance(end - start)
    # The first sample has no earlier one: half its size, as for a sample at the centre.
    on = torch.minimum(KINK * gaps, 0.5 * sizes)
    on = torch.where(on > 0, on, sizes.clamp(min=1.0))  # hopeless: two samples agree
    weight = ((directions / on[:, None]) @ whitening.map).to(dtype).double()
    # The kink through the exact weights: only the bias's own rounding moves it.
    centre = z.index_select(0, order)
    bias = (1 - (weight * centre).sum(1)).to(dtype).double()
    return LocalKinks(weight, bias, order, gaps, order[nearest])


def spread_kinks(
    whitening: Whitening, units: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(weight [units, d], bias [units]) float64: random directions, kinks at the samples' mean."""
    r = len(whitening.map)
    directions = torch.randn(units, r, dtype=torch.float64, generator=generator, device="cpu")
    directions /= directions.norm(dim=1, keepdim=True)
    weight = (directions.to(whitening.map.device) @ whitening.map).to(dtype).double()
    return weight, (-(weight @ whitening.mean)).to(dtype).double()
