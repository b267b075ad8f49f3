"""Lower bounds of sigma_min([h_X, 1]) for the exact function: bound the matrix, then promote.

A factorization bounds sigma_min of the stored float64 matrix from below. The claim is about the
function: it needs that bound to exceed ||dH||_F, the forward error of the features (promotion),
and sigma_min of the exact matrix is at least the difference.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.hashing import tensors_hash
from ..core.memory import available_memory
from ..linalg.bounds import SLACK, UNDERFLOW, below, bound_text, minus
from ..linalg.certificate import certify_gram
from ..linalg.gram_run import GramCertificate
from ..linalg.gram_tiles import PANEL, MatrixSource
from ..linalg.norms import frobenius_upper
from ..linalg.preconditioned import preconditioned_sigma_min
from ..linalg.progress import Stages
from .attempts import failure
from .backbone import choose_backbone
from .culprits import Culprit, describe, find_culprits
from .evidence import Evidence
from .kinks import OF_VERSION_1, local_kinks
from .one_sided import OneSided
from .problem import Problem
from .triangular import certify_triangular, preactivation_error, promoted_log_det
from .witness import spread_kinks, whiten

# The preconditioned bound keeps about six n x p matrices and does some 6 n^2 p operations.
PRECONDITIONED_COPIES = 6
PRECONDITIONED_ROWS = 8192


@dataclass
class WideSource:
    """Columns of M = [activation(z weight^T + bias), 1] on request (linalg's PanelSource)."""

    z: Tensor
    weight: Tensor
    bias: Tensor
    activation: OneSided
    ones: bool

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.z)

    @property
    def columns(self) -> int:
        """Columns, the ones included."""
        return len(self.weight) + self.ones

    @property
    def device(self) -> torch.device:
        """Where the panels are made."""
        return self.z.device

    def panel(self, start: int, end: int) -> Tensor:
        """Columns start..end, [n, end - start] float64."""
        m = len(self.weight)
        out = self.z.new_ones(self.n, end - start)
        if start < m:
            part = slice(start, min(end, m))
            inner = out[:, : part.stop - start]
            a = torch.addmm(self.bias[part], self.z, self.weight[part].T)
            inner.copy_(self.activation.function(a))
        return out

    def content(self) -> str:
        """A hash of what every entry is computed from: what tiles on disk belong to."""
        tensors = {"z": self.z, "weight": self.weight, "bias": self.bias}
        return f"{tensors_hash(tensors)} {self.activation.name} {self.ones}"

    def block(self, i0: int, i1: int, j0: int, j1: int) -> Tensor:
        """Rows i0..i1, columns j0..j1: what linalg's `certify_distributed` asks for."""
        return replace(self, z=self.z[i0:i1]).panel(j0, j1)


Source = WideSource | MatrixSource


