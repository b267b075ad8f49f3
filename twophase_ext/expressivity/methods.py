"""The methods of `verify_expressivity`: separation, certificate, singular values, and what is tried
where none is named.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.memory import available_memory, float64_rate
from ..linalg.gram_tiles import MatrixSource
from ..linalg.progress import Stage, Stages
from .agreement import Reference, Stored, require_agreement, require_free_wide_layer
from .attempts import kept, reasons, require_memory
from .bounded import Disagrees
from .certify import certify_given, certify_matrix, certify_witness
from .culprits import describe, find_culprits
from .forward_error import Unbounded
from .problem import Problem
from .separation import separate

# Time of torch.linalg.svdvals on [h, 1] is about SVD_FLOPS * n^2 * p float64 operations.
SVD_FLOPS = 4.0
# What "auto" may take: little where it comes along with training, an hour where it is asked for.
AUTO_SECONDS = {"current": 60.0, "init": 3600.0, "witness": 3600.0}
AUTO_SHARE = 0.6  # of the memory available
# Within training a proof for some weights is enough: "auto" says more about these weights only
# where the matrix is small, n^2 p entries of work at most.
AUTO_TRAINING = 4e9


@dataclass
class Attempt:
    """The methods, each returning fields of a Verdict."""

    problem: Problem
    w: str
    seed: int
    factorization: str
    folder: Path | None
    stages: Stages
    training: bool

    def __post_init__(self) -> None:
        """Put the weights asked for into the copy."""
        if self.w == "init":
            self.problem.reinitialise(self.seed)

    @kept
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
            with self._compared(4) as stage:
                require_free_wide_layer(problem, stage)
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

    def _compared(self, passes: int) -> AbstractContextManager[Stage]:
        """The stage in which the model itself is run beside what was bounded."""
        count = passes * self.problem.compared
        return self.stages.stage(f"{passes} passes of the model itself", count, "samples")

    @kept
    def certificate(self) -> dict[str, Any]:
        """A lower bound of sigma_min."""
        arguments: dict[str, Any] = {
            "factorization": self.factorization,
            "folder": self.folder,
            "stages": self.stages,
        }
        fields: dict[str, Any] = {"method": "certificate"}
        problem = self.problem
        if self.factorization == "gram" or (self.w != "witness" and self.factorization == "auto"):
            # before the features are paid for
            device = problem.inputs[0].device
            require_memory("certificate", problem.n, problem.columns, device, self.folder)
        try:
            if self.w == "witness":
                if constraint := self.problem.constraint():
                    reason = f"a witness needs free weights: {constraint}"
                    return fields | {"status": "undecided", "claim": "exists", "reason": reason}
                found = certify_witness(problem, seed=self.seed, **arguments)
                if found["status"] != "undecided":
                    with self._compared(2) as stage:
                        require_agreement(problem, Reference(problem), stage)
                return fields | found
            found = certify_given(problem, **arguments)
            if found["status"] != "undecided":
                with self._compared(2) as stage:
                    require_agreement(problem, Reference(problem), stage)
        except Disagrees:
            raise
        except Unbounded as error:
            # any model at all: the stored matrix, without promotion to the function
            if problem.narrowed:
                raise Unbounded(
                    f"{error}; the model computes in less than float64 ({problem.narrowed}), whose "
                    "rounding fills up the rank of stored features"
                ) from error
            h = self.problem.plain_features()
            with self._compared(2) as stage:
                require_agreement(problem, Stored(h, problem.eps), stage)
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

    @kept
    def svd(self) -> dict[str, Any]:
        """Singular values in float64, counted by numpy's rule."""
        problem = self.problem
        require_memory("svd", problem.n, problem.columns, problem.inputs[0].device)
        h = problem.plain_features()
        matrix = torch.cat([h, h.new_ones(len(h), int(problem.ones))], 1)
        fields: dict[str, Any] = {
            "method": "svd",
            "claim": "exists" if self.w != "current" else "at w",
            "status": "undecided",
        }
        if not bool(torch.isfinite(matrix).all()):
            return fields | {"reason": "svd: the features hold NaN or infinity"}
        with self._compared(2) as stage:
            require_agreement(problem, Stored(h, problem.eps), stage)
        with self.stages.stage("svd", SVD_FLOPS * problem.n**2 * problem.columns):
            sigma = torch.linalg.svdvals(matrix)
        # numpy's rule, with the precision that the numbers passed through
        tolerance = float(sigma[0]) * problem.columns * problem.eps
        if problem.narrowed:
            fields["dtype"] = f"float64, but for {problem.narrowed} within the model"
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
        certified: dict[str, Any] = {}
        allowed, plan = self._affordable("svd", SVD_FLOPS * n * n * columns, 3 * 8 * n * columns)
        if allowed:
            at_w = self.svd()
        left = f"not computed: {plan}; pass method='svd' to compute it all the same"
        allowed, plan = self._affordable(
            "certificate", n * n * (columns + n / 3), 8 * n * (n + 2 * min(columns, 2048))
        )
        if allowed and at_w.get("rank", n) == n:
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
            return more | at_w | {"reason": reasons(at_w, found, certified)}
        reason = reasons(found, certified, left)
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
            found = self.certificate() if allowed else {"status": "undecided", "reason": plan}
        if found["status"] == "proved":
            return found
        other = self.separation()
        reason = "" if other["status"] == "proved" else reasons(found, other)
        return other | {"reason": reason}

    def _affordable(self, what: str, flops: float, size: float) -> tuple[bool, str]:
        """Whether "auto" may do it, and the plan in words."""
        device = self.problem.inputs[0].device
        seconds = flops / float64_rate(device)
        length = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        plan = (
            f"{what} of {self.problem.n} x {self.problem.columns} in float64: about {length} and "
            f"{size / 2**30:.2f} GiB, after the features"
        )
        fits = size <= AUTO_SHARE * available_memory(device)
        return fits and seconds <= AUTO_SECONDS[self.w], plan
