"""Verification of rank [h_X', 1] = N, X' the N distinct inputs, for a model and its data."""

import os
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import integer
from ..core.arrays import as_tensor
from ..core.environment import environment
from ..core.hashing import hash_hidden_layers, hash_tensors
from ..core.messages import first_line
from ..core.names import canonical_name
from ..linalg.progress import Stages
from ..model.calling import one_tensor
from ..model.inputs import as_example, batches, checked_inputs, first_parameter
from ..model.network import Network
from ..model.probing import eager, untouched, unwrap
from .agreement import require_equal_rows
from .attempts import failure
from .certificate_file import VERSION
from .distinct import Inputs
from .evidence import Evidence
from .methods import Attempt
from .outcome import EQUAL_INPUTS, Outcome, named
from .problem import Problem

WEIGHTS = ("current", "init", "witness")
METHODS = ("auto", "separation", "certificate", "svd")
FACTORIZATIONS = ("auto", "triangular", "gram", "preconditioned")


def verify_model(
    model: nn.Module,
    x: Any,
    *,
    w: str = "current",
    method: str = "auto",
    factorization: str = "auto",
    last_layer: nn.Module | str | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    rows: Any = None,
    progress: bool = False,
    version: int = VERSION,
) -> Outcome:
    """`verify_expressivity` (verdict.py), as data; version: as of `verify_samples`."""
    seed = integer("seed", seed)
    with one_tensor(model, x) as packed:
        inputs = checked_inputs(packed)
        parameter = first_parameter(model)
        network = Network(model, as_example(inputs, parameter), last_layer)
        return verify_samples(
            network,
            batches(inputs, parameter),
            n=len(inputs),
            kept=None if rows is None else _kept(rows, len(inputs), network.last.rows),
            w=w,
            method=method,
            factorization=factorization,
            seed=seed,
            folder=_writable(folder),
            progress=progress,
            say=print if progress else lambda _: None,
            version=version,
        )


def _kept(rows: Any, n: int, each: int) -> Tensor:
    """Numbers of the rows that count; ValueError where they are not told for each, or none does."""
    given = as_tensor(rows, name="rows").cpu()
    if given.dtype != torch.bool or given.numel() != n * each or len(given) != n:
        raise ValueError(
            f"rows: expected which of the {each} outputs of each of {n} samples count, bool "
            f"[{n}, {each}], got {given.dtype} {list(given.shape)}"
        )
    kept = given.flatten().nonzero()[:, 0]
    if not len(kept):
        raise ValueError("rows: expected at least one that counts, got none")
    return kept


def _writable(folder: Any) -> Path | None:
    """The folder, made where it is missing."""
    if folder is None:
        return None
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder: expected a path or None, got {type(folder).__name__}")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder: {folder} cannot be made ({first_line(error)})") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"folder: {folder} cannot be written")
    return Path(folder)


def hashes_of(model: nn.Module, x: Any, last_layer: str | None) -> dict[str, str]:
    """SHA-256 of data and hidden layers, as in an Outcome's `hashes`."""
    with one_tensor(model, x) as packed:
        inputs = checked_inputs(packed)
        parameter = first_parameter(model)
        network = Network(model, as_example(inputs, parameter), last_layer)
        return network_hashes(network, [part for part, _ in batches(inputs, parameter)])


def network_hashes(network: Network, inputs: list[Tensor]) -> dict[str, str]:
    """SHA-256 of inputs and hidden layers, as in an Outcome's `hashes`."""
    state = network.hidden_state()
    return {
        "data": hash_tensors(inputs),
        "model": hash_hidden_layers(network.model, state, network.last.name),
    }


