"""What a verification found, in words and as data."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_json

STATUSES = ("proved", "full rank", "deficient", "undecided")


@dataclass
class Verdict:
    """The outcome of `verify_expressivity`.

    status: "proved"; "full rank" (numerically: not a proof); "deficient" (proved: identical inputs,
    or n > m_H + 1); "undecided" (a numerically low rank, or no method that fits).
    claim: "exists" (some w has full rank: Assumption 1) or "at w" (this very w).
    rank is that of [h_X, 1] (n x (width + 1)) as the method counts it, None where it was not
    computed; logabsdet that of its Gram matrix; sigma_min its smallest singular value, estimated in
    float64. culprits: groups of sample indices that make the rank fall. dtype: the arithmetic used;
    batch_norm: the family of networks meant ("frozen": constant statistics). bias: whether the last
    layer has a trainable bias; without one there is no column of ones and the matrix is h_X alone.
    """

    status: str
    claim: str
    method: str
    n: int
    width: int
    rank: int | None = None
    logabsdet: float | None = None
    sigma_min: float | None = None
    condition: float | None = None
    batch_norm: str = "frozen"
    dtype: str = "float64"
    reason: str = ""
    culprits: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    bias: bool = True

    def __str__(self) -> str:
        """An explanation for a person."""
        where = "at these weights" if self.claim == "at w" else "for some weights"
        if self.status == "deficient":
            where = "for all weights (proved)"
        elif self.status == "full rank":
            where += " (counted numerically, not proved)"
        matrix = "[h_X, 1]" if self.bias else "h_X"
        lines = [
            f"expressivity condition, rank {matrix} = n = {self.n} (m_H = {self.width}): "
            f"{self.status} {where}"
        ]
        if self.reason:
            lines.append(f"  {self.reason}")
        if self.rank is not None:
            shown = (
                "" if self.sigma_min is None else f", smallest singular value {self.sigma_min:.3e}"
            )
            shown += "" if self.condition is None else f", condition {self.condition:.1e}"
            lines.append(f"  rank {self.rank} of {self.n} by {self.method} in {self.dtype}{shown}")
        if self.logabsdet is not None:
            lines.append(f"  log det of the Gram matrix: {self.logabsdet:.6g}")
        for group in self.culprits[:5]:
            lines.append(f"  samples {', '.join(map(str, group[:8]))} have identical inputs")
        if len(self.culprits) > 5:
            lines.append(f"  ... and {len(self.culprits) - 5} more such groups")
        lines.append(f"  method {self.method}, {self.seconds:.1f} s")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(Path(path), self.as_dict())

    @staticmethod
    def load(path: str | Path) -> "Verdict":
        """Read what `save` wrote; ValueError where it is not a verdict."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("status") not in STATUSES:
            raise ValueError(f"path: {path} is not a verdict file")
        return Verdict(**data)
