"""A global minimum by construction: weights at which the training loss is within `gap` of L_floor.

Hidden weights made for the proof (expressivity/witness.py) give one neuron to each distinct input
that is off at every earlier one: those columns T of h are triangular and well conditioned. Target
outputs F, one row a group of equal inputs, are chosen near the infimum, and T C = F - 1 b is solved
by substitution; other columns of the last layer are 0. What is claimed is measured: the loss of the
user's own model, in its own dtype, over all samples.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.arrays import require_finite
from ..expressivity import Verdict, verify_network
from ..linalg.bounds import bound_text, plus
from ..model.calling import one_tensor
from ..model.groups import firsts, groups_of
from ..model.inputs import as_example, batches, checked_inputs, first_parameter
from ..model.labels import as_targets
from ..model.losses import (
    ConvexLoss,
    prepare_targets,
    resolve_loss,
    split,
    unweighted,
    weighted,
)
from ..model.network import Network
from ..model.probing import copy_model
from ..model.torch_losses import HuberLoss, LogisticLoss, SoftmaxLoss, SquaresLoss
from ..model.weighted import packed
from .floor import LossFloor, floor_of, sample_weights

OFF = 1e-12  # outputs of a neuron up to it count as 0; at its own sample it is about 1
BATCH = 256  # samples a forward pass
ROUNDING = 32  # eps of the dtype in a sum of a sample's loss

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class GlobalMinimum:
    """state: weights for `model.load_state_dict(found.state)`.

    loss: of the user's own model with them over all n samples, in evaluation mode and its dtype.
    floor: L_floor. gap >= loss - inf L over all weights of every network. asked: the gap asked for.
    verdict: the proof that the hidden weights give the N distinct inputs independent features.
    """

    state: dict[str, Tensor]
    loss: float
    floor: LossFloor
    gap: float
    asked: float
    verdict: Verdict

    @property
    def reached(self) -> bool:
        """Whether the gap asked for was reached."""
        return self.gap <= self.asked

    def __str__(self) -> str:
        """What was found, and what it is for."""
        short = "" if self.reached else f", more than the {self.asked:.3g} asked for"
        return (
            f"The training loss of these weights is {self.loss:.6g}; no weights of any network go "
            f"below {bound_text(self.floor.lower, 6)}, so they are at most "
            f"{bound_text(self.gap, 3, upper=True)} above the global minimum{short}.\n"
            "They show that the minimum is reached, and say nothing beyond the training data: one "
            "neuron answers for each sample, and such weights generalise badly. Train to predict."
        )


@torch.inference_mode(False)
def global_minimum(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    loss: Any = "cross_entropy",
    weights: Any = None,
    gap: float = 1e-4,
    last_layer: nn.Module | str | None = None,
    seed: int = 0,
) -> GlobalMinimum:
    """Weights of `model` whose training loss on (x, y) is within `gap` of its global minimum.

    model: as for `verify_expressivity`, with a wide softplus layer of at least N units for the N
    distinct inputs (`tp.nn.widen`); it is not changed. x, y: all training data, as the Trainer's
    arrays. loss: as the Trainer's, but for a `ConvexLoss` of one's own. weights [n] >= 0: of the
    samples, as of `loss_floor`; those of weight 0 are left out. gap > 0: of the mean loss.
    Cross-entropy aims at q_c = log(t_c + e T), t as in `SoftmaxLoss`, which costs a group at most
    T log(1 + e m_y) <= T e m_y; regressions at the minimiser. Time and memory: the witness's proof,
    O(N^2 d), a sparse substitution and one pass of the model over the samples; three where the
    rounding of its dtype asks for T as the model itself computes it.

    Returns a GlobalMinimum, whose gap is measured and may exceed the one asked for where the
    model's dtype is too coarse. Raises ValueError for unusable arguments, a declared loss, and a
    model that has no provable witness, with the reason.
    """
    resolved = resolve_loss(loss)
    if not isinstance(resolved, SoftmaxLoss | LogisticLoss | SquaresLoss | HuberLoss):
        raise ValueError(
            f"loss: {resolved.name}: expected a loss whose minimisers are known, one of torch's"
        )
    if not (isinstance(gap, int | float) and 0 < gap <= sys.float_info.max):
        raise ValueError(f"gap: expected a number > 0, got {gap!r}")
    own = copy_model(model)
    with one_tensor(own, x) as whole:
        inputs = checked_inputs(whole)
        parameter = first_parameter(own)
        network = Network(own, as_example(inputs, parameter), last_layer)
        targets = as_targets(y, "y")[0].cpu()
        if targets.dim() == 0 or len(targets) != len(inputs):
            raise ValueError(f"y: expected {len(inputs)} targets, got {list(targets.shape)}")
        require_finite(targets, "y", "target")
        targets = prepare_targets(resolved, targets, network.outputs, "y")
        fed = torch.cat([part.cpu() for part, _ in batches(inputs, parameter)])
        if (c := sample_weights(weights, len(inputs))) is not None:
            c, fed, targets = c[c > 0], fed[c > 0], targets[c > 0]
            resolved, targets = weighted(resolved), packed(targets, c)
        resolved = resolved.over(targets, network.outputs)
        groups = groups_of(fed)
        floor = floor_of(resolved, groups, targets, network.outputs)
        distinct = fed[firsts(groups)]
        if network.width < len(distinct):
            raise ValueError(
                f"model: expected at least {len(distinct)} units in the wide layer, one for each "
                f"distinct input, got {network.width}; tp.nn.widen(model, {len(distinct)})"
            )
        verdict = verify_network(
            network,
            [(part, None) for part in distinct.to(parameter.device).split(BATCH)],
            n=len(distinct),
            w="witness",
            method="certificate",
            factorization="triangular",
            seed=seed,
        )
        if verdict.status != "proved" or verdict.witness is None:
            raise ValueError(f"model: no weights were proved to tell all inputs apart: {verdict}")
        own.load_state_dict(verdict.witness, strict=False)
        own.eval()
        aims = best_outputs(resolved, groups, targets, network.outputs, gap)
        found: tuple[float, float, dict[str, Tensor]] | None = None
        for triangle in (_proved_triangle, _own_triangle):
            try:
                _solve(network, *triangle(network, distinct, verdict), aims)
            except ValueError:
                if found is None:
                    raise
                break  # the model's own features are not triangular: what was found stays
            value = _loss(own, fed, targets, resolved, parameter)
            rounding = ROUNDING * torch.finfo(parameter.dtype).eps * abs(value)
            above = plus(value, -floor.lower, rounding)
            if found is None or above < found[1]:
                state = {name: tensor.detach().clone() for name, tensor in own.state_dict().items()}
                found = value, above, state
            if above <= gap:
                break
    assert found is not None
    value, above, state = found
    return GlobalMinimum(state, value, floor, above, float(gap), verdict)


def best_outputs(
    loss: ConvexLoss, groups: Tensor, y: Tensor, outputs: int, gap: float
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Outputs [N, m_y] of the groups with a mean loss within half of `gap` of the infimum."""
    y, c = split(loss, y)
    count, loss = int(groups.max()) + 1, unweighted(loss)

    def summed(rows: Tensor) -> Tensor:
        zeros = torch.zeros(count, *rows.shape[1:], dtype=torch.float64, device="cpu")
        own = c.double().reshape(-1, *[1] * (rows.dim() - 1))
        return zeros.index_add_(0, groups, rows.double() * own)

    if isinstance(loss, SoftmaxLoss | LogisticLoss):
        t = summed(loss.terms(y, outputs))
        whole = t.sum(-1, keepdim=True)
        # the increments add up to sum T e m_y / sum d, or over m_y outputs to twice sum T e / m_y
        per_sample = float(whole.sum()) / float((c * loss.divisor(y)).sum())
        classes = outputs if isinstance(loss, SoftmaxLoss) else 2 / outputs
        share = min(gap / (2 * max(per_sample, 1e-300) * classes), 1.0)
        q = torch.where(whole > 0, t + share * whole, 1.0).log()
        if isinstance(loss, LogisticLoss):
            return (q[..., 0] - q[..., 1]).numpy()
        return (q - q.mean(1, keepdim=True)).numpy()
    if isinstance(loss, SquaresLoss):
        return (summed(y) / summed(torch.ones_like(y[:, :1]))).numpy()
    if not isinstance(loss, HuberLoss):
        raise ValueError(f"loss: {loss.name}: its minimisers are not known")
    aims = y[firsts(groups)].double().numpy().copy()
    counts = groups.bincount()
    for g in (counts > 1).nonzero().flatten().tolist():
        rows, own = y[groups == g].double().numpy(), c[groups == g].double().numpy()
        aims[g] = [_huber_minimiser(column, own, loss.delta) for column in rows.T]
    return aims


