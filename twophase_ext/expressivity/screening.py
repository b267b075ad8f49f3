"""Where neurons are off: proved for most pairs from float32 products of whitened features.

Notation: u = 2^-53, v = 2^-24 the unit roundoff of the screening products, q_i = fl(R x_i) [r],
x_i = fl(z_i - mu) [d], neuron j: w_j, b_j, made as w_j ~ R^T n_j, n_j = fl(fl(q_j / |q_j|) / on_j)
and s_j = fl(1 / fl(|q_j| on_j)), so that |n_j - s_j q_j| <= 8 u s_j |q_j|.

Theorem. With e_j = w_j - R^T n_j and c_j = w_j . mu + b_j, the pre-activation in real arithmetic is
    w_j . z_i + b_j = c_j + n_j . R x_i + e_j . x_i + w_j . (z_i - mu - x_i),
so that for every number p with |p - q_i . q_j| <= E |q_i| |q_j|
    w_j . z_i + b_j <= c_j + s_j p + s_j (E + 8 u) |q_i| |q_j| + D_j |x_i|,
    D_j = gamma_d ||R||_F |n_j| + |e_j| + u |w_j|.
Proof. |z_i - mu - x_i| <= u |x_i|, |R x_i - q_i| <= gamma_d ||R||_F |x_i|, Cauchy-Schwarz. QED

p comes from q rounded to float32, scaled by a power of two to |q| <= 1: two conversions and a sum
of r products, so E = gamma_(r+2) with v in the place of u, whatever their order, fused or not, and
(4 r + 8) 2^-126 for numbers that vanish. Within a block p is fl(fl(q_i . fl(q_j / |q_j|)) |q_j|) in
float64, E = gamma_(r+4). For a neuron j and all samples of a block the theorem becomes one
threshold of p: what is not at most that is near; an earlier sample there is looked at in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linalg.bounds import SLACK, UNIT_ROUNDOFF, gamma
from ..linalg.norms import frobenius_upper
from ..ops.screen_products import PANEL, packed_columns, screen_products
from .witness import Whitening

MANY = 1 << 27  # near pairs: 2 GiB of them
EXTREME = 2.0**200  # a size beyond which nothing is screened
VANISHED = 2.0**-480  # more than all that underflows in norms and products of smaller sizes
NARROW = ("cpu",)  # devices on which products are screened in float32
CHUNK = 1 << 14  # samples at a time
BLOCK = 512  # neurons at a time, where all pairs are computed
NUMBERS = 1 << 24  # of a block of second looks

Pair = tuple[int, int]
_BY_NEURON = ("s", "c", "c_error", "per_length")  # what a screen knows of the neurons done


@dataclass(frozen=True)
class Near:
    """The pairs at which a neuron may be on, as places in the order; at all others it is off.

    Off: the pre-activation at the computed features is at most the cut (one_sided.py), in real
    arithmetic or as float64 computes it. rows [k], columns [k]: rows > columns, the neuron of place
    `column` at the sample of place `row`. offending: places (earlier sample, neuron) of a pair that
    is not off.
    """

    rows: Tensor
    columns: Tensor
    offending: Pair | None


def some_of(chosen: Tensor, width: int) -> tuple[Tensor, ...]:
    """Indices of the chosen neurons, few enough at a time for a block with `width` samples."""
    return chosen.nonzero()[:, 0].split(max(1, NUMBERS // width)) if width else ()


def lengths(rows: Tensor) -> Tensor:
    """Upper bounds of the rows' 2-norms; inf where squares overflow."""
    return torch.linalg.vector_norm(rows, dim=1) * SLACK + VANISHED