def verify_samples(
    network: Network,
    samples: Iterable[tuple[Tensor, Any]],
    *,
    n: int,
    kept: Tensor | None = None,
    w: str = "current",
    method: str = "auto",
    factorization: str = "auto",
    seed: int = 0,
    folder: Path | None = None,
    batch_norm: str = "frozen",
    training: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
    version: int = VERSION,
) -> Outcome:
    """`verify_model` for a Network and n samples: batches (x, targets or None) in index order.

    kept: ascending numbers of the rows that count, where a sample has several (all).
    training: "auto" stops at a proof for some weights, unless the matrix is small. version: of the
    certificate file; 1 asks for rank n over all samples, which equal inputs make impossible.
    """
    for name, value, known in (
        ("w", w, WEIGHTS),
        ("method", method, METHODS),
        ("factorization", factorization, FACTORIZATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    started = time.perf_counter()
    n = n * network.last.rows if kept is None else len(kept)
    bias = network.last.module.bias
    ones = bias is not None and bias.requires_grad
    stages = Stages(progress, say)
    common: dict[str, Any] = {
        "n": n,
        "width": network.width,
        "batch_norm": batch_norm,
        "bias": ones,
        "w": w,
        "seed": seed,
        "asked": method,
        "version": version,
        "last_layer": network.last.name,
    }

    def verdict(found: Evidence) -> Outcome:
        return Outcome(
            **common,
            **found.as_fields(),
            seconds=time.perf_counter() - started,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            stages=stages.done,
            environment=environment(),
        )

    def undecided(reason: str) -> Outcome:
        return verdict(Evidence(method="none", claim="at w", reason=reason))

    def deficient(method: str, reason: str, **more: Any) -> Outcome:
        return verdict(Evidence(method=method, status="deficient", reason=reason, **more))

    moving = any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None
        for m in network.model.modules()
    )
    if batch_norm == "batch" or moving:
        return undecided(
            "mini-batch statistics hide dependent samples: use batch_norm='frozen'",
        )
    if _flushes_subnormals():
        return undecided(
            "flush-to-zero is on, the bounds need subnormal numbers: call "
            "torch.set_flush_denormal(False) first",
        )
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        return undecided(
            "torch.autocast is on: what the model computes under it is not what is bounded",
        )
    parts = list(samples)
    data = Inputs([x for x, _ in parts], network.last.rows, kept)
    common["hashes"] = network_hashes(network, data.batches)
    if version > 1:
        targets = [y for _, y in parts if isinstance(y, Tensor)]
        common["distinct"], common["repeated"] = data.distinct, data.repeated
        common["disagreeing"] = data.disagreeing(targets if len(targets) == len(parts) else None)
    rows, columns = data.distinct if version > 1 else n, network.width + ones
    if rows > columns and (why := _narrower_than_told(network, data.batches)):
        return verdict(Evidence(method="none", reason=why))
    if rows > columns:
        letter = "n" if rows == n else "N"
        return deficient(
            "dimension",
            f"{letter} = {rows} > m_H{' + 1' if ones else ''} = {columns}: no weights reach rank "
            f"{letter}; tp.nn.widen(model, {letter}) adds a wide enough layer",
        )
    try:  # the model is copied, run, and may be initialised anew
        problem = Problem(network, data, ones, version=version)
        if data.repeated:
            require_equal_rows(problem)
        if data.repeated and version == 1:
            return deficient(
                "identical inputs",
                f"{len(data.repeated)} groups of identical inputs: their rows of h_X agree for "
                "every w; remove all but one of each group",
                culprits=data.repeated,
                explanation=named(data.repeated, "have identical inputs"),
                assumptions=list(EQUAL_INPUTS),
            )
        names = {canonical_name(name): name for name in network.model.state_dict()}
        attempt = Attempt(problem, w, seed, factorization, folder, stages, training)
        found: Evidence = getattr(attempt, method)()
        if found.witness:  # under the names of the model as it was given, wrapped or not
            own = {names[canonical_name(name)]: value for name, value in found.witness.items()}
            found = found.but(witness=own)
        if data.repeated and found.status != "undecided":
            found = found.but(assumptions=[*found.assumptions, *EQUAL_INPUTS])
        return verdict(found)
    except Exception as error:
        return verdict(Evidence(method="none", reason=failure(error, folder)))


def _narrower_than_told(network: Network, inputs: list[Tensor]) -> str:
    """Why the rows of h are not the m_H numbers that two samples gave; "" where they are."""
    x, source = inputs[0], unwrap(network.model)
    parameter = first_parameter(source)
    x = x.to(parameter.dtype) if x.is_floating_point() else x
    try:
        with untouched(source), eager():
            h = network.hidden(x)
    except Exception as error:  # whatever a user's forward raises
        return f"the model does not run on these samples ({failure(error)})"
    expected = (len(x) * network.last.rows, network.width)
    return "" if h.shape == expected else f"h has the shape {tuple(h.shape)}"


def _flushes_subnormals() -> bool:
    tiny = torch.full((64,), 2.0**-1074, dtype=torch.float64, device="cpu")
    return not bool((tiny * 1.0).all())
