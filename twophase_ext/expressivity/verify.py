"""Verification of rank [h_X, 1] = n for a model and its data."""

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..arrays import as_tensor
from ..layers import input_of
from ..network import Network
from .verdict import Verdict

METHODS = ("auto", "svd")
# Time of torch.linalg.svdvals on [h, 1] is about SVD_FLOPS * n^2 * p float64 operations.
SVD_FLOPS = 4.0
AUTO_SECONDS = 60.0


def verify_expressivity(
    model: nn.Module,
    x: Any,
    *,
    w: str = "current",
    method: str = "auto",
    last_layer: nn.Module | str | None = None,
    progress: bool = False,
) -> Verdict:
    """Whether [h_X^(H)(w), 1_n] has rank n at the model's weights (Assumption 1 at this w).

    x: the n training inputs (tensor or array; uint8 is scaled to [0, 1]). The features are computed
    in float64 in evaluation mode on a copy: the model is not changed. method: "svd" counts singular
    values above max(n, p) * eps * sigma_max (numpy.linalg.matrix_rank's rule; at most O(n^2 p)
    operations and 8 n p bytes); "auto" does so where it takes about a minute and says "undecided"
    with an estimate otherwise. Identical inputs and n > m_H + 1 are found first: those prove that
    no weights at all have rank n. Returns a Verdict. Raises ValueError for unknown w or method or
    empty x.
    """
    if w != "current":
        raise ValueError(f"w: expected 'current', got {w!r}")
    x = as_tensor(x, name="x")
    if len(x) == 0:
        raise ValueError("x: the data set is empty")
    device = next(model.parameters()).device

    def batches() -> Iterable[tuple[Tensor, None]]:
        for start in range(0, len(x), 256):
            part = x[start : start + 256].to(device)
            yield (part.double() / 255 if part.dtype == torch.uint8 else part), None

    dtype = next(model.parameters()).dtype
    example = next(iter(batches()))[0][:2].to(dtype)
    return verify_network(
        Network(model, example, last_layer),
        batches(),
        n=len(x),
        method=method,
        say=print if progress else lambda _: None,
    )


def verify_network(
    network: Network,
    batches: Iterable[tuple[Tensor, Any]],
    *,
    n: int,
    method: str = "auto",
    batch_norm: str = "frozen",
    say: Callable[[str], None] = lambda _: None,
) -> Verdict:
    """`verify_expressivity` for a Network and batches (x, anything) in index order."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    started = time.perf_counter()
    common: dict[str, Any] = {"n": n, "width": network.width, "batch_norm": batch_norm}

    def verdict(**fields: Any) -> Verdict:
        return Verdict(**common, **fields, seconds=time.perf_counter() - started)

    if batch_norm == "batch":
        return verdict(
            status="undecided",
            claim="at w",
            method="none",
            reason="mini-batch statistics hide dependent samples: use batch_norm='frozen'",
        )
    if n > network.width + 1:
        return verdict(
            status="deficient",
            claim="exists",
            method="dimension",
            reason=f"n = {n} > m_H + 1 = {network.width + 1}: no weights reach rank n; "
            "tp.nn.widen(model, n) adds a wide enough layer",
        )
    inputs = list(batches)
    culprits = identical_rows(torch.cat([x.cpu().flatten(1) for x, _ in inputs]))
    if culprits:
        return verdict(
            status="deficient",
            claim="exists",
            method="identical inputs",
            reason=f"{len(culprits)} groups of identical inputs: their rows of h_X agree for every "
            "w; remove all but one of each group",
            culprits=culprits,
        )
    columns = network.width + 1
    seconds = SVD_FLOPS * n * n * columns / _float64_rate(inputs[0][0].device)
    size = 3 * 8 * n * columns
    plan = f"svd of {n} x {columns} in float64: about {seconds:.0f} s and {size / 2**30:.2f} GiB"
    if method == "auto" and seconds > AUTO_SECONDS:
        return verdict(
            status="undecided",
            claim="at w",
            method="none",
            reason=f"not computed: {plan}; pass method='svd' to compute it all the same",
        )
    if seconds > 1:
        say(f"verifying: {plan}")
    matrix = _features_and_ones(network, (x for x, _ in inputs), n)
    if not bool(torch.isfinite(matrix).all()):
        return verdict(
            status="undecided",
            claim="at w",
            method="svd",
            reason="the features hold NaN or infinity",
        )
    sigma = torch.linalg.svdvals(matrix)
    tolerance = float(sigma[0]) * columns * torch.finfo(torch.float64).eps
    rank = int((sigma > tolerance).sum())
    smallest = float(sigma[-1])
    return verdict(
        status="full rank" if rank == n else "undecided",
        claim="at w",
        method="svd",
        rank=rank,
        logabsdet=2 * float(sigma.log().sum()),
        sigma_min=smallest,
        condition=float(sigma[0]) / smallest if smallest > 0 else None,
        reason="" if rank == n else "numerically low rank, which is no proof of a low one",
        peak_bytes=size,
    )


def identical_rows(rows: Tensor) -> list[list[int]]:
    """Groups of indices of exactly equal rows, in O(n d) by hashing each row's bytes."""
    groups: dict[bytes, list[int]] = {}
    array = rows.contiguous().numpy() + 0.0 if rows.is_floating_point() else rows.numpy()
    for i, row in enumerate(array):  # + 0.0 makes -0 and 0 the same bytes
        groups.setdefault(row.tobytes(), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def _features_and_ones(network: Network, inputs: Iterable[Tensor], n: int) -> Tensor:
    """[h_X, 1] in float64, from a float64 copy of the model in evaluation mode."""
    model = copy.deepcopy(network.model).double().eval()
    names = {name: module for name, module in model.named_modules()}
    last = names[next(k for k, m in network.model.named_modules() if m is network.last.module)]
    done, matrix = 0, None
    with torch.no_grad():
        for x in inputs:
            h = input_of(model, last, x.double() if x.is_floating_point() else x).flatten(1)
            if matrix is None:
                matrix = h.new_ones(n, network.width + 1)
            matrix[done : done + len(h), :-1] = h
            done += len(h)
    assert matrix is not None
    return matrix


def _float64_rate(device: torch.device) -> float:
    """Float64 operations a second of a matrix product of 512 on this device."""
    a = torch.randn(512, 512, dtype=torch.float64, device=device)
    (a @ a).sum().item()
    started = time.perf_counter()
    (a @ a).sum().item()
    return 2 * 512**3 / max(time.perf_counter() - started, 1e-6)
