"""What became of a method that raised: a reason, not the end of the run that asked for it."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import torch

from ..core.memory import available_memory
from ..core.messages import first_line, type_and_line
from ..linalg.plan import plan
from .bounded import Unbounded
from .evidence import Evidence


class _Attempt(Protocol):
    folder: Path | None


def kept(method: Callable[[Any], Evidence]) -> Callable[[Any], Evidence]:
    """The method, but that an exception becomes an "undecided" with the reason."""

    @wraps(method)
    def run(self: _Attempt) -> Evidence:
        try:
            return method(self)
        except Exception as error:
            reason = f"{method.__name__}: {failure(error, self.folder)}"
            return Evidence(method=method.__name__, reason=reason)

    return run


def require_memory(
    method: str, n: int, columns: int, device: torch.device, folder: Path | None = None
) -> str:
    """The plan of method "svd" or the Gram "certificate", "" where there is none; MemoryError where
    M [n, columns] fits nowhere.
    """
    if n > columns:
        return ""  # deficient, without any matrix
    if method == "svd":
        needed, have = 3 * 8 * n * columns, available_memory(device)
        if needed > have:
            raise MemoryError(
                f"svd of {n} x {columns} in float64 takes {needed / 2**30:.3g} GiB, "
                f"{have / 2**30:.3g} GiB are available"
            )
    elif method == "certificate" and device.type == "cpu":  # CUDA has a way in place, too
        return str(plan(n, columns, folder=folder, device=device))
    return ""


def reasons(*parts: Evidence | str | None) -> str:
    """What each attempt came to, without repetition."""
    said = [p if isinstance(p, str) else p.reason for p in parts if p is not None]
    return "; ".join(dict.fromkeys(part for part in said if part))


def failure(error: Exception, folder: Path | None = None) -> str:
    """The error in a line of text; raised again where it is about the caller's folder."""
    if folder is not None and str(folder) in str(error):
        raise error
    return first_line(error) if isinstance(error, Unbounded) else type_and_line(error)
