"""What is known of Theorem 3 about a run, as data and in words."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..linalg.bounds import bound_text


@dataclass
class LazyGuarantee:
    """What is known of Theorem 3 about a run: a premise audit, and bounds where they hold.

    premises: (name, status, evidence), status one of "proved", "numerical" (float64, no proof),
    "held", "not checked", "failed". checks: one dict a verification, in order: steps (t - tau),
    status, method, rank, sigma_min, sigma_min_lower, reason, and lemma7, a dict, or None where the
    rank was not shown, n is large or the loss is the user's own. stopped: why the run
    ended early, or None. bound: Theorem 3's upper bound of min_k L(w^k) - L(w*) over the steps
    made, evaluated in float64; it rests on the L given and on ranks as proved or numerical as the
    premises say. None where a premise is missing.
    """

    premises: list[tuple[str, str, str]]
    checks: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    bound: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """The audit for a person."""
        lines = ["Theorem 3 (lazy second phase):"]
        lines += [f"  {name}: {status}; {evidence}" for name, status, evidence in self.premises]
        known = [check for check in self.checks if check["lemma7"]]
        if known:
            last = known[-1]["lemma7"]
            lines.append(
                f"  Lemma 7 after {known[-1]['steps']} steps, v = {last['comparator']}: "
                f"L(w) = {last['loss']:.4e} <= L_w(v) + |v - w| |grad L| = "
                f"{last['comparator_loss']:.4e} + {last['distance']:.4e} * "
                f"{last['gradient_norm']:.4e} = {last['bound']:.4e} (float64)"
            )
        if self.bound is not None:
            statuses = [status for _, status, _ in self.premises]
            label = "numerical" if "numerical" in statuses else "proved"
            bound = bound_text(self.bound, 5, upper=True)
            lines.append(f"  min_k L(w^k) - L(w*) <= {bound} for the L given, ranks {label}")
        else:
            lines.append("  no rate is claimed")
        if self.stopped:
            lines.append(f"  stopped: {self.stopped}")
        return "\n".join(lines)
