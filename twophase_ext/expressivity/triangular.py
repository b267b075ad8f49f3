"""A lower bound of sigma_min from one triangular submatrix of [h, 1], in O(n^2 d).

Theorem. Let T be n columns of M = [h, 1_n] (n x p), rows and columns in some order, and L lower
triangular with positive diagonal and non-negative entries. With <L> the comparison matrix (the
diagonal of L, minus its other entries),

    sigma_min(M) >= sigma_min(T) >= 1 / ||<L>^-1||_2 - ||T - L||_F,
    log det(M M^T) >= log det(T T^T) >= 2 sum log l_ii - 2 sqrt(n) e / (1 - e),

where e = ||<L>^-1||_2 ||T - L||_F < 1.
Proof. M M^T - T T^T is a sum of squares of the other columns: both first inequalities (the second
by monotony of det). |L^-1| <= <L>^-1 entry by entry, as <L> is a triangular M-matrix; so
||L^-1||_2 <= ||<L>^-1||_2, and singular values are 1-Lipschitz. T = L (I + X), ||X||_F <= e, and
|log |det(I + X)|| <= sum |log(1 + lambda_k)| <= sum |lambda_k| / (1 - e) <= sqrt(n) e / (1 - e).

||<L>^-1||_2 needs no trust in a solver. For y > 0 and any x > 0 with <L> x >= a y, x >= a <L>^-1 y,
as <L>^-1 is non-negative; likewise z for <L>^T and x. So N y <= z / (a b) for the non-negative
N = <L>^-T <L>^-1, and ||<L>^-1||_2^2 = rho(N) <= max z_i / (a b y_i) (Collatz). x and z come from
any solver; a and b from one sparse product each, whose rounding is bounded.

Where T comes from: one softplus neuron for each sample that is off at every earlier sample of the
order and on at its own (witness.py). Neurons are on at few samples: L is sparse.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.bounds import SLACK, UNIT_ROUNDOFF, above, below, gamma, minus
from ..linalg.norms import frobenius_upper, norm_upper
from ..ops.softplus import softplus

BLOCK = 512  # neurons at a time
SHARPEST = 1e-18  # ||entries taken as zero||_F stays below it
ROUNDS = 8  # of the power iteration that chooses y
LARGEST_SHARE = 1 - 2.0**-10  # of sigma_min that an error may have for a bound of log det
MAX_ENTRIES = 1 << 27  # non-zeros of L: 2 GiB of indices and values

Say = Callable[[int], object]  # called with the number of neurons done


@dataclass(frozen=True)
class TriangularCertificate:
    """What `certify_triangular` proved; sigma_min_lower is 0 where it proved nothing.

    inverse_norm: upper bound of ||<L>^-1||_2. distance: upper bound of ||T - L||_F, the sum of
    preactivation (rounding and feature error), evaluation (of softplus) and rest (entries taken as
    zero). entries: non-zeros of L below its diagonal. logdet_lower: of log det(M M^T), -inf where
    there is none.
    offending: a pair (earlier sample, sample) whose neuron is on at the earlier one.
    """

    sigma_min_lower: float
    logdet_lower: float
    inverse_norm: float
    distance: float
    preactivation: float
    evaluation: float
    rest: float
    entries: int
    offending: tuple[int, int] | None
    reason: str
    seconds: float
    flops: int

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
    beta: float,
    *,
    advance: Say = lambda _: None,
    names: Tensor | None = None,
) -> TriangularCertificate:
    """The certificate of this page for h = softplus_beta(z weight^T + bias).

    z [n, d] float64: computed features, error [n]: bounds of ||z_i - exact z_i||_2 (float64).
    weight [n, d], bias [n]: float64, exact; neuron j belongs to sample order[j] (int64 [n]).
    names [n]: the samples' numbers in what is said of them, by default 0 to n - 1.
    Time 2 n^2 d operations, memory n * BLOCK numbers and L. Assumed: products of float64 matrices
    in any order of plain operations, rounding to nearest; softplus within 8u|h| + 8u/beta.
    """
    started = time.perf_counter()
    n, d = z.shape
    z, error = z.index_select(0, order), error.index_select(0, order)
    names = order if names is None else names[order.to(names.device)]
    # softplus(t) <= exp(beta t) / beta
    cut = math.log(SHARPEST * beta / n) / beta
    rest = n * math.exp(beta * cut) / beta * (1 + 1e-9)
    diagonal = z.new_empty(n)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    entries, offending = 0, None
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        a = torch.addmm(bias[start:end], z, weight[start:end].T)
        diagonal[start:end] = a[start:end].diagonal()
        # Row i, column j: j < i below the diagonal. A NaN fails `<= cut` and is found here.
        on = ~(a <= cut)
        rows, columns = on.nonzero(as_tuple=True)
        upper = rows < columns + start
        if bool(upper.any()):
            k = int(upper.nonzero()[0, 0])
            offending = (int(names[int(rows[k])]), int(names[int(columns[k]) + start]))
            break
        keep = rows > columns + start
        rows, columns = rows[keep], columns[keep]
        entries += len(rows)
        if entries > MAX_ENTRIES:
            break
        parts.append((rows, columns + start, a[rows, columns]))
        advance(end - start)

    def result(
        reason: str, sigma: float = 0.0, logdet: float = -math.inf, **more: float
    ) -> TriangularCertificate:
        numbers = {
            key: more.get(key, math.inf)
            for key in ("inverse_norm", "distance", "preactivation", "evaluation")
        }
        seconds = time.perf_counter() - started
        return TriangularCertificate(
            sigma_min_lower=sigma,
            logdet_lower=logdet,
            rest=rest,
            entries=entries,
            offending=offending,
            reason=reason,
            seconds=seconds,
            flops=2 * n * n * d,
            **numbers,
        )

    if offending is not None:
        earlier, own = offending
        return result(f"the neuron of sample {own} is on at sample {earlier}: not triangular")
    if entries > MAX_ENTRIES:
        return result(f"more than {MAX_ENTRIES} non-zeros below the diagonal")
    if not bool((diagonal > 0).all()):
        own = int(names[int((~(diagonal > 0)).nonzero()[0, 0])])
        return result(f"the neuron of sample {own} is off at its own sample")
    rows, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    diagonal, values = softplus(diagonal, beta), softplus(values, beta)
    inverse_norm = _inverse_norm(diagonal, rows, columns, values)
    if not math.isfinite(inverse_norm):
        return result("the inverse of the triangular part is too large to bound")
    preactivation = preactivation_error(z, error, weight, bias)
    squares = float(diagonal.square().sum() + values.square().sum())
    count = n + entries
    evaluation = 8 * UNIT_ROUNDOFF * (math.sqrt(squares) + math.sqrt(count) / beta) * SLACK
    distance = (preactivation + evaluation + rest) * SLACK
    e = inverse_norm * distance * SLACK
    bounds = {
        "inverse_norm": inverse_norm,
        "distance": distance,
        "preactivation": preactivation,
        "evaluation": evaluation,
    }
    if not e < 1:
        return result("the errors exceed the smallest singular value", **bounds)
    sigma = minus(below(1 / inverse_norm), distance)
    if not sigma > 0:
        return result("the errors exceed the smallest singular value", **bounds)
    logarithms = diagonal.log()
    # libm's log within 4 ulp, the sum in any order
    lost = gamma(n + 8) * float(logarithms.abs().sum()) * SLACK
    logdet = promoted_log_det(2 * minus(float(logarithms.sum()), lost), n, e)
    return result("", sigma, logdet, **bounds)


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


def _inverse_norm(diagonal: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> float:
    """Upper bound of ||<L>^-1||_2, infinity where none is found."""
    import numpy as np
    from scipy.sparse import csr_matrix, diags
    from scipy.sparse.linalg import spsolve_triangular

    n = len(diagonal)
    # scaled to a largest diagonal entry near 1: nothing below over- or underflows
    scale = 2.0 ** max(min(-math.frexp(float(diagonal.max()))[1], 1000), -1000)
    center = diagonal.cpu().numpy() * scale
    rest = csr_matrix(
        (values.cpu().numpy() * scale, (rows.cpu().numpy(), columns.cpu().numpy())), shape=(n, n)
    )
    comparison = (diags(center) - rest).tocsr()
    transposed = comparison.T.tocsr()

    def guaranteed(negated: csr_matrix, x: np.ndarray, y: np.ndarray) -> float:
        """The largest a that is proved to have <L> x >= a y; `negated` = minus the rest of <L>."""
        terms = np.diff(negated.indptr).max(initial=0) + 2
        own, others = center * x, negated @ x
        proved = own - others - gamma(int(terms) + 3) * SLACK * (own + others)
        proved -= terms * 2.0**-1000  # products that vanish
        return float((proved / y).min()) * (1 - 2.0**-40)

    with np.errstate(all="ignore"):
        y = np.ones(n)
        for _ in range(ROUNDS):
            x = spsolve_triangular(comparison, y, lower=True)
            z = spsolve_triangular(transposed, x, lower=False)
            if not (np.isfinite(z).all() and (z > 0).all()):
                return math.inf
            best = y
            y = z / z.max()
            y = np.maximum(y, 1e-6)  # keeps the quotients of Collatz's bound tame
        y = best
        x = spsolve_triangular(comparison, y, lower=True)
        z = spsolve_triangular(transposed, x, lower=False)
        if not (np.isfinite(z).all() and (x > 0).all() and (z > 0).all()):
            return math.inf
        a, b = guaranteed(rest, x, y), guaranteed(rest.T.tocsr(), z, x)
        if not (a > 0 and b > 0):
            return math.inf
        rho = float((z / y).max()) / (a * b) * (1 + 2.0**-40)
    norm = math.sqrt(rho) * (1 + 2.0**-40)
    # beyond, entries that vanished in the scaling might count
    return above(norm * scale) if norm < 2.0**500 else math.inf