def certify_witness(
    problem: Problem,
    *,
    factorization: str,
    seed: int,
    folder: Path | None,
    stages: Stages,
) -> Evidence:
    """What is found of a witness: kinks at samples (triangular), else spread kinks (Gram)."""
    wide, activation = problem.analytic_linear, problem.one_sided
    with stages.stage("choice of a backbone", 0, "samples") as stage:
        chosen = choose_backbone(problem, stage, wide)
    stages.say(f"backbone: {chosen}")
    with stages.stage("backbone features", problem.n, "samples") as stage:
        found = problem.features(wide, stage, folder=folder)
    z, error = found.z, found.error
    n, d, m = problem.n, z.shape[1], wide.out_features
    whitening = whiten(z, error, problem.dtype)
    constants: dict[str, Any] = {
        "backbone": chosen,
        "directions": len(whitening.map),
        "largest_feature_error": float(error.max()),
    }
    assumptions = [*found.assumptions]
    if problem.version > 1:
        assumptions += [a for a in activation.assumed if a not in assumptions]
    evidence = Evidence(method="certificate", assumptions=assumptions, constants=constants)
    reason = ""
    if factorization in ("auto", "triangular") and m >= n:
        with stages.stage("kinks at the samples", n * n * len(whitening.map)) as stage:
            counter = _counter(stage, n * len(whitening.map))
            made: dict[str, Any] = dict(OF_VERSION_1) if problem.version == 1 else {}
            made["folder"] = folder
            kinks = local_kinks(z, whitening, problem.dtype, activation, counter, **made)
        pairs = 2 * n * n * d if kinks.near is None else 0
        with stages.stage("triangular certificate", pairs) as stage:
            proof = certify_triangular(
                z,
                error,
                kinks.weight,
                kinks.bias,
                kinks.order,
                activation,
                near=kinks.near,
                advance=_counter(stage, 2 * n * d),
                names=problem.data.names,
            )
        constants |= {
            "inverse_norm": proof.inverse_norm,
            "comparison_norm": proof.comparison_norm,
            "distance": proof.distance,
            "preactivation": proof.preactivation,
            "evaluation": proof.evaluation,
            "rest": proof.rest,
            "entries_below_diagonal": proof.entries,
            "smallest_gap": float(kinks.gaps[1:].min()) if n > 1 else None,
        }
        if proof.proved:
            _load_witness(problem, kinks.weight, kinks.bias)
            return evidence.but(
                status="proved",
                factorization="triangular",
                sigma_min_lower=proof.sigma_min_lower,
                logabsdet_lower=_finite(proof.logdet_lower),
                margin=below(below(1 / proof.inverse_norm) / proof.distance),
                feature_error=proof.preactivation,
                witness=dict(problem.changes),
                triangle=(kinks.order, proof.lower),
            )
        reason = f"triangular: {proof.reason}"
        if proof.offending is not None:
            groups = find_culprits(z, error, names=problem.data.names)
            evidence = evidence.but(
                culprits=[sorted(c.samples) for c in groups] or [sorted(proof.offending)],
                explanation=describe(groups),
            )
    # of few channels: a larger backbone before a dense factorization
    if factorization == "triangular" or (factorization == "auto" and problem.thin and reason):
        reason = reason or f"triangular: one neuron a sample needs m_H >= n, got {m} < {n}"
        return evidence.but(reason=reason)
    generator = torch.Generator().manual_seed(seed)
    weight, bias = spread_kinks(whitening, m, problem.dtype, generator)
    source = WideSource(z, weight, bias, activation, problem.ones)
    dense = certify_matrix(
        source,
        preactivation_error(z, error, weight, bias),
        factorization=factorization,
        folder=folder,
        stages=stages,
        constants=constants,
        assumptions=assumptions,
        names=problem.data.names,
    )
    if dense.status == "proved":
        _load_witness(problem, weight, bias)
        # what stood in the triangular certificate's way is settled
        return dense.but(claim="exists", witness=dict(problem.changes))
    return dense.but(
        claim="exists",
        reason="; ".join(part for part in (reason, dense.reason) if part),
        culprits=evidence.culprits or dense.culprits,
        explanation=evidence.explanation or dense.explanation,
    )


def certify_given(
    problem: Problem, *, factorization: str, folder: Path | None, stages: Stages
) -> Evidence:
    """What is found of the weights that the problem holds (w = "current" or "init")."""
    constants: dict[str, Any] = {}
    if problem.wide is not None:
        with stages.stage("backbone features", problem.n, "samples") as stage:
            found = problem.features(problem.wide, stage, folder=folder)
        weight = problem.wide.weight.detach()
        own = problem.wide.bias
        bias = weight.new_zeros(len(weight)) if own is None else own.detach()
        source: Source = WideSource(found.z, weight, bias, problem.one_sided, problem.ones)
        spread = preactivation_error(found.z, found.error, weight, bias)
    else:
        with stages.stage("features", problem.n, "samples") as stage:
            found = problem.features(problem.last, stage, folder=folder)
        h = found.z
        ones = h.new_ones(problem.n, int(problem.ones))
        source = MatrixSource(torch.cat([h, ones], 1))
        spread = frobenius_upper(found.error)
    constants["largest_feature_error"] = float(found.error.max())
    return certify_matrix(
        source,
        spread,
        factorization=factorization,
        folder=folder,
        stages=stages,
        constants=constants,
        assumptions=found.assumptions,
        names=problem.data.names,
    )