def _huber_minimiser(
    values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], delta: float
) -> float:
    """By bisection of the derivative, which grows."""
    low, high = float(values.min()), float(values.max())
    for _ in range(80):
        middle = (low + high) / 2
        if float((weights * np.clip(middle - values, -delta, delta)).sum()) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _proved_triangle(network: Network, x: Tensor, verdict: Verdict) -> tuple[Any, Indices, Indices]:
    """As `_own_triangle`, of the features that were proved, in float64."""
    assert verdict.triangle is not None
    order, lower = verdict.triangle
    return lower, order.cpu().numpy(), np.arange(len(order))


@torch.no_grad()
def _own_triangle(network: Network, x: Tensor, verdict: Verdict) -> tuple[Any, Indices, Indices]:
    """(T, rows, columns): T lower triangular, h of sample rows[i] and unit columns[k] is T[i, k].

    Of the model's own features of x [N, ...], in its own dtype.
    """
    from scipy.sparse import coo_matrix

    n, device = len(x), network.last.module.weight.device
    parts = []
    for start in range(0, n, BATCH):
        h = network.hidden(x[start : start + BATCH].to(device))[:, :n].cpu().double()
        rows, columns = (h.abs() > OFF).nonzero(as_tuple=True)
        parts.append((rows + start, columns, h[rows, columns]))
    i, j, values = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    matrix = coo_matrix((values, (i, j)), shape=(n, n)).tocsr()
    order, own = triangular_order(matrix)
    return matrix[order][:, own].tocsr(), order, own


