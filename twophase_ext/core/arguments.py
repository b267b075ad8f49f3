"""Arguments, checked; the errors name them."""

from numbers import Integral
from typing import Any


def integer(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int, of at least `least`; TypeError or ValueError name the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)
