"""Which real numbers are known to be > 0, or >= 0, for all weights: where roots are analytic.

Followed through the operators of a run, by storage. x^2 >= 0 and exp(x) > 0; sums, means, products
and quotients of such numbers are again, and a number >= 0 plus one > 0 is > 0: the mean of squares
and an eps of an RMS norm.
"""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .operators import Call

ANY, LEAST, ABOVE = 0, 1, 2  # nothing known; >= 0; > 0
_ABOVE = {"exp", "exp2", "sigmoid", "softplus", "softmax", "safe_softmax", "cosh"}
# of numbers of a sign: numbers of that sign
_KEPT = {
    *("mean", "sum", "amax", "amin", "cumsum", "clone", "to_copy", "copy", "sqrt", "rsqrt"),
    *("reciprocal", "expand", "repeat", "cat", "stack", "index_select", "gather", "view", "alias"),
}


class Signs:
    """What is known of each storage that an operator made."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._known: dict[StorageWeakRef, int] = {}

    def of(self, value: Any, call: Call) -> int:
        """Of a number or tensor that the call is given."""
        if isinstance(value, bool | int | float):
            return ABOVE if value > 0 else LEAST if value == 0 else ANY
        if not isinstance(value, Tensor):
            return ANY
        known = self._known.get(StorageWeakRef(value.untyped_storage()), ANY)
        if known != ANY or call.depends(value) or value.is_complex() or not value.numel():
            return known
        least = float(value.min())
        return ABOVE if least > 0 else LEAST if least == 0 else ANY

    def note(self, call: Call, made: list[Tensor]) -> None:
        """What the call made; storages that it wrote into are of any sign."""
        sign = self._sign(call)
        for tensor in made:
            key = StorageWeakRef(tensor.untyped_storage())
            if call.operator.is_view:
                continue  # the storage's own
            if sign == ANY or not tensor.is_floating_point():
                self._known.pop(key, None)
            else:  # exp of a mask, of -inf, is 0
                whole = sign == ABOVE and not bool((tensor > 0).all())
                self._known[key] = LEAST if whole else sign

    def _sign(self, call: Call) -> int:
        name = call.name
        if any(a.alias_info is not None and a.alias_info.is_write for a in _arguments(call)):
            return ANY  # a part of a storage, it may be
        if name in _ABOVE:
            return ABOVE
        first = call.argument("self")
        if name in _KEPT:
            parts = call.argument("tensors") if first is None else [first]
            return min((self.of(part, call) for part in parts or []), default=ANY)
        if name == "pow":
            exponent = call.argument("exponent")
            even = isinstance(exponent, int | float) and float(exponent) % 2 == 0
            return LEAST if even and exponent > 0 else self.of(first, call)
        other = call.argument("other")
        if name == "add":
            if call.argument("alpha") != 1:
                return ANY
            signs = self.of(first, call), self.of(other, call)
            return max(signs) if min(signs) >= LEAST else ANY
        if name in ("mul", "div", "true_divide"):
            if name == "mul" and _same(first, other):
                return LEAST
            return min(self.of(first, call), self.of(other, call))
        return LEAST if name == "var" else ANY


def _arguments(call: Call) -> Any:
    return call.operator._schema.arguments


def _same(a: Any, b: Any) -> bool:
    """Whether both are the same numbers."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.layout == torch.strided == b.layout
    )
