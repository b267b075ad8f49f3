"""Assumption 1 from distinct features, in O(n d + n log n).

Theorem (a corollary of known results: Pinkus, Acta Numerica 8, 1999, Theorem 5.1; Zhang et al.
2017; Nguyen & Hein 2018). Let the last hidden layer be h = a(W z + b), a real analytic on R and no
polynomial, z_i its input and m_H >= n - 1. If all z_i are distinct at some backbone parameters,
then some weights of that layer give rank [h_X, 1_n] = n.
Proof. Let V be the span of the vectors (a(w . z_i + b))_i over all w and b. If V is not R^n, some
c != 0 has sum_i c_i a(w . z_i + b) = 0 for all w and b. Take u with distinct p_i = u . z_i and
w = t u: the k-th derivative by t at t = 0 is a^(k)(b) sum_i c_i p_i^k = 0. No a^(k) vanishes
identically (a is no polynomial), so some b leaves sum_i c_i p_i^k = 0, for each k = 0..n-1; the
Vandermonde matrix of distinct p_i is regular and c = 0. So V = R^n, and 1_n is extended to a basis
by n - 1 of its vectors: neurons. (Without the column 1_n, n of them.) QED
For softplus the neurons can be named: j = 1..n-1 with weight s u and bias -s (p_j + p_(j+1)) / 2, p
increasing; [1, h / s] tends, as s grows, to a lower triangular matrix with positive diagonal.

What is proved here: with computed z_i and bounds e_i of their errors, all exact z_i are distinct.
The exact v . z_i lies within r_i = |v| e_i + gamma_d |v| |z_i| of the computed one: disjoint
intervals separate, and after sorting one sweep finds those that overlap. Pairs that overlap on
every one of a few lines v are compared in R^d: |z_i - z_j| > e_i + e_j.
"""

import hashlib
import heapq
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from ..linalg.bounds import SLACK, exponents_of, gamma, power_of_two

LINES = 6
SUBSAMPLE = 2048  # rows that say where the features spread
MAX_OVERLAPS = 1 << 27  # on one line
MAX_PAIRS = 1 << 20  # compared in R^d; beyond either: undecided
BLOCK_NUMBERS = 1 << 22  # of differences at a time
SHOWN = 10

Pair = tuple[int, int, float, float]


@dataclass(frozen=True)
class Separation:
    """What `separate` found.

    proved: all exact features are pairwise distinct. margin: min of (distance - needed) / needed
    over the pairs compared in R^d, which are those that no line separates and the neighbours on one
    line; inf where nothing is needed, -1 for equal rows. closest: up to 10 of these pairs,
    (i, j, lower bound of the distance, what it has to exceed), i < j, smallest margin first.
    overlapping: pairs that no line separates; where that was too many to list (not proved), those
    that the best line does not separate. seconds: wall-clock time.
    """

    proved: bool
    margin: float
    closest: list[Pair]
    overlapping: int
    seconds: float


@torch.no_grad()
def separate(z: Tensor, error: Tensor, *, seed: int = 0) -> Separation:
    """Prove that all exact z_i are distinct: the premise of this page.

    z [n, d]: computed features, error [n] >= ||z_i - exact z_i||_2, both float64. seed: of the
    lines. Time O(n d + n log n) besides the pairs that come close on a line; past MAX_OVERLAPS or
    MAX_PAIRS of them the answer is "not proved". z may be a mapped file: it is read in blocks, and
    memory beside it is `working_bytes` (a copy
    of z more where an entry is beyond 2^500). Raises TypeError for other dtypes, ValueError for
    other shapes, n = 0, NaN, infinity or a negative error.
    """
    started = time.perf_counter()
    _check(z, error)
    z, error = z.cpu(), error.cpu()
    twins = _equal_rows(z)
    if twins:
        shown = [(i, j, 0.0, float(error[i] + error[j])) for i, j in twins[:SHOWN]]
        return Separation(False, -1.0, shown, len(twins), time.perf_counter() - started)
    largest = max(float(rows.abs().max()) for rows in _blocks(z)) if z.numel() else 0.0
    scale = 2.0**-523 if largest > 2.0**500 else 1.0  # no overflow; entries that vanish are tiny
    if scale < 1:
        z, error = z * scale, error * scale + 2.0**-1000
    search = _Search(z, error)
    overlapping, complete = search.run(_intervals(z, error, seed))
    return Separation(
        complete and search.separated,
        search.margin,
        [(i, j, a / scale, b / scale) for i, j, a, b in search.closest()],
        overlapping,
        time.perf_counter() - started,
    )