def certify_matrix(
    source: Source,
    spread: float | None,
    *,
    factorization: str,
    folder: Path | None,
    stages: Stages,
    constants: dict[str, Any],
    assumptions: list[str],
    gram: GramCertificate | None = None,
    names: Tensor | None = None,
) -> Evidence:
    """What is found of M from a source: Gram + Cholesky, preconditioned where that is too weak.

    gram: what was proved of M elsewhere, such as over MPI ranks (`certify_distributed`).
    spread: upper bound of the stored features' error before softplus is evaluated (in the Frobenius
    norm), None where there is none: then no promotion, and "full rank" at best. names: as of
    `find_culprits`.
    """
    n, columns = source.n, source.columns
    sigma, used, lower, estimate, size = 0.0, "", None, None, None
    assumptions, tried = list(assumptions), []
    if factorization in ("auto", "gram"):
        # softplus features of one layer have rows of about one size
        scale = None if isinstance(source, MatrixSource) else False
        try:
            if gram is None:
                # the matrix itself says whose the tiles in a folder are, whatever made it
                key = "" if folder is None else source.content()
                gram = certify_gram(
                    source, folder=folder, key=key, resume="own", scale_rows=scale, stages=stages
                )
        except Exception as failed:
            tried.append(f"gram: {failure(failed, folder)}")
        else:
            assumptions += [a for a in gram.assumptions if a not in assumptions]
            constants |= {"gram": gram.constants()}
            sigma, used = gram.sigma_min_lower, "gram"
            lower, estimate = gram.logdet_lower, gram.logdet_estimate
            size = math.sqrt(gram.trace) if math.isfinite(gram.trace) else None
            tried.append(f"gram: {gram.reason or _stored(sigma)}")
    error = _feature_error(source, spread, size)
    enough = sigma > (0.0 if error is None else error)
    bytes_needed = PRECONDITIONED_COPIES * 8 * n * columns
    affordable = bytes_needed <= available_memory(source.device) and n <= PRECONDITIONED_ROWS
    if factorization == "preconditioned" or (factorization == "auto" and not enough and affordable):
        try:
            with stages.stage("preconditioned certificate", 6 * n * n * columns):
                matrix = _whole(source)
                better = preconditioned_sigma_min(matrix)
                error = _feature_error(source, spread, frobenius_upper(matrix))
        except Exception as failed:
            tried.append(f"preconditioned: {failure(failed, folder)}")
        else:
            tried.append(f"preconditioned: {_stored(better)}")
            if better > sigma:
                sigma, used, lower = better, "preconditioned", None
    elif factorization == "auto" and not enough:
        size_needed = f"{bytes_needed / 2**30:.3g} GiB"
        tried.append(f"preconditioned: not tried for n = {n}, which takes {size_needed} in memory")
    found = Evidence(
        method="certificate",
        claim="at w",
        factorization=used,
        assumptions=assumptions,
        constants=constants | {"sigma_min_lower_stored": sigma},
        logabsdet=estimate,
        feature_error=error,
    )
    exact = 0.0 if error is None else minus(sigma, error)
    margin = 0.0 if not exact > 0 else below(sigma / error) if error else math.inf
    if margin > 1:
        if lower is not None:
            # On the row space of the stored M, exact = (I + X) stored, ||X||_F <= error / sigma;
            # what lies outside adds to det(M M^T). Then as in triangular.py.
            e = 0.0 if not error else error / sigma * SLACK
            found = found.but(logabsdet_lower=_finite(promoted_log_det(lower, n, e)))
        return found.but(status="proved", sigma_min_lower=exact, margin=margin)
    if sigma > 0:
        why = (
            "no error bound of the features" if error is None else f"their error bound {error:.1e}"
        )
        return found.but(
            status="full rank",
            reason=f"the stored features have sigma_min >= {bound_text(sigma)} (certified), "
            f"which {why} does not let carry over to the exact function",
        )
    groups = _dependent_rows(source, names)
    return found.but(
        reason="; ".join(tried),
        culprits=[c.samples for c in groups],
        explanation=describe(groups),
    )


def _stored(sigma: float) -> str:
    """What a factorization found about the stored matrix."""
    if sigma > 0:
        return f"sigma_min >= {bound_text(sigma)} of the stored matrix"
    return "sigma_min is below what rounding lets the certificate see"


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None


def _dependent_rows(source: Source, names: Tensor | None) -> list[Culprit]:
    """The rows of M that depend on others; none where M is not finite or too large."""
    try:
        rows = torch.arange(source.n)
        return find_culprits(rows, None, lambda: _whole(source), names=names)
    except (ValueError, MemoryError, RuntimeError):
        return []  # a diagnosis that fails takes no verdict with it


def _whole(source: Source) -> Tensor:
    columns = range(0, source.columns, PANEL)
    return torch.cat([source.panel(c, min(c + PANEL, source.columns)) for c in columns], 1)


def _feature_error(source: Source, spread: float | None, size: float | None) -> float | None:
    """||dH||_F: slope spread + u (of_value ||h||_F + of_input ||a||_F + constant sqrt(n m))."""
    if spread is None or size is None or isinstance(source, MatrixSource):
        return spread
    n, weight, activation = source.n, source.weight, source.activation
    at = frobenius_upper(weight) * frobenius_upper(source.z)
    at += math.sqrt(n) * frobenius_upper(source.bias)
    evaluation = activation.evaluation_error(size, at * SLACK, n * len(weight))
    return (activation.slope * spread + evaluation) * SLACK + UNDERFLOW


def _load_witness(problem: Problem, weight: Tensor, bias: Tensor) -> None:
    """The wide layer's rows of the witness; neurons beyond them keep their weights."""
    name, own = problem.wide_name, problem.source.state_dict()
    changed = {}
    for part, rows in (("weight", weight), ("bias", bias)):
        whole = own[f"{name}.{part}"].detach().clone()
        whole[: len(rows)] = rows.to(whole.dtype)  # exact: they were made for it
        changed[f"{name}.{part}"] = whole
    problem.load(changed)


def _counter(stage: Any, flops: int) -> Any:
    return lambda count: stage.advance(count * flops)
