"""Which samples make the rank of [h_X, 1] fall: a diagnosis in float64, no proof.

Three ways, most telling first. Identical features. Features closer than their error bounds:
no computation at this precision tells them apart. Rows of M that depend on others: a
Cholesky factorization of the Gram matrix with diagonal pivoting (of rows scaled to length 1) takes
the row farthest from the span of those taken before; the rows left over lie in that span.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..core.arrays import require_finite
from ..linalg.bounds import UNIT_ROUNDOFF
from ..model.groups import groups_of, repeated

LARGEST = 5000  # samples whose Gram matrix is formed
MAX_PAIRS = 1 << 20  # distances of near-duplicates computed
CHUNK = 1 << 22  # numbers at a time in those
PARTNERS = 4  # samples that a dependent one is explained by, at most
NEGLIGIBLE = 1e-3  # coefficients below this share of the largest are not named

SHOWN = 8  # samples of a group in a line of text


@dataclass(frozen=True)
class Culprit:
    """A group of samples that make the rank fall.

    kind: "identical" (all rows of z in `samples` are equal), "near-identical" (a chain of samples,
    each within the error bounds of the next) or "dependent" (samples[0], then those with the
    largest coefficients in the combination that gives its row of M). distance: 0; the smallest
    ||z_i - z_j||_2 of the group; the distance of the row of M, scaled to length 1, from the span.
    """

    kind: str
    samples: list[int]
    distance: float


def find_culprits(
    z: Tensor,
    error: Tensor | None = None,
    matrix: Tensor | Callable[[], Tensor] | None = None,
    *,
    tolerance: float | None = None,
    limit: int = 100,
    names: Tensor | None = None,
) -> list[Culprit]:
    """Identical, near-identical and dependent samples, in this order.

    z [n, ...]: the inputs of the wide layer, or of the model. error [n] float64: bounds of
    ||z_i - exact z_i||_2; pairs with ||z_i - z_j|| <= error_i + error_j count as near-identical, in
    O(n d + n log n) and MAX_PAIRS distances: past those, the list is not complete. An infinite
    bound tells nothing, and no such pair is named. matrix: M [n, p], of any floating-point dtype,
    or a function that makes it, called only if M is used: for at most LARGEST samples, one of each
    group found before. Its dependent rows are those within `tolerance` (at least, and by default,
    what rounding of the Gram matrix hides: 2 sqrt((n + p) u)) of the span of the others, all rows
    scaled to length 1. limit: groups of each kind returned. names [n]: the samples' numbers, by
    default 0 to n - 1.

    Raises ValueError where z or M hold NaN or infinity, or the lengths differ.
    """
    n = len(z)
    z = z.detach().flatten(1) if z.dim() > 1 else z.detach()[:, None]
    require_finite(z, "z", "input")
    groups = repeated(groups_of(z))
    found = [Culprit("identical", group, 0.0) for group in groups[:limit]]
    copies = {i for group in groups for i in group[1:]}
    if error is not None:
        _require_length(error, n, "error")
    if error is not None and bool(error.isfinite().all()):
        near = _near_identical(z, error, _others(copies, n, z.device))
        found += near[:limit]
        copies |= {i for group in near for i in group.samples[1:]}
    others = _others(copies, n, z.device)
    if matrix is not None and len(others) <= LARGEST:
        m = matrix if isinstance(matrix, Tensor) else matrix()
        _require_length(m, n, "matrix")
        require_finite(m, "matrix", "row")
        found += _dependent(m.detach(), others.to(m.device), tolerance, limit)
    if names is None:
        return found
    return [replace(c, samples=names[c.samples].tolist()) for c in found]


def describe(culprits: list[Culprit], limit: int = 5) -> list[str]:
    """One line of text for each of the first `limit` groups of each kind, and how many more."""
    lines = []
    for kind, plural in (
        ("identical", "groups of samples with identical features"),
        ("near-identical", "groups of samples that rounding cannot tell apart"),
        ("dependent", "samples that depend on others"),
    ):
        groups = [c for c in culprits if c.kind == kind]
        lines += [_line(c) for c in groups[:limit]]
        if len(groups) > limit:
            lines.append(f"... and {len(groups) - limit} more {plural}")
    return lines


def _line(c: Culprit) -> str:
    names = ", ".join(map(str, c.samples[:SHOWN]))
    if len(c.samples) > SHOWN:
        names += f" and {len(c.samples) - SHOWN} more"
    if c.kind == "identical":
        return f"samples {names} have identical features"
    if c.kind == "near-identical":
        return (
            f"samples {names} are closer than the error of their features allows to tell apart "
            f"(distance {c.distance:.1e})"
        )
    own, _, partners = names.partition(", ")
    if not partners:
        return f"sample {own} has a row of zeros"
    return (
        f"sample {own} depends on others, above all on {partners} "
        f"(relative distance {c.distance:.1e} from their span)"
    )


def _require_length(a: Tensor, n: int, name: str) -> None:
    if len(a) != n:
        raise ValueError(f"{name}: expected {n} rows, one for each of z, got {len(a)}")


def _others(copies: set[int], n: int, device: torch.device) -> Tensor:
    return torch.tensor([i for i in range(n) if i not in copies], dtype=torch.int64, device=device)


def _near_identical(z: Tensor, error: Tensor, samples: Tensor) -> list[Culprit]:
    """Chains of samples within their errors, closest first.

    |u.(z_i - z_j)| <= ||z_i - z_j|| for a unit vector u: along the sorted projections only
    neighbours no farther than their errors can be near.
    """
    z, error = z.index_select(0, samples), error.to(z.device).double().index_select(0, samples)
    if len(z) < 2:
        return []
    u = torch.randn(
        z.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    )
    u = (u / u.norm()).to(z.device)
    projected = torch.cat([part.double() @ u for part in z.split(max(CHUNK // z.shape[1], 1))])
    # The projections are off by (d + 1) u ||z_i||, and twice that is added: nothing gets lost.
    sizes = torch.cat([part.double().norm(dim=1) for part in z.split(max(CHUNK // z.shape[1], 1))])
    reach = error + 2 * (z.shape[1] + 2) * UNIT_ROUNDOFF * sizes
    order = projected.argsort()
    projected, farthest = projected[order], reach[order] + reach.max()
    active = torch.arange(len(z) - 1, device=z.device)
    pairs: list[tuple[float, int, int]] = []
    computed = 0
    for step in range(1, len(z)):
        active = active[active + step < len(z)]
        close = projected[active + step] - projected[active] <= farthest[active]
        active = active[close]  # gaps grow with the step: who is out stays out
        active = active[: MAX_PAIRS - computed]
        if len(active) == 0:
            break
        computed += len(active)
        for part in active.split(max(CHUNK // z.shape[1], 1)):
            i, j = order[part], order[part + step]
            distance = (z[i].double() - z[j].double()).norm(dim=1)
            near = distance <= error[i] + error[j]
            pairs += zip(
                distance[near].tolist(),
                samples[i[near]].tolist(),
                samples[j[near]].tolist(),
                strict=True,
            )
    return _chains(sorted(pairs))


def _chains(pairs: list[tuple[float, int, int]]) -> list[Culprit]:
    """Connected components of the pairs (distance, i, j), which are sorted."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not pairs:
        return []
    samples, ends = np.unique([pair[1:] for pair in pairs], return_inverse=True)
    i, j = ends.reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (i, j)), shape=(len(samples), len(samples)))
    labels = connected_components(graph, directed=False)[1]
    smallest: dict[int, float] = {}
    for label, (distance, _, _) in zip(labels[i].tolist(), pairs, strict=True):
        smallest.setdefault(label, distance)
    return [
        Culprit("near-identical", samples[labels == label].tolist(), distance)
        for label, distance in smallest.items()
    ]


