"""Verification of rank [h_X, 1] = n for a model and its data."""

import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg.gram_tiles import MatrixSource
from ..linalg.progress import Stages
from ..memory import available_memory
from ..network import Network
from . import record
from .certify import certify_given, certify_matrix, certify_witness
from .culprits import describe, find_culprits
from .forward_error import Unbounded
from .inputs import as_example, batches, checked_inputs, first_parameter, identical_rows
from .problem import Problem
from .separation import separate
from .verdict import Verdict

WEIGHTS = ("current", "init", "witness")
METHODS = ("auto", "separation", "certificate", "svd")
FACTORIZATIONS = ("auto", "triangular", "gram", "preconditioned")
# Time of torch.linalg.svdvals on [h, 1] is about SVD_FLOPS * n^2 * p float64 operations.
SVD_FLOPS = 4.0
# What "auto" may take: little where it comes along with training, an hour where it is asked for.
AUTO_SECONDS = {"current": 60.0, "init": 3600.0, "witness": 3600.0}
AUTO_SHARE = 0.6  # of the memory available
# Within training a proof for some weights is enough: "auto" says more about these weights only
# where the matrix is small, n^2 p entries of work at most.
AUTO_TRAINING = 4e9


@torch.inference_mode(False)
def verify_expressivity(
    model: nn.Module,
    x: Any,
    *,
    w: str = "current",
    method: str = "auto",
    factorization: str = "auto",
    last_layer: nn.Module | str | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Verdict:
    """Whether [h_X^(H)(w), 1_n] has rank n: Assumption 1, or that this very w fulfils it.

    x: the n training inputs (tensor or array; uint8 becomes k / 255 in the model's dtype).
    Everything is computed in float64, in evaluation mode, on a copy: the model is not changed,
    BatchNorm's running statistics are constants of it.

    w: "current", the model's weights; "init", its default initialisation under `seed` (the paper's
    procedure); "witness", weights of the wide layer made for the proof (witness.py).
    method:
    - "separation": some w exists, as distinct backbone features suffice where m_H >= n - 1
      (NUMERICS: Pinkus 1999 and others). O(n d + n log n) after the backbone features.
    - "certificate": a proved lower bound of sigma_min([h_X, 1]) and of log det, for the exact
      function (Rump, BIT 46, 2006). factorization: "triangular" (w="witness", O(n^2 d)), "gram"
      (O(n^2 m), tiles in memory or in a file in `folder`, which makes it resumable),
      "preconditioned" (ill-conditioned M, in memory), "auto": the first of them that proves.
    - "svd": singular values above max(n, p) eps sigma_max (numpy.linalg.matrix_rank's rule).
    - "auto": separation, then what says more at this w where it fits into memory and time; the
      plan is printed before it starts.
    Identical inputs and n > m_H + 1 come first: they prove that no weights at all have rank n. A
    last layer without a trainable bias has no use for the column 1: then h_X alone counts.

    Returns a Verdict. Raises ValueError for unknown w, method or factorization, for x empty or with
    NaN or infinity.
    """
    x = checked_inputs(x)
    parameter = first_parameter(model)
    network = Network(model, as_example(x, parameter), last_layer)
    return verify_network(
        network,
        batches(x, parameter),
        n=len(x),
        w=w,
        method=method,
        factorization=factorization,
        seed=seed,
        folder=None if folder is None else Path(folder),
        progress=progress,
        say=print if progress else lambda _: None,
    )


def hashes_of(model: nn.Module, x: Any, last_layer: str | None) -> dict[str, str]:
    """SHA-256 of data and hidden layers, as in a Verdict's `hashes`."""
    x = checked_inputs(x)
    parameter = first_parameter(model)
    network = Network(model, as_example(x, parameter), last_layer)
    return _hashes(network, [part for part, _ in batches(x, parameter)])


def _hashes(network: Network, inputs: list[Tensor]) -> dict[str, str]:
    state = network.hidden_state()
    return {
        "data": record.hash_tensors(inputs),
        "model": record.hash_hidden_layers(network.model, state, network.last.name),
    }


def verify_network(
    network: Network,
    samples: Iterable[tuple[Tensor, Any]],
    *,
    n: int,
    w: str = "current",
    method: str = "auto",
    factorization: str = "auto",
    seed: int = 0,
    folder: Path | None = None,
    batch_norm: str = "frozen",
    training: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Verdict:
    """`verify_expressivity` for a Network and samples: batches (x, anything) in index order.

    training: "auto" stops at a proof for some weights, unless the matrix is small.
    """
    for name, value, known in (
        ("w", w, WEIGHTS),
        ("method", method, METHODS),
        ("factorization", factorization, FACTORIZATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    started = time.perf_counter()
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
        "last_layer": network.last.name,
    }

    def verdict(**fields: Any) -> Verdict:
        return Verdict(
            **(common | fields),
            seconds=time.perf_counter() - started,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            stages=stages.done,
            environment=record.environment(),
        )

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
    inputs = [x for x, _ in samples]
    common["hashes"] = _hashes(network, inputs)
    columns = network.width + ones
    if n > columns:
        return verdict(
            status="deficient",
            claim="exists",
            method="dimension",
            reason=f"n = {n} > m_H{' + 1' if ones else ''} = {columns}: no weights reach rank n; "
            "tp.nn.widen(model, n) adds a wide enough layer",
        )
    culprits = identical_rows(torch.cat([x.cpu().flatten(1) for x in inputs]))
    if culprits:
        return verdict(
            status="deficient",
            claim="exists",
            method="identical inputs",
            reason=f"{len(culprits)} groups of identical inputs: their rows of h_X agree for every "
            "w; remove all but one of each group",
            culprits=culprits,
            explanation=_named(culprits, "have identical inputs"),
        )
    problem = Problem(network, inputs, n, ones)
    key = " ".join([*common["hashes"].values(), w, str(seed), str(ones)])
    attempt = _Attempt(problem, w, seed, factorization, folder, stages, key, training)
    return verdict(**getattr(attempt, method)())


@dataclass
class _Attempt:
    """The methods, each returning fields of a Verdict."""

    problem: Problem
    w: str
    seed: int
    factorization: str
    folder: Path | None
    stages: Stages
    key: str  # of the tile file: data, hidden layers, weights asked for
    training: bool

    def __post_init__(self) -> None:
        """Put the weights asked for into the copy."""
        if self.w == "init":
            self.problem.reinitialise(self.seed)

    def separation(self) -> dict[str, Any]:
        """Distinct backbone features: some weights of the wide layer have rank n."""
        problem = self.problem
        fields: dict[str, Any] = {"method": "separation", "claim": "exists", "status": "undecided"}
        if constraint := problem.constraint():
            return fields | {"reason": f"separation needs free weights: {constraint}"}
        with problem.restored():  # "auto" goes on with the weights asked for
            return self._separation(fields)

    def _separation(self, fields: dict[str, Any]) -> dict[str, Any]:
        problem = self.problem
        assert problem.wide is not None
        try:
            with self.stages.stage("choice of a backbone", 0, "samples") as stage:
                chosen = problem.choose_backbone(stage)
            with self.stages.stage("backbone features", problem.n, "samples") as stage:
                found = problem.features(problem.wide, stage, folder=self.folder)
        except Unbounded as error:
            return fields | {"reason": f"no error bound: {error}"}
        with self.stages.stage("separation", 2 * found.z.numel()):
            separation = separate(found.z, found.error, seed=self.seed)
        fields |= {
            "margin": separation.margin,
            "feature_error": float(found.error.max()),
            "assumptions": found.assumptions,
            "constants": {"backbone": chosen},
        }
        if separation.proved:
            return fields | {"status": "proved", "witness": dict(problem.changes)}
        groups = find_culprits(found.z, found.error)
        pairs = [sorted((i, j)) for i, j, _, _ in separation.closest]
        return fields | {
            "reason": "these backbone features are not apart beyond their error bounds",
            "culprits": [sorted(c.samples) for c in groups] or pairs,
            "explanation": describe(groups)
            or [
                f"samples {i} and {j}: distance {distance:.2e}, needed {needed:.2e}"
                for i, j, distance, needed in separation.closest[:5]
            ],
        }

    def certificate(self) -> dict[str, Any]:
        """A lower bound of sigma_min."""
        arguments: dict[str, Any] = {
            "factorization": self.factorization,
            "folder": self.folder,
            "key": self.key,
            "stages": self.stages,
        }
        fields: dict[str, Any] = {"method": "certificate"}
        try:
            if self.w == "witness":
                if constraint := self.problem.constraint():
                    reason = f"a witness needs free weights: {constraint}"
                    return fields | {"status": "undecided", "claim": "exists", "reason": reason}
                return fields | certify_witness(self.problem, seed=self.seed, **arguments)
            found = certify_given(self.problem, **arguments)
        except Unbounded as error:
            # any model at all: the stored matrix, without promotion to the function
            h = self.problem.plain_features()
            matrix = torch.cat([h, h.new_ones(len(h), int(self.problem.ones))], 1)
            found = certify_matrix(
                MatrixSource(matrix),
                None,
                constants={"unbounded": str(error)},
                assumptions=[],
                **arguments,
            )
        claim = "exists" if self.w == "init" else "at w"
        witness = dict(self.problem.changes) or None
        return fields | found | {"claim": claim, "witness": witness}

    def svd(self) -> dict[str, Any]:
        """Singular values in float64, counted by numpy's rule."""
        problem = self.problem
        h = problem.plain_features()
        matrix = torch.cat([h, h.new_ones(len(h), int(problem.ones))], 1)
        fields: dict[str, Any] = {
            "method": "svd",
            "claim": "exists" if self.w != "current" else "at w",
            "status": "undecided",
        }
        if not bool(torch.isfinite(matrix).all()):
            return fields | {"reason": "the features hold NaN or infinity"}
        with self.stages.stage("svd", SVD_FLOPS * problem.n**2 * problem.columns):
            sigma = torch.linalg.svdvals(matrix)
        tolerance = float(sigma[0]) * problem.columns * torch.finfo(torch.float64).eps
        rank, smallest = int((sigma > tolerance).sum()), float(sigma[-1])
        low = "numerically low rank, which is no proof of a low one"
        if rank < problem.n:
            groups = find_culprits(matrix, None, matrix)
            fields |= {
                "culprits": [c.samples for c in groups],
                "explanation": describe(groups),
            }
        return fields | {
            "status": "full rank" if rank == problem.n else "undecided",
            "rank": rank,
            "logabsdet": 2 * float(sigma.log().sum()),
            "sigma_min": smallest,
            "condition": float(sigma[0]) / smallest if smallest > 0 else None,
            "reason": "" if rank == problem.n else low,
        }

    def auto(self) -> dict[str, Any]:
        """Separation, then what says more about these weights where memory and time allow."""
        n, columns = self.problem.n, self.problem.columns
        say = self.stages.say
        if self.w == "witness":
            return self._witness()
        found = self.separation()
        if self.training and found["status"] == "proved" and n * n * columns > AUTO_TRAINING:
            return found
        at_w: dict[str, Any] = {}
        allowed, plan = self._affordable("svd", SVD_FLOPS * n * n * columns, 3 * 8 * n * columns)
        if allowed:
            at_w = self.svd()
        left = f"not computed: {plan}; pass method='svd' to compute it all the same"
        allowed, plan = self._affordable(
            "certificate", n * n * (columns + n / 3), 8 * n * (n + 2 * min(columns, 2048))
        )
        if allowed and at_w.get("status") != "undecided":
            say(plan)
            certified = self.certificate()
            if certified["status"] == "proved":
                estimate = at_w.get("logabsdet", certified["logabsdet"])  # the SVD's is the better
                return at_w | certified | {"logabsdet": estimate}
        estimates = {k: at_w.get(k) for k in ("rank", "sigma_min", "condition", "logabsdet")}
        if found["status"] == "proved":
            return estimates | found | {"reason": "" if at_w else f"at these weights {left}"}
        if at_w:
            more = {k: found[k] for k in ("culprits", "explanation") if k in found}
            return more | at_w
        reason = "; ".join(r for r in (found.get("reason", ""), left) if r)
        return (
            {"status": "undecided", "claim": "at w", "method": "none"} | found | {"reason": reason}
        )

    def _witness(self) -> dict[str, Any]:
        n, wide = self.problem.n, self.problem.wide
        if wide is None:
            return self.certificate()
        allowed, plan = self._affordable(
            "certificate", 4 * n * n * wide.in_features, 8 * n * (6 * wide.in_features + 2048)
        )
        self.stages.say(plan)
        with self.problem.restored():
            found = self.certificate() if allowed else {"status": "undecided"}
        return found if found["status"] == "proved" else self.separation()

    def _affordable(self, what: str, flops: float, size: float) -> tuple[bool, str]:
        """Whether "auto" may do it, and the plan in words."""
        device = self.problem.inputs[0].device
        seconds = flops / _float64_rate(device)
        length = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        plan = (
            f"{what} of {self.problem.n} x {self.problem.columns} in float64: about {length} and "
            f"{size / 2**30:.2f} GiB, after the features"
        )
        fits = size <= AUTO_SHARE * available_memory(device)
        return fits and seconds <= AUTO_SECONDS[self.w], plan


def _named(groups: list[list[int]], what: str) -> list[str]:
    lines = [f"samples {', '.join(map(str, group[:8]))} {what}" for group in groups[:5]]
    return lines + ([f"... and {len(groups) - 5} more such groups"] if len(groups) > 5 else [])


def _float64_rate(device: torch.device) -> float:
    """Float64 operations a second of a matrix product of 512 on this device."""
    a = torch.ones(512, 512, dtype=torch.float64, device=device)  # no draw: the caller's generator
    (a @ a).sum().item()
    started = time.perf_counter()
    (a @ a).sum().item()
    return 2 * 512**3 / max(time.perf_counter() - started, 1e-6)