@torch.no_grad()
def _solve(
    network: Network, triangle: Any, order: Indices, own: Indices, aims: np.ndarray[Any, Any]
) -> None:
    """Set the last layer: h(x) W^T + b = aims, W zero but for the N neurons of the witness."""
    from scipy.sparse.linalg import spsolve_triangular

    layer, n = network.last.module, len(order)
    shift = np.zeros(aims.shape[1])
    if layer.bias is not None:
        if layer.bias.requires_grad:
            layer.bias.copy_(torch.from_numpy(aims.mean(0)))
        shift = layer.bias.detach().cpu().double().numpy()
    triangle.sort_indices()
    found = np.zeros((n, aims.shape[1]))
    found[own] = spsolve_triangular(triangle, (aims - shift)[order], lower=True)
    layer.weight.zero_()
    layer.weight[:, :n].copy_(torch.from_numpy(found.T.copy()))


def triangular_order(matrix: Any) -> tuple[Indices, Indices]:
    """(rows, columns) in whose order a sparse matrix is lower triangular; ValueError: none.

    matrix: SciPy's, compressed by rows. The next row is one that has a single entry among the
    columns not yet taken.
    """
    n = matrix.shape[0]
    by_column = matrix.tocsc()
    left = np.diff(matrix.indptr).copy()
    taken = np.zeros(n, dtype=bool)
    ready = list(np.flatnonzero(left == 1))
    rows, columns = [], []
    while ready:
        row = ready.pop()
        of_row = matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]
        free = of_row[~taken[of_row]]
        if len(free) != 1:
            break
        column = int(free[0])
        taken[column] = True
        rows.append(int(row))
        columns.append(column)
        touched = by_column.indices[by_column.indptr[column] : by_column.indptr[column + 1]]
        left[touched] -= 1
        ready += list(touched[left[touched] == 1])
    if len(rows) < n:
        raise ValueError("model: the witness's columns are not triangular in the model's own dtype")
    return np.array(rows), np.array(columns)


@torch.no_grad()
def _loss(
    model: nn.Module, x: Tensor, y: Tensor, loss: ConvexLoss, parameter: nn.Parameter
) -> float:
    """The mean over all samples of the model's outputs, its loss evaluated in float64."""
    values = []
    for start in range(0, len(x), BATCH):
        part = slice(start, start + BATCH)
        outputs = model(x[part].to(parameter.device)).cpu().double()
        target = y[part].double() if y.is_floating_point() else y[part]
        values.append(float(loss(outputs, target)) * len(outputs))
    return math.fsum(values) / len(x)