def _dependent(m: Tensor, samples: Tensor, tolerance: float | None, limit: int) -> list[Culprit]:
    """Rows left over by the pivoted factorization, closest to the span of the others first."""
    from scipy.linalg import lapack, solve_triangular

    m = m.index_select(0, samples).double()
    if m.numel() == 0:
        return [Culprit("dependent", [int(i)], 0.0) for i in samples[:limit]]
    # in two steps, so that the squares of very large or small entries do no harm
    m = m / m.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    m /= m.norm(dim=1, keepdim=True).clamp(min=0.5)  # at least 1, or the row is zero
    hidden = 4 * sum(m.shape) * UNIT_ROUNDOFF
    allowed = hidden if tolerance is None else max(tolerance**2, hidden)
    factor, pivots, rank, _ = lapack.dpstrf((m @ m.T).cpu().numpy(), lower=1, tol=allowed)
    if rank == len(m):
        return []
    pivots = pivots - 1
    below = factor[rank:, :rank]
    residuals = m.square().sum(1).cpu().numpy()[pivots[rank:]] - (below**2).sum(1)
    names = samples.cpu().numpy()[pivots]
    # what rounding hides is as good as zero: in the order of the samples then
    chosen = np.lexsort((names[rank:], residuals.clip(min=hidden)))[:limit]
    coefficients = np.zeros((len(chosen), rank))
    if rank:
        triangle = factor[:rank, :rank]
        coefficients = solve_triangular(triangle, below[chosen].T, lower=True, trans=1).T
    found = []
    for k, row in zip(chosen, coefficients, strict=True):
        sizes = abs(row)
        partners = sizes.argsort(kind="stable")[::-1][:PARTNERS]
        partners = [i for i in partners if sizes[i] > NEGLIGIBLE * sizes.max(initial=0.0)]
        group = [int(names[rank + k]), *(int(names[i]) for i in partners)]
        found.append(Culprit("dependent", group, max(float(residuals[k]), 0.0) ** 0.5))
    return found