class Screen:
    """The products of a sweep: blocks of neurons, in order, each with all earlier samples.

    `nearest`, then `add`, block by block; blocks start at multiples of PANEL. z [n, d], q [n, r],
    sizes [n] = |q_i| increasing, float64. On the CPU products are in float32, elsewhere in float64.
    """

    def __init__(self, z: Tensor, q: Tensor, sizes: Tensor, whitening: Whitening, cut: float):
        """See the class."""
        n, r = q.shape
        self.z, self.q, self.sizes, self.whitening, self.cut = z, q, sizes, whitening, cut
        centred = torch.cat([lengths(x - whitening.mean) for x in z.split(CHUNK)])
        self.centred = centred.cummax(0).values
        self.map_size, self.mean_size = map(frobenius_upper, (whitening.map, whitening.mean))
        largest = self.map_size, self.mean_size, float(self.centred[-1]), float(sizes[-1])
        self.given_up = not all(size < EXTREME for size in largest)
        self.narrow = q.device.type in NARROW
        unit = 2.0**-24 if self.narrow else UNIT_ROUNDOFF
        self.error = (r + 2) * unit / (1 - (r + 2) * unit) * SLACK
        self.own_error = gamma(r + 4)  # of products within a block
        # of q, to sizes of at most 1
        self.scale = 2.0 ** -math.frexp(max(largest[-1], 1 / EXTREME))[1]
        self.tiny = (4 * r + 8) * 2.0**-126
        if self.narrow and not self.given_up:
            self.panels = q.new_zeros(-(-n // PANEL), r, PANEL, dtype=torch.float32)
        # s_j, c_j with a bound of its error, D_j
        self.s, self.c, self.c_error, self.per_length = (z.new_empty(n) for _ in range(4))
        self.largest = sizes[:0]
        self.pairs = [torch.empty(0, 2, dtype=torch.int64, device=z.device)]
        self.count = 0
        self.offending: Pair | None = None

    def state(self, done: int) -> dict[str, Any]:
        """What `resume` goes on from, the first `done` neurons being done."""
        parts = {name: getattr(self, name)[:done].clone() for name in _BY_NEURON}
        pairs = torch.cat(self.pairs)
        self.pairs = [pairs]
        return {**parts, "pairs": pairs, "offending": self.offending}

    def resume(self, done: int, state: dict[str, Any], block: int) -> None:
        """Go on after the first `done` neurons, in blocks of as many as before."""
        for name in _BY_NEURON:
            getattr(self, name)[:done] = state[name]
        offending = state["offending"]
        self.offending = None if offending is None else tuple(offending)
        self._keep(state["pairs"])
        if self.narrow:
            for start in range(0, done, block):
                self._pack(start, (self.q[start : min(start + block, done)] * self.scale).float())

    def _pack(self, start: int, rows: Tensor) -> None:
        end = start + len(rows)
        self.panels[start // PANEL : -(-end // PANEL)] = packed_columns(rows)

    def nearest(self, start: int, end: int, directions: Tensor) -> tuple[Tensor, Tensor]:
        """(reach, uncertainty) [end - start]: how far earlier samples come along directions.

        directions [end - start, r]: q_j / |q_j| of the block. The largest q_i . direction is at
        most reach + uncertainty; -inf and inf where nothing is known.
        """
        nothing = directions.new_full((end - start,), math.inf)
        if self.given_up:
            return -nothing, nothing
        rows = self.q[start:end] * self.scale
        if self.narrow:
            rows = rows.float()
            self._pack(start, rows)
        if start == 0:
            self.largest = -nothing
            return -nothing, nothing
        threshold = self._narrowed(self._thresholds(slice(start), end, self.error))
        if self.narrow:
            most = MANY - self.count
            self.largest, where, pairs = screen_products(rows, self.panels, threshold, most)
        else:
            products = rows @ (self.q[:start] * self.scale).T
            self.largest, where = products.max(1)
            pairs = (~(products <= threshold)).nonzero()
        self._keep(pairs + pairs.new_tensor([start, 0]))
        own = self.sizes[start:end]
        uncertainty = self.error * self.sizes[end - 1] + self.tiny / self.scale**2 / own
        return (self.q[where] * directions).sum(1), 2 * SLACK * uncertainty

    def add(
        self,
        start: int,
        products: Tensor,
        made_of: tuple[Tensor, Tensor],
        s: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> None:
        """The block's neurons: (n_j [m, r], fl(R^T n_j)), s_j, w_j [m, d], b_j of the theorem.

        products [m, m]: p of the block's samples (rows) and neurons, from float64.
        """
        normals, unrounded = made_of
        (m, d), r, end = weight.shape, normals.shape[1], start + len(weight)
        own = slice(start, end)
        normal, size = lengths(normals), lengths(weight)
        change = lengths(weight - unrounded)
        change += gamma(r + 2) * (self.map_size * normal + size)
        self.s[own] = s
        self.c[own] = weight @ self.whitening.mean + bias
        self.c_error[own] = gamma(d + 2) * (size * self.mean_size + bias.abs())
        self.c_error[own] += VANISHED * (1 + normal)
        self.per_length[own] = gamma(d + 2) * self.map_size * normal + change + UNIT_ROUNDOFF * size
        if self.given_up:
            return
        near = ~(products * self.scale**2 <= self._thresholds(own, end, self.own_error))
        near.fill_diagonal_(False)
        open_ = near.triu().any(0)
        near[:, open_] = False
        self._keep(near.nonzero() + start)
        for some in some_of(open_, m):
            self._look(own, some + start, weight[some], bias[some])
        if start > 0:
            open_ = ~(self.largest <= self._narrowed(self._thresholds(own, end, self.error)))
            for some in some_of(open_, start):
                self._look(slice(0, start), some + start, weight[some], bias[some])

    def _look(self, samples: slice, neurons: Tensor, weight: Tensor, bias: Tensor) -> None:
        """What these neurons are at the samples, as float64 computes it."""
        a = torch.addmm(bias, self.z[samples], weight.T)
        pairs, offending = _on(a, samples.start, neurons, self.cut)
        self.offending = self.offending or offending
        self._keep(pairs)

    def _keep(self, pairs: Tensor) -> None:
        self.count += len(pairs)
        self.pairs.append(pairs)
        if self.count > MANY:
            self.given_up, self.pairs = True, []

    def _thresholds(self, neurons: slice, end: int, error: float) -> Tensor:
        """For each of the neurons the scaled product up to which it is off at samples before `end`.

        error: E of the products. NaN, which nothing is below, where all is extreme.
        """
        s, c, sizes = self.s[neurons], self.c[neurons], self.sizes[neurons]
        lost = s * (error + 8 * UNIT_ROUNDOFF) * self.sizes[end - 1] * sizes
        lost = lost + self.per_length[neurons] * self.centred[end - 1] + self.c_error[neurons]
        rounding = 8 * UNIT_ROUNDOFF * (abs(self.cut) + c.abs() + lost)
        room = self.cut - c - (lost * SLACK + rounding * SLACK)
        product = self.scale**2 / s * room
        return product - (16 * UNIT_ROUNDOFF * product.abs() + self.tiny) * SLACK

    def _narrowed(self, thresholds: Tensor) -> Tensor:
        """In the dtype of the products of blocks, rounded down."""
        thresholds = thresholds.float() if self.narrow else thresholds
        return torch.nextafter(thresholds, thresholds.new_tensor(-math.inf))

    def near(self) -> Near | None:
        """What was found; None where it was given up."""
        if self.given_up:
            return None
        rows, columns = torch.cat(self.pairs).unbind(1)
        return Near(rows, columns, self.offending)


def near_everywhere(
    z: Tensor, weight: Tensor, bias: Tensor, cut: float, advance: Callable[[int], object]
) -> Near | None:
    """`Near` of any neurons, z [n, d] in their order, from all pairs in float64; None: too many."""
    n = len(z)
    pairs, count = [torch.empty(0, 2, dtype=torch.int64, device=z.device)], 0
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        a = torch.addmm(bias[start:end], z, weight[start:end].T)
        found, offending = _on(a, 0, torch.arange(start, end, device=z.device), cut)
        if offending is not None:
            return Near(pairs[0][:, 0], pairs[0][:, 1], offending)
        pairs.append(found)
        count += len(found)
        if count > MANY:
            return None
        advance(end - start)
    rows, columns = torch.cat(pairs).unbind(1)
    return Near(rows, columns, None)


def _on(a: Tensor, first: int, neurons: Tensor, cut: float) -> tuple[Tensor, Pair | None]:
    """Pairs [k, 2] below the diagonal where a is not <= cut, and one above it, if there is one.

    a: pre-activations of the neurons in places `neurons` at samples first, first + 1, ...
    """
    rows, columns = (~(a <= cut)).nonzero(as_tuple=True)  # NaN is not off
    rows, columns = rows + first, neurons[columns]
    above, below = (rows < columns).nonzero()[:1, 0].tolist(), rows > columns
    offending = (int(rows[above[0]]), int(columns[above[0]])) if above else None
    return torch.stack([rows[below], columns[below]], 1), offending
