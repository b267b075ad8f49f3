"""What a verification found, in words and as data."""

import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints

from ..core.notebook import folded, paragraph
from ..linalg.bounds import bound_text
from . import certificate_file
from .evidence import Evidence

STATUSES = ("proved", "full rank", "deficient", "undecided")
# What makes equal inputs equal rows of h_X, for every w.
EQUAL_INPUTS = (
    "the network is a deterministic function of each sample alone, whatever its place in the batch",
    "inputs are equal as stored numbers: their comparison flushes none to zero",
)


@dataclass(kw_only=True)
class Outcome(Evidence):
    """What a verification found: its method's evidence, and what it was asked, of what, at which
    cost. `Verdict` (verdict.py) says what each field means.
    """

    n: int
    distinct: int = 0
    repeated: list[list[int]] = field(default_factory=list)
    disagreeing: int | None = None
    width: int
    batch_norm: str = "frozen"
    seconds: float = 0.0
    peak_bytes: int = 0
    bias: bool = True
    w: str = "current"
    seed: int = 0
    last_layer: str = ""
    asked: str = "auto"
    stages: list[dict[str, Any]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    version: int = certificate_file.VERSION

    def __post_init__(self) -> None:
        """N = n where no other number is given."""
        if self.distinct == 0:
            self.distinct = self.n

    @property
    def summary(self) -> str:
        """The status and of which weights, in a few words."""
        assumption = "Assumption 1" if self.distinct == self.n else "Assumption 1'"
        where = "at these weights" if self.claim == "at w" else f"for some weights ({assumption})"
        if self.status == "deficient":
            where = "for all weights (proved)"
        elif self.status == "full rank":
            where += " (counted numerically, not proved)"
        return f"{self.status} {where}"

    def _repr_html_(self) -> str:
        """For a notebook: the first line, everything else folded behind it."""
        first, _, rest = str(self).partition("\n")
        return paragraph(first) + folded("Evidence", textwrap.dedent(rest))

    def __str__(self) -> str:
        """An explanation for a person."""
        same = self.distinct == self.n
        inputs = "X" if same else "X'"
        matrix = f"[h_{inputs}, 1]" if self.bias else f"h_{inputs}"
        rank = f"n = {self.n}" if same else f"N = {self.distinct} distinct inputs of n = {self.n}"
        lines = [
            f"expressivity condition, rank {matrix} = {rank} (m_H = {self.width}): {self.summary}"
        ]
        if self.repeated:
            groups = len(self.repeated)
            line = f"  {groups} {'group' if groups == 1 else 'groups'} of repeated inputs"
            if self.disagreeing is not None:
                line += f", {self.disagreeing} with targets that disagree"
            lines += [line, *(f"  {text}" for text in named(self.repeated, "have equal inputs"))]
        if self.reason:
            lines.append(f"  {self.reason}")
        if self.sigma_min_lower is not None:
            at = f" at w = {self.w}" if self.w != "current" else ""
            lines.append(
                f"  proved{at}: smallest singular value >= {bound_text(self.sigma_min_lower)}"
            )
        if self.logabsdet_lower is not None:
            lower = bound_text(self.logabsdet_lower, 6)
            lines.append(f"  proved: log det of the Gram matrix >= {lower}")
        if self.margin is not None and self.status == "proved":
            lines.append(f"  {self.margin:.3g} times what rounding and all other errors can do")
        if self.rank is not None:
            shown = (
                "" if self.sigma_min is None else f", smallest singular value {self.sigma_min:.3e}"
            )
            shown += "" if self.condition is None else f", condition {self.condition:.1e}"
            lines.append(f"  rank {self.rank} of {self.distinct} counted in {self.dtype}{shown}")
        if self.logabsdet is not None:
            lines.append(f"  log det of the Gram matrix: {self.logabsdet:.6g} (estimate)")
        lines += [f"  {line}" for line in self.explanation]
        if self.assumptions:
            lines.append(f"  assumed: {'; '.join(self.assumptions)}")
        how = self.method + (f" ({self.factorization})" if self.factorization else "")
        lines.append(f"  method {how}, {self.seconds:.1f} s")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without the witness."""
        large = ("witness", "triangle")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in large}

    def save(self, path: str | Path) -> None:
        """Write the certificate file (JSON, docs/certificate.md)."""
        certificate_file.write(Path(path), self.as_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; ValueError where it is not a verdict or has been changed."""
        data = certificate_file.read(Path(path))
        known = {f.name for f in fields(cls)}
        if data.get("status") not in STATUSES or not data.keys() <= known:
            raise ValueError(f"path: {path} is not a verdict file")
        try:
            verdict = cls(**data)
        except TypeError as error:
            raise ValueError(f"path: {path} is not a verdict file: {error}") from error
        if wrong := verdict.wrong_type():
            raise ValueError(f"path: {path} is not a verdict file: {wrong}")
        return verdict

    def wrong_type(self) -> str:
        """The first field whose value is of another type than declared; "" for none."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _is(value, kind):
                return f"{name} is of type {type(value).__name__}, expected {_name(kind)}"
        return ""


def named(groups: list[list[int]], what: str) -> list[str]:
    """A line for each of the first groups of samples."""
    lines = [f"samples {', '.join(map(str, group[:8]))} {what}" for group in groups[:5]]
    return lines + ([f"... and {len(groups) - 5} more such groups"] if len(groups) > 5 else [])


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as dataclasses declare it; an int is a float, a bool neither."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is list:
        return isinstance(value, list) and all(_is(v, parts[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is(k, parts[0]) and _is(v, parts[1]) for k, v in value.items()
        )
    if parts:
        return any(_is(value, part) for part in parts)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
