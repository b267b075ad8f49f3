"""The methods of `verify_expressivity`: separation, certificate, singular values, and what is tried
where none is named.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.malloc import pages_kept
from ..core.memory import available_memory, float64_rate
from ..linalg.bounds import below
from ..linalg.gram_tiles import MatrixSource
from ..linalg.progress import Stage, Stages
from .agreement import Reference, Stored, require_agreement, require_free_wide_layer
from .attempts import kept, reasons, require_memory
from .backbone import choose_backbone
from .bounded import Disagrees, Unbounded
from .certify import (
    PRECONDITIONED_COPIES,
    PRECONDITIONED_ROWS,
    certify_given,
    certify_matrix,
    certify_witness,
)
from .culprits import describe, find_culprits
from .evidence import Evidence
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
    """The methods, each with what it came to."""

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
    def separation(self) -> Evidence:
        """Distinct backbone features: some weights of the wide layer have rank n."""
        if constraint := self.problem.constraint(witness=False):
            reason = f"separation needs free weights: {constraint}"
            return Evidence(method="separation", reason=reason)
        with self.problem.restored():  # "auto" goes on with the weights asked for
            return self._enlarged(self._separation)

    def _enlarged(self, prove: Callable[[], Evidence]) -> Evidence:
        """`prove`, again with all channels where a backbone of few does not do."""
        back = self.problem.kept()
        found = prove()
        if found.status == "proved" or not self.problem.thin:
            return found
        self.stages.say(f"few channels do not do ({found.reason}): all of them")
        back()
        self.problem.all_channels = True
        return prove()

    def _separation(self) -> Evidence:
        problem = self.problem
        try:
            wide = problem.analytic_linear
            with self.stages.stage("choice of a backbone", 0, "samples") as stage:
                chosen = choose_backbone(problem, stage, wide, apart=True)
            with self.stages.stage("backbone features", problem.n, "samples") as stage:
                features = problem.features(wide, stage, folder=self.folder)
        except Unbounded as error:
            return Evidence(method="separation", reason=f"no error bound: {error}")
        with self.stages.stage("separation", 2 * features.z.numel()):
            separation = separate(features.z, features.error, seed=self.seed)
        found = Evidence(
            method="separation",
            margin=below(1 + separation.margin),  # distance over errors
            feature_error=float(features.error.max()),
            assumptions=features.assumptions,
            constants={"backbone": chosen},
        )
        if separation.proved:
            with self._compared(3) as stage:
                require_free_wide_layer(problem, stage)
            return found.but(status="proved", witness=dict(problem.changes))
        names = problem.data.names
        groups = find_culprits(features.z, features.error, names=names)
        closest = [(*names[[i, j]].tolist(), *far) for i, j, *far in separation.closest]
        return found.but(
            reason="these backbone features are not apart beyond their error bounds",
            culprits=[sorted(c.samples) for c in groups] or [sorted(pair[:2]) for pair in closest],
            explanation=describe(groups)
            or [
                f"samples {i} and {j}: distance {distance:.2e}, needed {needed:.2e}"
                for i, j, distance, needed in closest[:5]
            ],
        )

    @contextmanager
    def _compared(self, passes: int) -> Iterator[Stage]:
        """The stage in which the model itself is run beside what was bounded.

        passes: over all samples; where some are run, the copy in float64 has half as many.
        """
        compared = self.problem.compared
        some = passes if compared == self.problem.data.n else 1.5
        what, count = "passes of the model itself", int(some * compared)
        with pages_kept(), self.stages.stage(what, count, "samples") as stage:
            yield stage

    @kept
    def certificate(self) -> Evidence:
        """A lower bound of sigma_min."""
        arguments: dict[str, Any] = {
            "factorization": self.factorization,
            "folder": self.folder,
            "stages": self.stages,
        }
        problem = self.problem
        if self.factorization == "gram" or (self.w != "witness" and self.factorization == "auto"):
            # before the features are paid for
            device = problem.inputs[0].device
            plan = require_memory("certificate", problem.n, problem.columns, device, self.folder)
            if plan:
                self.stages.announce(str(plan), "after the features: ")
        try:
            if self.w == "witness":
                if constraint := problem.constraint(witness=True):
                    reason = f"a witness needs free weights: {constraint}"
                    return Evidence(method="certificate", reason=reason)
                found = self._enlarged(
                    lambda: certify_witness(problem, seed=self.seed, **arguments)
                )
            else:
                found = certify_given(problem, **arguments)
            if found.status == "full rank" and problem.narrowed:
                rounded = f"the model computes in less than float64 ({problem.narrowed}), whose "
                rounded += "rounding fills up the rank of stored features"
                found = found.but(status="undecided", reason=f"{found.reason}; {rounded}")
            if found.status != "undecided":
                with self._compared(2) as stage:
                    wide = problem.analytic if self.w == "witness" else problem.wide
                    require_agreement(problem, Reference(problem, wide), stage)
            if self.w == "witness":
                return found
        except Disagrees:
            raise
        except Unbounded as error:
            # any model at all: the stored matrix, without promotion to the function
            if problem.narrowed:
                raise Unbounded(
                    f"{error}; the model computes in less than float64 ({problem.narrowed}), whose "
                    "rounding fills up the rank of stored features"
                ) from error
            h = problem.plain_features()
            with self._compared(2) as stage:
                require_agreement(problem, Stored(h, problem.eps), stage)
            matrix = torch.cat([h, h.new_ones(len(h), int(problem.ones))], 1)
            found = certify_matrix(
                MatrixSource(matrix),
                None,
                constants={"unbounded": str(error)},
                assumptions=[],
                names=problem.data.names,
                **arguments,
            )
        claim = "exists" if self.w == "init" else "at w"
        return found.but(claim=claim, witness=dict(problem.changes) or None)

    @kept
    def svd(self) -> Evidence:
        """Singular values in float64, counted by numpy's rule."""
        problem = self.problem
        require_memory("svd", problem.n, problem.columns, problem.inputs[0].device)
        h = problem.plain_features()
        matrix = torch.cat([h, h.new_ones(len(h), int(problem.ones))], 1)
        found = Evidence(method="svd", claim="exists" if self.w != "current" else "at w")
        if not bool(torch.isfinite(matrix).all()):
            return found.but(reason="svd: the features hold NaN or infinity")
        with self._compared(2) as stage:
            require_agreement(problem, Stored(h, problem.eps), stage)
        with self.stages.stage("svd", SVD_FLOPS * problem.n**2 * problem.columns):
            sigma = torch.linalg.svdvals(matrix)
        # numpy's rule, with the precision that the numbers passed through
        tolerance = float(sigma[0]) * problem.columns * problem.eps
        if problem.narrowed:
            found = found.but(dtype=f"float64, but for {problem.narrowed} within the model")
        rank, smallest = int((sigma > tolerance).sum()), float(sigma[-1])
        found = found.but(
            rank=rank,
            logabsdet=2 * float(sigma.log().sum()),
            sigma_min=smallest,
            condition=float(sigma[0]) / smallest if smallest > 0 else None,
        )
        if rank == problem.n:
            return found.but(status="full rank")
        groups = find_culprits(matrix, None, matrix, names=problem.data.names)
        return found.but(
            reason="numerically low rank, which is no proof of a low one",
            culprits=[c.samples for c in groups],
            explanation=describe(groups),
        )

    def auto(self) -> Evidence:
        """By cost, as far as memory and time allow: separation, certificates, singular values."""
        n, columns = self.problem.n, self.problem.columns
        if self.w == "witness":
            return self._witness()
        found = self.separation()
        if self.training and found.status == "proved" and n * n * columns > AUTO_TRAINING:
            return found
        at_w: Evidence | None = None
        certified: Evidence | None = None
        left = ""
        for method, flops, size in self._costs():
            proved = certified is not None and certified.status == "proved"
            if method != "svd" and (proved or (at_w is not None and at_w.rank not in (None, n))):
                continue
            allowed, plan = self._affordable(method, flops, size)
            self.stages.say(f"{plan}{'' if allowed else ': left out'}")
            if method == "svd":
                at_w = self.svd() if allowed else None
                left = f"not computed: {plan}; pass method='svd' to compute it all the same"
            elif allowed:
                certified = _better(certified, self._by(method))
        if certified is not None and certified.status == "proved":
            return _with_estimates(certified, at_w)
        if found.status == "proved":
            reason = "" if at_w else f"at these weights {left}"
            return _with_estimates(found, at_w).but(reason=reason)
        if at_w is None:
            return found.but(reason=reasons(found, certified, left))
        return at_w.but(
            culprits=at_w.culprits or found.culprits,
            explanation=at_w.explanation or found.explanation,
            reason=reasons(at_w, found, certified),
        )

    def _by(self, factorization: str) -> Evidence:
        """The certificate by one factorization."""
        own, self.factorization = self.factorization, factorization
        try:
            return self.certificate()
        finally:
            self.factorization = own

    def _costs(self) -> list[tuple[str, float, float]]:
        """(what, operations, bytes) of what says more about given weights, the cheapest first.

        Factorizations of the certificate, and "svd".
        """
        n, columns = self.problem.n, self.problem.columns
        gram = n * n * (columns + n / 3), 8.0 * n * (n + 2 * min(columns, 2048))
        more = 6.0 * n * n * columns, 8.0 * PRECONDITIONED_COPIES * n * columns
        known = [("gram", *gram), ("preconditioned", *more)]
        wanted = [cost for cost in known if self.factorization in ("auto", cost[0])]
        if n > PRECONDITIONED_ROWS and self.factorization == "auto":
            wanted = wanted[:1]
        svd = ("svd", SVD_FLOPS * n * n * columns, 3 * 8.0 * n * columns)
        return sorted([*wanted, svd], key=lambda cost: cost[1])

    def _witness(self) -> Evidence:
        n, wide = self.problem.n, self.problem.analytic
        allowed, plan = True, ""
        if wide is not None:
            d = wide.in_features  # half of the pairs, in float32
            allowed, plan = self._affordable("certificate", n * n * d / 2, 8 * n * (5 * d + 512))
            self.stages.say(plan)
        with self.problem.restored():
            found = self.certificate() if allowed else Evidence(method="certificate", reason=plan)
        if found.status == "proved":
            return found
        other = self.separation()
        return other.but(reason="" if other.status == "proved" else reasons(found, other))

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


def _better(first: Evidence | None, second: Evidence) -> Evidence:
    """What says more, the first on a tie, with the reasons of both where nothing is proved."""
    if first is None or second.status == "proved":
        return second
    order = ("undecided", "full rank")
    better = max(first, second, key=lambda found: order.index(found.status))
    return better.but(reason=reasons(first, second))


def _with_estimates(proved: Evidence, at_w: Evidence | None) -> Evidence:
    """A proof beside what the singular values, where they were computed, say of these weights."""
    if at_w is None or at_w.rank is None:
        return proved
    return proved.but(
        rank=at_w.rank,
        sigma_min=at_w.sigma_min,
        condition=at_w.condition,
        logabsdet=at_w.logabsdet,  # the better estimate
        dtype=at_w.dtype,
    )