def _check(z: Tensor, error: Tensor) -> None:
    for name, value in (("z", z), ("error", error)):
        if not isinstance(value, Tensor) or value.dtype != torch.float64:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a float64 tensor, got {got}")
    if z.dim() != 2 or len(z) == 0 or error.shape != z.shape[:1]:
        shapes = f"{tuple(z.shape)} and {tuple(error.shape)}"
        raise ValueError(f"z, error: expected shapes [n, d] and [n], n >= 1, got {shapes}")
    if not all(bool(rows.isfinite().all()) for rows in _blocks(z)):
        raise ValueError("z: expected finite numbers, got NaN or infinity")
    if not bool((error.isfinite() & (error >= 0)).all()):
        raise ValueError("error: expected finite bounds >= 0, got NaN, infinity or less than 0")


def working_bytes(n: int, d: int) -> int:
    """Memory that `separate` needs beside z [n, d], but for pairs that come close on a line.

    For each sample: on each line an interval, a place, an order and a count, and what sorting
    takes. Eight blocks of numbers: pairs of rows, their difference and its scaling. The subsample
    that says where the features spread, with its copies.
    """
    return 8 * (n * (5 * LINES + 10) + 8 * BLOCK_NUMBERS + 4 * SUBSAMPLE * d)


def _blocks(z: Tensor) -> Iterator[Tensor]:
    """Its rows, BLOCK_NUMBERS numbers at a time."""
    yield from z.split(max(1, BLOCK_NUMBERS // max(1, z.shape[1])))


def _equal_rows(z: Tensor) -> list[tuple[int, int]]:
    """(first, other) for every row that equals an earlier one, by hashing."""
    hashes = b"".join(
        hashlib.blake2b(row, digest_size=16).digest()
        for rows in _blocks(z)
        for row in (rows + 0.0).contiguous().numpy()  # -0 and 0 are equal
    )
    digests = np.frombuffer(hashes, np.int64).reshape(-1, 2)
    order = np.lexsort(digests.T)  # stable: equal ones in the order of the rows
    again = np.append(False, (digests[order[1:]] == digests[order[:-1]]).all(1))
    first = order[np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))]
    return sorted(zip(first[again].tolist(), order[again].tolist(), strict=True), key=itemgetter(1))


def _lines(z: Tensor, seed: int) -> Tensor:
    """Directions [d, k], random ones turned towards those in which the features spread."""
    generator = torch.Generator().manual_seed(seed)
    d = z.shape[1]
    lines = torch.randn(d, min(d, LINES), dtype=torch.float64, generator=generator, device="cpu")
    sample = z[torch.randperm(len(z), generator=generator, device="cpu")[:SUBSAMPLE]]
    sample = sample - sample.mean(0)
    largest = float(sample.abs().max())
    for _ in range(2 if largest > 0 else 0):
        lines = torch.linalg.qr((sample / largest).T @ ((sample / largest) @ lines)).Q
    return lines


