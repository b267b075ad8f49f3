"""What a method of verification may say: the part of an Outcome that is its own."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from torch import Tensor


@dataclass(kw_only=True)
class Evidence:
    """What one method came to; each field means what `Verdict` says of the field of its name."""

    status: str = "undecided"
    claim: str = "exists"
    method: str
    factorization: str = ""
    rank: int | None = None
    logabsdet: float | None = None
    logabsdet_lower: float | None = None
    sigma_min: float | None = None
    sigma_min_lower: float | None = None
    margin: float | None = None
    feature_error: float | None = None
    condition: float | None = None
    dtype: str = "float64"
    reason: str = ""
    culprits: list[list[int]] = field(default_factory=list)
    explanation: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    witness: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)
    # (order, L) of a triangular witness: h of unit k at sample order[i] is L[i, k], a csr matrix
    triangle: tuple[Tensor, Any] | None = field(default=None, repr=False, compare=False)

    def but(self, **changes: Any) -> Self:
        """The same with these fields changed."""
        return replace(self, **changes)

    def as_fields(self) -> dict[str, Any]:
        """Field -> value, not copied."""
        return {own.name: getattr(self, own.name) for own in fields(self)}
