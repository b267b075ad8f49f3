"""Verification of rank [h_X, 1] = n for a model and its data."""

import copy
import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..arrays import as_tensor, require_finite
from ..layers import input_of
from ..memory import available_memory
from ..network import Network
from ..probing import record
from .verdict import Verdict

METHODS = ("auto", "svd")
# Time of torch.linalg.svdvals on [h, 1] is about SVD_FLOPS * n^2 * p float64 operations.
SVD_FLOPS = 4.0
AUTO_SECONDS = 60.0
AUTO_SHARE = 0.6  # of the memory available


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
    operations and 24 n p bytes); "auto" does so where it takes about a minute and fits into memory,
    and says "undecided" with an estimate otherwise. Identical inputs and n > m_H + 1 are found
    first: those prove that no weights at all have rank n. A last layer without a trainable bias
    has no use for the column 1: then h_X alone must have rank n. Returns a Verdict. Raises
    ValueError for unknown w or method, for x empty or with NaN or infinity.
    """
    if w != "current":
        raise ValueError(f"w: expected 'current', got {w!r}")
    x = checked_inputs(x)
    parameter = first_parameter(model)

    def batches() -> Iterable[tuple[Tensor, None]]:
        for start in range(0, len(x), 256):
            part = x[start : start + 256].to(parameter.device)
            yield (part.double() / 255 if part.dtype == torch.uint8 else part), None

    return verify_network(
        Network(model, as_example(x, parameter), last_layer),
        batches(),
        n=len(x),
        method=method,
        say=print if progress else lambda _: None,
    )


def checked_inputs(x: Any) -> Tensor:
    """The argument x as a tensor [n, ...]; ValueError where it is empty or not finite."""
    x = as_tensor(x, name="x")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError("x: the data set is empty")
    require_finite(x, "x", "input")
    return x


def first_parameter(model: nn.Module) -> nn.Parameter:
    """A parameter that tells the model's device and dtype; ValueError where there is none."""
    for parameter in model.parameters():
        return parameter
    raise ValueError("model: has no parameters")


def as_example(x: Tensor, parameter: nn.Parameter) -> Tensor:
    """Two samples on the model's device, in its dtype unless they are indices (tokens)."""
    part = x[:2].to(parameter.device)
    floating = part.is_floating_point() or part.dtype == torch.uint8
    return part.to(parameter.dtype) if floating else part


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
    bias = network.last.module.bias
    ones = bias is not None and bias.requires_grad
    common: dict[str, Any] = {
        "n": n,
        "width": network.width,
        "batch_norm": batch_norm,
        "bias": ones,
    }

    def verdict(**fields: Any) -> Verdict:
        return Verdict(**common, **fields, seconds=time.perf_counter() - started)

    moving = any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None
        for m in network.model.modules()
    )
    if batch_norm == "batch" or moving:
        return verdict(
            status="undecided",
            claim="at w",
            method="none",
            reason="mini-batch statistics hide dependent samples: use batch_norm='frozen'",
        )
    columns = network.width + ones
    if n > columns:
        return verdict(
            status="deficient",
            claim="exists",
            method="dimension",
            reason=f"n = {n} > m_H{' + 1' if ones else ''} = {columns}: no weights reach rank n; "
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
    seconds = SVD_FLOPS * n * n * columns / _float64_rate(inputs[0][0].device)
    size = 3 * 8 * n * columns
    plan = f"svd of {n} x {columns} in float64: about {seconds:.0f} s and {size / 2**30:.2f} GiB"
    available = available_memory(inputs[0][0].device)
    if method == "auto" and (seconds > AUTO_SECONDS or size > AUTO_SHARE * available):
        return verdict(
            status="undecided",
            claim="at w",
            method="none",
            reason=f"not computed: {plan}; pass method='svd' to compute it all the same",
        )
    if seconds > 1:
        say(f"verifying: {plan}")
    matrix = _features_and_ones(network, [x for x, _ in inputs], n)[:, :columns]
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
    buckets: dict[bytes, list[int]] = {}
    if rows.dtype == torch.bfloat16:  # NumPy has none
        rows = rows.float()
    array = rows.contiguous().numpy()

    def content(i: int) -> bytes:
        row = array[i]
        return (row + 0.0 if row.dtype.kind == "f" else row).tobytes()  # -0 and 0 are equal

    for i in range(len(array)):
        buckets.setdefault(hashlib.blake2b(content(i), digest_size=16).digest(), []).append(i)
    groups: dict[bytes, list[int]] = {}
    for bucket in buckets.values():
        for i in bucket if len(bucket) > 1 else ():
            groups.setdefault(content(i), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def _features_and_ones(network: Network, inputs: list[Tensor], n: int) -> Tensor:
    """[h_X, 1] in float64, from a float64 copy of the model in evaluation mode."""
    # A forward pass without gradients first: torch.nn.utils.weight_norm keeps the weight of the
    # last training step with its graph, and deepcopy refuses such a tensor.
    record(network.model, as_example(inputs[0], first_parameter(network.model)), ())
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
