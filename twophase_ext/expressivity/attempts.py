"""What became of a method that raised: a reason, not the end of the run that asked for it."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Protocol


class _Attempt(Protocol):
    folder: Path | None


Fields = dict[str, Any]


def kept(method: Callable[[Any], Fields]) -> Callable[[Any], Fields]:
    """The method, but that an exception becomes an "undecided" with the reason."""

    @wraps(method)
    def run(self: _Attempt) -> Fields:
        try:
            return method(self)
        except Exception as error:
            reason = f"{method.__name__}: {failure(error, self.folder)}"
            name = method.__name__
            return {"status": "undecided", "claim": "exists", "method": name, "reason": reason}

    return run


def reasons(*parts: Fields | str) -> str:
    """What each attempt came to, without repetition."""
    said = [p if isinstance(p, str) else str(p.get("reason", "")) for p in parts]
    return "; ".join(dict.fromkeys(part for part in said if part))


def failure(error: Exception, folder: Path | None = None) -> str:
    """The error in a line of text; raised again where it is about the caller's folder."""
    if folder is not None and str(folder) in str(error):
        raise error
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
