"""One neuron for each sample, on there and off at every earlier one: in one sweep.

Order the samples by ||q_i||, q whitened (witness.py). For i before j,
q_i . q_j / ||q_j|| = (||q_i||^2 + ||q_j||^2 - ||q_i - q_j||^2) / (2 ||q_j||)
                   <= ||q_j|| - ||q_i - q_j||^2 / (2 ||q_j||),
so a neuron along q_j whose kink lies between is on at sample j and off at every earlier one: h is
triangular, and sparse as far as later samples do not lie behind many kinks. Distinct samples always
have such neurons; their distances, not the one-dimensional gaps of a projection, set the gap. This
is also a proof of Assumption 1 from distinct features alone. triangular.py turns it into numbers.

q_i . q_j serves two neurons. A sweep over the pairs j < i, n^2 r operations, gives sample i the
nearest earlier one along q_i, hence the kink of its neuron, and tells at which later samples the
neuron of j is on, as its kink is known by then. screening.py does most of it in float32, and proves
what it leaves out.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..core.hashing import hash_tensors
from .kept import SweepFile
from .one_sided import OneSided
from .screening import Near, Screen, some_of
from .witness import Whitening

BLOCK, SMALL_BLOCK = 672, 224  # neurons at a time; multiples of 32
LARGE = 1 << 14  # samples from which on the larger block costs less
# The kink's place between the own sample (0) and the nearest earlier one (1). Half-way errors weigh
# least; nearer to the own sample fewer later ones lie behind: a third of the entries of L.
KINK = 0.35
OF_VERSION_1 = {"kink": 0.5, "height": 1.0}  # of the certificate file
AGAIN = 32  # neurons of a sweep that was kept, looked at again
CERTAIN = 64.0  # a gap of so many error bounds of a screened product needs no second look


@dataclass(frozen=True)
class LocalKinks:
    """Neuron j: row j of weight [n, d] and bias [n] (float64, exact in the dtype asked for).

    order [n]: neuron j belongs to sample order[j]. gaps [n]: distance, in whitened units, between
    sample order[j] and the nearest earlier sample along the neuron. near: where neurons may be on;
    None where that could not be told by screening.
    """

    weight: Tensor
    bias: Tensor
    order: Tensor
    gaps: Tensor
    near: Near | None


def local_kinks(
    z: Tensor,
    whitening: Whitening,
    dtype: torch.dtype,
    activation: OneSided,
    advance: Callable[[int], object] = lambda _: None,
    kink: float = KINK,
    height: float | None = None,
    folder: Path | None = None,
) -> LocalKinks:
    """One neuron for each of the n samples z [n, d] (float64), rounded to `dtype`.

    height: pre-activation of each neuron at its own sample before rounding, a power of two; by
    default the activation's, which also says how far off is off. kink: see KINK. n^2 r operations,
    memory n (3 d + 2 r) numbers. advance: called with the number of neurons done. folder: keeps
    the sweep, minute by minute, for a run that is killed.
    """
    n, d = z.shape
    q = whitening(z)
    sizes = q.norm(dim=1)
    order = sizes.argsort()
    z, q, sizes = (part.index_select(0, order) for part in (z, q, sizes))
    screen = Screen(z, q, sizes, whitening, activation.cut(n))
    height = activation.height(n) if height is None else height
    weight, bias, gaps = z.new_empty(n, d), z.new_empty(n), z.new_empty(n)
    block = BLOCK if n >= LARGE else SMALL_BLOCK
    kept = None
    if folder is not None:
        follows = hash_tensors([z]), hash_tensors([whitening.map]), hash_tensors([whitening.mean])
        content = f"{follows} {dtype} {activation.name} {screen.cut} {height} {kink} {block}"
        arrays = {"weight": weight, "bias": bias[:, None], "gaps": gaps[:, None]}
        kept = SweepFile(folder, content, arrays)
        if (state := kept.resume()) is not None:
            screen.resume(kept.done, state, block)
            _require_same(z, weight, bias, kept.done, screen)
            advance(kept.done)
    for start in range(0 if kept is None else kept.done, n, block):
        end = min(start + block, n)
        own, lengths = q[start:end], sizes[start:end]
        length = lengths.clamp(min=torch.finfo(torch.float64).tiny)
        directions = own / length[:, None]
        reach, uncertainty = screen.nearest(start, end, directions)
        for some in some_of(~(lengths - reach > CERTAIN * uncertainty), start):
            reach[some] = torch.maximum(reach[some], (q[:start] @ directions[some].T).amax(0))
        along = own @ directions.T  # sample, neuron
        products = along * length
        along.masked_fill_(torch.ones_like(along, dtype=torch.bool).tril(), -torch.inf)
        gaps[start:end] = lengths - torch.maximum(reach, along.amax(0))
        # The first sample has no earlier one: half its size, as for a sample at the centre.
        on = torch.minimum(kink * gaps[start:end], 0.5 * lengths)
        on = torch.where(on > 0, on, lengths.clamp(min=1.0))  # hopeless: two samples agree
        on = on / height
        normals = directions / on[:, None]
        unrounded = normals @ whitening.map
        w = unrounded.to(dtype).double()
        # The kink through the exact weights: only the bias's own rounding moves it.
        b = (height - (w * z[start:end]).sum(1)).to(dtype).double()
        weight[start:end], bias[start:end] = w, b
        screen.add(start, products, (normals, unrounded), 1 / (length * on), w, b)
        advance(end - start)
        if kept is not None and not screen.given_up:
            kept.save(end, partial(screen.state, end), last=end == n)
    return LocalKinks(weight, bias, order, gaps, screen.near())


def _require_same(z: Tensor, weight: Tensor, bias: Tensor, done: int, screen: Screen) -> None:
    """ValueError unless some of the neurons done, drawn at random, are near where was kept.

    A pre-activation within its rounding of the cut may be on either side.
    """
    draws = torch.Generator("cpu").manual_seed(secrets.randbits(63))  # not the caller's
    own = torch.randint(done, (AGAIN,), generator=draws, device="cpu").to(z.device)
    w, sizes = weight[own], z[:done].norm(dim=1, keepdim=True)
    rows, columns = torch.cat(screen.pairs).unbind(1)
    for neuron, a in zip(own.tolist(), torch.addmm(bias[own], z[:done], w.T).T, strict=True):
        slack = 2.0**-40 * (weight[neuron].norm() * sizes[:, 0] + bias[neuron].abs())
        a[rows[columns == neuron]] = -torch.inf  # found there
        on = a > screen.cut + slack
        if bool(on[neuron + 1 :].any()) or (screen.offending is None and bool(on[:neuron].any())):
            raise ValueError("folder: the sweep kept there is another one; use another folder")