def _intervals(z: Tensor, error: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(low, high), [n] each: for every line, intervals around the exact projections."""
    d = z.shape[1]
    if d == 0:
        return [(z.new_zeros(len(z)), z.new_zeros(len(z)))]
    lines = _lines(z, seed)
    places = z @ lines
    norms = torch.linalg.vector_norm(z, dim=1) * SLACK + math.sqrt(d) * 2.0**-510
    lengths = torch.linalg.vector_norm(lines, dim=0) * SLACK
    intervals = []
    for place, length in zip(places.T, lengths, strict=True):
        radius = length * (error + gamma(d + 2) * norms) * SLACK + d * 2.0**-1022
        low = torch.nextafter(place - radius, place.new_tensor(-math.inf))
        intervals.append((low, torch.nextafter(place + radius, place.new_tensor(math.inf))))
    return intervals


class _Search:
    """Compares pairs in R^d and remembers the worst."""

    def __init__(self, z: Tensor, error: Tensor) -> None:
        self.z, self.error = z, error
        self.separated, self.margin = True, math.inf
        self._worst: list[tuple[float, Pair]] = []  # a heap of (-margin, pair)

    def run(self, intervals: list[tuple[Tensor, Tensor]]) -> tuple[int, bool]:
        """Overlapping pairs, and whether all of them were compared."""
        sweeps = [_sweep(low, high) for low, high in intervals]
        totals = [int(ahead.sum()) for _, ahead in sweeps]
        best = totals.index(min(totals))
        order, ahead = sweeps[best]
        self._compare(order[:-1], order[1:])
        if totals[best] > MAX_OVERLAPS:
            return totals[best], False
        others = [interval for k, interval in enumerate(intervals) if k != best]
        compared = 0
        for i, j in _pairs(order, ahead):
            for low, high in others:
                close = (low[i] <= high[j]) & (low[j] <= high[i])
                i, j = i[close], j[close]
            compared += len(i)
            if compared > MAX_PAIRS:
                return totals[best], False
            self._compare(i, j)
        return compared, True

    def _compare(self, i: Tensor, j: Tensor) -> None:
        step = max(1, BLOCK_NUMBERS // max(1, self.z.shape[1]))
        for a, b in zip(i.split(step), j.split(step), strict=True):
            if len(a) == 0:
                continue
            distance = _distance(self.z[a], self.z[b])
            up = distance.new_tensor(math.inf)
            needed = torch.nextafter((self.error[a] + self.error[b]) * SLACK, up)
            needed = torch.where((self.error[a] == 0) & (self.error[b] == 0), 0.0, needed)
            self.separated &= bool((distance > needed).all())
            margin = torch.where(needed > 0, distance / needed - 1, math.inf)
            worst = margin.topk(min(SHOWN, len(margin)), largest=False).indices
            for k in worst.tolist():
                low, high = sorted((int(a[k]), int(b[k])))
                pair = low, high, float(distance[k]), float(needed[k])
                if all(pair[:2] != known[:2] for _, known in self._worst):
                    push = heapq.heappush if len(self._worst) < SHOWN else heapq.heappushpop
                    push(self._worst, (-float(margin[k]), pair))
            self.margin = min(self.margin, float(margin.min()))

    def closest(self) -> list[Pair]:
        """The worst pairs, the worst first."""
        return [pair for _, pair in sorted(self._worst, key=lambda item: -item[0])]


def _sweep(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(order by low, how many of the next ones in this order each interval overlaps)."""
    low, order = low.sort()
    ends = torch.searchsorted(low, high[order], right=True)
    return order, ends - torch.arange(1, len(low) + 1, device=ends.device)


def _pairs(order: Tensor, ahead: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The overlapping pairs, some at a time."""
    ends = ahead.cumsum(0)
    starts = torch.nonzero(ahead).flatten()
    while len(starts):
        done = int(ends[starts[0]] - ahead[starts[0]])
        count = max(1, int(torch.searchsorted(ends[starts], done + BLOCK_NUMBERS, right=True)))
        part, starts = starts[:count], starts[count:]
        repeats = ahead[part]
        left = part.repeat_interleave(repeats)
        offset = torch.arange(len(left), device=left.device) - (
            repeats.cumsum(0) - repeats
        ).repeat_interleave(repeats)
        yield order[left], order[left + 1 + offset]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Lower bounds of ||a_k - b_k||_2; each pair is scaled by a power of two: no underflow."""
    difference = a - b
    d = difference.shape[1]
    if d == 0:
        return difference.new_zeros(len(a))
    exponents = exponents_of(difference.abs().amax(1))
    scaled = difference * power_of_two(-exponents)[:, None]
    distance = torch.linalg.vector_norm(scaled, dim=1) * (1 - gamma(d + 8))
    distance = distance * power_of_two(exponents)
    return torch.nextafter(distance, distance.new_zeros(()))
