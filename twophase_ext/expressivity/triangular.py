"""A lower bound of sigma_min from one triangular submatrix of [h, 1], in O(n^2 d).

Theorem. Let T be n columns of M = [h, 1_n] (n x p), rows and columns in some order, and L lower
triangular with positive diagonal. Then

    sigma_min(M) >= sigma_min(T) >= 1 / ||L^-1||_2 - ||T - L||_2,
    log det(M M^T) >= log det(T T^T) >= 2 sum log l_ii - 2 sqrt(n) e / (1 - e),

where e = ||L^-1||_2 ||T - L||_F < 1.
Proof. M M^T - T T^T is a sum of squares of the other columns: both first inequalities (the second
by monotony of det). Singular values are 1-Lipschitz. T = L (I + X), ||X||_F <= e, and
|log |det(I + X)|| <= sum |log(1 + lambda_k)| <= sum |lambda_k| / (1 - e) <= sqrt(n) e / (1 - e).
||L^-1||_2 is bounded in linalg/sparse_triangular.py, by a comparison matrix and by a factorization,
and where that fills up by all columns of L^-1 (inverse_columns.py).

T - L. Let a_ij = w_j . z_i + b_j as computed, a'_ij that of the exact features in real
arithmetic, and t_ij = gamma_(d+2) (|w_j| |z_i| + |b_j|) + |w_j| error_i >= |a_ij - a'_ij|.
Where L has an entry, it is off by slope t_ij besides the evaluation of the activation, slope its
Lipschitz constant. Where L has none, a_ij <= cut (computed, or in real arithmetic), and |T_ij| <=
exp(rate t_ij) SHARPEST / n (one_sided.py): next to nothing, unless rate t_ij is large. Then the
norm over all entries (`preactivation_error`) may be the better bound: the smaller sum counts. The
2-norm is bounded by that of a sparse matrix of the t_ij, a fraction of their Frobenius norm.

Where T comes from: one neuron for each sample that is off at every earlier sample of the order and
on at its own (kinks.py), behind an activation that vanishes on one side: softplus, GELU, SiLU,
Mish. Neurons are on at few samples: L is sparse.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..linalg.bounds import SLACK, below, gamma, minus
from ..linalg.norms import frobenius_upper, norm_upper
from ..linalg.sparse_triangular import inverse_norm_upper, norm_upper_of_magnitudes
from .inverse_columns import inverse_frobenius_upper
from .one_sided import SHARPEST, OneSided
from .screening import MANY, NUMBERS, Near, lengths, near_everywhere

LARGEST_SHARE = 1 - 2.0**-10  # of sigma_min that an error may have for a bound of log det

Say = Callable[[int], object]  # called with the number of neurons done


@dataclass(frozen=True)
class TriangularCertificate:
    """What `certify_triangular` proved; sigma_min_lower is 0 where it proved nothing.

    comparison_norm: upper bound of ||<L>^-1||_2, inverse_norm: of ||L^-1||_2, the best one known.
    distance: upper bound of ||T - L||_2, the sum of preactivation (rounding and feature error),
    evaluation (of the activation) and rest (entries taken as zero). entries: non-zeros of L below
    its diagonal. logdet_lower: of log det(M M^T), -inf where there is none.
    offending: a pair (earlier sample, sample) whose neuron is on at the earlier one. lower: L as
    computed, SciPy's csr matrix; row and column k belong to sample order[k].
    """

    entries: int
    offending: tuple[int, int] | None
    reason: str
    seconds: float
    flops: int
    sigma_min_lower: float = 0.0
    logdet_lower: float = -math.inf
    inverse_norm: float = math.inf
    comparison_norm: float = math.inf
    distance: float = math.inf
    preactivation: float = math.inf
    evaluation: float = math.inf
    rest: float = math.inf
    lower: Any = field(default=None, repr=False, compare=False)

    @property
    def proved(self) -> bool:
        """Whether rank n is proved."""
        return self.sigma_min_lower > 0


def certify_triangular(
    z: Tensor,
    error: Tensor,
    weight: Tensor,
    bias: Tensor,
    order: Tensor,
    activation: OneSided,
    *,
    near: Near | None = None,
    advance: Say = lambda _: None,
    names: Tensor | None = None,
) -> TriangularCertificate:
    """The certificate of this page for h = activation(z weight^T + bias).

    z [n, d] float64: computed features, error [n]: bounds of ||z_i - exact z_i||_2 (float64).
    weight [n, d], bias [n]: float64, exact; neuron j belongs to sample order[j] (int64 [n]).
    near: where these neurons may be on (`local_kinks`); without it all n^2 pairs are computed, in
    2 n^2 d operations. names [n]: the samples' numbers in what is said of them, by default 0 to
    n - 1. Memory n * BLOCK numbers (screening.py) and L. Assumed: products of float64 matrices
    in any order of plain operations, rounding to nearest; `activation.assumed`.
    """
    started = time.perf_counter()
    n, d = z.shape
    names = order if names is None else names[order.to(names.device)]
    cut = activation.cut(n)
    if near is None:
        near = near_everywhere(z.index_select(0, order), weight, bias, cut, advance)
    found: dict[str, Any] = {"entries": 0, "offending": None}

    def result(reason: str) -> TriangularCertificate:
        seconds = time.perf_counter() - started
        return TriangularCertificate(**found, reason=reason, seconds=seconds, flops=2 * n * n * d)

    if near is None:
        return result(f"more than {MANY} non-zeros below the diagonal")
    if near.offending is not None:
        earlier, own = (int(names[place]) for place in near.offending)
        found["offending"] = earlier, own
        return result(f"the neuron of sample {own} is on at sample {earlier}: not triangular")
    places = torch.arange(n, device=z.device)
    diagonal = _preactivations(z, weight, bias, order, places, places)
    if not bool((diagonal > 0).all()):
        own = int(names[int((~(diagonal > 0)).nonzero()[0, 0])])
        return result(f"the neuron of sample {own} is off at its own sample")
    values = _preactivations(z, weight, bias, order, near.rows, near.columns)
    on = ~(values <= cut)
    rows, columns = torch.cat([near.rows[on], places]), torch.cat([near.columns[on], places])
    at = torch.cat([values[on], diagonal])
    values = activation.function(at.clone())
    found["entries"] = len(values) - n
    lower = _sparse(rows, columns, values, n)
    found["comparison_norm"], inverse_norm = inverse_norm_upper(lower)
    if inverse_norm == found["comparison_norm"]:  # its factorization fills up
        inverse_norm = min(inverse_norm, inverse_frobenius_upper(lower))
    if not math.isfinite(inverse_norm):
        return result("the inverse of the triangular part is too large to bound")
    preactivation, frobenius, rest = _errors(
        z, error[order], weight, bias, order, rows, columns, activation
    )
    evaluation = activation.evaluation_error(
        frobenius_upper(values), frobenius_upper(at), len(values)
    )
    distance = (preactivation + evaluation + rest) * SLACK
    found |= {"inverse_norm": inverse_norm, "distance": distance}
    found |= {"preactivation": preactivation, "evaluation": evaluation, "rest": rest}
    e = inverse_norm * (frobenius + evaluation + rest) * SLACK
    sigma = minus(below(1 / inverse_norm), distance)
    if not sigma > 0:
        return result("the errors exceed the smallest singular value")
    logarithms = values[-n:].log()
    # libm's log within 4 ulp, the sum in any order
    lost = gamma(n + 8) * float(logarithms.abs().sum()) * SLACK
    found["logdet_lower"] = promoted_log_det(2 * minus(float(logarithms.sum()), lost), n, e)
    found["sigma_min_lower"], found["lower"] = sigma, lower
    return result("")


def _preactivations(
    z: Tensor, weight: Tensor, bias: Tensor, order: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """a [k] of the neurons of places `columns` at the samples of places `rows`."""
    step = max(1, NUMBERS // max(1, z.shape[1]))
    parts = [
        (z[order[i]] * weight[j]).sum(1) + bias[j]
        for i, j in zip(rows.split(step), columns.split(step), strict=True)
    ]
    return torch.cat(parts)


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, n: int) -> Any:
    from scipy.sparse import csr_matrix

    numbers, i, j = (x.cpu().numpy() for x in (values, rows, columns))
    lower = csr_matrix((numbers, (i, j)), shape=(n, n))
    lower.sum_duplicates()
    return lower


def _errors(
    z: Tensor,
    error: Tensor,
    weight: Tensor,
    bias: Tensor,
    order: Tensor,
    rows: Tensor,
    columns: Tensor,
    activation: OneSided,
) -> tuple[float, float, float]:
    """(preactivation in the 2-norm, in the Frobenius norm, rest), by the bounds that are smaller.

    rows, columns: places of L's entries; error [n] in the order of places, z in that of samples.
    """
    n, d = z.shape
    zero, rate, slope = SHARPEST / n * (1 + 1e-9), activation.rate(n), activation.slope * SLACK
    whole = slope * preactivation_error(z, error, weight, bias)
    sizes, widths, biases = lengths(z)[order], lengths(weight), bias.abs()
    reach, vanished = gamma(d + 2) * sizes + error, (d + 1) * 2.0**-1073
    at_entries = widths[columns] * reach[rows] + gamma(d + 2) * biases[columns] + vanished
    of_rows = (widths.max() * reach + gamma(d + 2) * biases.max() + vanished) * SLACK
    off = math.sqrt(n) * zero * frobenius_upper((rate * of_rows).exp()) * (1 + 1e-9)
    at_entries = at_entries * slope * SLACK
    spread = norm_upper_of_magnitudes(_sparse(rows, columns, at_entries, n))
    frobenius = frobenius_upper(at_entries)
    sparse = min(spread, frobenius), frobenius, off
    return min((whole, whole, n * zero), sparse, key=lambda bounds: bounds[0] + bounds[2])


def promoted_log_det(lower: float, n: int, e: float) -> float:
    """A lower bound of log det(M' M'^T) from one of log det(M M^T); -inf where there is none.

    e >= ||M' - M||_F / sigma_min(M), n rows: the theorem's 2 sqrt(n) e / (1 - e) is taken away.
    As e comes near 1 that grows without bound, and nothing is left.
    """
    if not e <= LARGEST_SHARE:
        return -math.inf
    return minus(lower, 2 * math.sqrt(n) * e / (1 - e) * SLACK)


def preactivation_error(z: Tensor, error: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Upper bound of ||fl(z weight^T + bias) - exact||_F, exact at the exact features.

    Rounding: gamma_(d+1) (sum_k |w_jk| |z_ik| + |b_j|) entry by entry, hence at most
    gamma_(d+1) (||W||_F ||Z||_F + sqrt(n) ||b||) in norm. Features: ||dZ W^T||_F <= ||W||_2
    ||error||. z [n, d], error [n], weight [m, d], bias [m], all float64.
    """
    n, d = z.shape
    sizes = frobenius_upper(weight) * frobenius_upper(z) + math.sqrt(n) * frobenius_upper(bias)
    underflow = math.sqrt(n * len(weight)) * (d + 1) * 2.0**-1073
    rounding = gamma(d + 2) * sizes
    return (rounding + underflow + norm_upper(weight) * frobenius_upper(error)) * SLACK
