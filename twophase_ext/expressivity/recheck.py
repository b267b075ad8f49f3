"""A verdict proved again: every field that a reader would believe, against what is proved now."""

import math
import re
from pathlib import Path
from typing import Any

from torch import nn

from ..linalg.bounds import bound_text
from .attempts import failure
from .certificate_file import VERSION
from .outcome import Outcome
from .verify import FACTORIZATIONS, METHODS, hashes_of, verify_model

# Of the machine and of the run; `witness` and `triangle` are not in a file and are made again.
# `disagreeing` counts targets, which a recheck is not given.
NOT_COMPARED = (
    *("seconds", "peak_bytes", "stages", "environment", "source", "witness", "triangle"),
    "disagreeing",
)
# Of the triangular certificate: those of version 1 were weaker, some under other names.
TRIANGULAR = {
    *("inverse_norm", "comparison_norm", "distance", "preactivation", "evaluation", "rest"),
    *("entries_below_diagonal", "smallest_gap"),
}
# Entries of constants["gram"] that memory and rounding choose; they change no bound's meaning.
SCHEDULE = ("storage", "tile", "panel", "passes", "attempts", "failed_pivot", "lambda_estimates")
EQUAL = (
    *("status", "claim", "method", "factorization", "n", "distinct", "width", "bias"),
    *("batch_norm", "dtype", "w", "seed", "last_layer", "version"),
)
# A shift is an estimate, half of lambda_min as a rule and never as much: a thousandth of the bound
# stays below the truth. Other bounds may be as tight as rounding allows.
SHARE = {"gram": 1e-3}
DEFAULT_SHARE = 1e-6
OF_ERROR = 0.01  # another processor's features differ by far less than their error bound
NUMBERS = 1e-2  # relative, of constants and of numbers in texts
ESTIMATES = 1e-3
NOT_COMPUTED = re.compile(
    r"at these weights not computed: svd of (\d+) x (\d+) in float64: about \d+ (?:s|min) and "
    r"\d+\.\d\d GiB, after the features; pass method='svd' to compute it all the same"
)
NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


def recheck(
    verdict: Outcome, model: nn.Module, x: Any, folder: str | Path | None, rows: Any = None
) -> tuple[bool, str]:
    """Whether the verdict holds for model and data, and what was found, for a person."""
    try:
        if verdict.status not in ("proved", "deficient"):
            return False, (
                f"the status {verdict.status!r} claims nothing that could be proved again"
            )
        if wrong := verdict.wrong_type():
            return False, wrong
        if not 1 <= verdict.version <= VERSION:
            return False, f"version: {verdict.version} is no version of a verdict"
        reason, again = _compare(verdict, model, x, folder, rows)
    except Exception as error:  # the model may do anything, and so may who wrote the fields
        return False, f"it cannot be proved again: {failure(error)}"
    if reason or again is None:
        return False, reason
    return True, _proved_now(again)


def _compare(
    verdict: Outcome, model: nn.Module, x: Any, folder: str | Path | None, rows: Any
) -> tuple[str, Outcome | None]:
    """(why it does not hold or "", what was proved now)."""
    last_layer = verdict.last_layer or None
    now = hashes_of(model, x, last_layer)
    for what, name in (("data", "the data are"), ("model", "the model is")):
        if verdict.hashes.get(what) != now[what]:
            return f"{name} not the one of the certificate (SHA-256 differs)", None
    if verdict.hashes != now:
        return _differ("hashes", verdict.hashes, now), None
    arguments: dict[str, Any] = {
        "w": verdict.w,
        "last_layer": last_layer,
        "seed": verdict.seed,
        "folder": folder,
        "rows": rows,
        "version": verdict.version,
    }
    # what makes a verdict deficient is looked for first, whatever the method
    method = verdict.method if verdict.status == "proved" else "separation"
    again = verify_model(
        model, x, method=method, factorization=_factorization(verdict), **arguments
    )
    for name in EQUAL:
        written, proved = getattr(verdict, name), getattr(again, name)
        if type(written) is not type(proved) or written != proved:
            because = f" ({again.reason})" if name == "status" and again.reason else ""
            return _differ(name, written, proved) + because, again
    if verdict.asked not in METHODS or (
        verdict.status == "proved" and verdict.asked not in ("auto", verdict.method)
    ):
        return f"asked: {verdict.asked!r} is no method that ends in {verdict.method!r}", again
    counted = again
    if verdict.w != "witness" and any(
        getattr(verdict, name) is not None for name in ("rank", "sigma_min", "condition")
    ):
        counted = verify_model(model, x, method="svd", **arguments)
    reason = _bounds(verdict, again) or _estimates(verdict, counted) or _texts(verdict, again)
    return reason, again


def _factorization(verdict: Outcome) -> str:
    """The one asked for: "auto" where the file tells of an attempt before the one that proved."""
    used, constants = verdict.factorization, verdict.constants
    before = {"gram": ("inverse_norm",), "preconditioned": ("inverse_norm", "gram")}.get(used, ())
    if used not in FACTORIZATIONS or any(name in constants for name in before):
        return "auto"
    return used


def _differ(name: str, written: Any, proved: Any) -> str:
    return f"{name}: {written!r} is written, {proved!r} is proved now"


def _bounds(verdict: Outcome, again: Outcome) -> str:
    """Proved bounds: the written one may be weaker, and higher by no more than rounding."""
    share = SHARE.get(again.factorization, DEFAULT_SHARE)
    error = again.feature_error or 0.0
    margin = again.margin or 0.0
    lost = 2 * math.sqrt(again.distinct) / (margin - 1) if margin > 1 else 0.0  # of log det
    slack = {
        "sigma_min_lower": share * abs(again.sigma_min_lower or 0.0) + OF_ERROR * error,
        "logabsdet_lower": share + 1e-9 * abs(again.logabsdet_lower or 0.0) + OF_ERROR * lost,
        "margin": 1e-3 * margin + 0.05 if margin < math.inf else 0.0,
    }
    for name, allowed in slack.items():
        written, proved = getattr(verdict, name), getattr(again, name)
        if written is not None and (proved is None or not written <= proved + allowed):
            return _differ(name, written, proved)
    old = verdict.version == 1
    weaker = old and (verdict.feature_error or 0.0) >= (again.feature_error or 0.0)
    if not weaker and not _close(verdict.feature_error, again.feature_error, ESTIMATES):
        return _differ("feature_error", verdict.feature_error, again.feature_error)
    skipped = TRIANGULAR if old else set()
    written, proved = (
        {k: v for k, v in outcome.constants.items() if k not in skipped}
        for outcome in (verdict, again)
    )
    return _constants(written, proved, share)


def _constants(written: Any, proved: Any, share: float, name: str = "constants") -> str:
    """Why the numbers of the proof are others; "" where they are the same but for rounding."""
    if isinstance(proved, dict):
        skipped = SCHEDULE if name == "constants.gram" else ()
        keys = [{k for k in part if k not in skipped} for part in (written, proved)]
        if not isinstance(written, dict) or keys[0] != keys[1]:
            return _differ(name, written, proved)
        parts = (_constants(written[k], proved[k], share, f"{name}.{k}") for k in sorted(keys[0]))
        return next((part for part in parts if part), "")
    if isinstance(proved, list | tuple):
        same = isinstance(written, list | tuple) and len(written) == len(proved)
        same = same and not any(
            _constants(a, b, share) for a, b in zip(written, proved, strict=True)
        )
        return "" if same else _differ(name, written, proved)
    if not _close(written, proved, NUMBERS):
        return _differ(name, written, proved)
    bound = "_lower" in name or name.endswith(".ell")
    if bound and isinstance(proved, int | float) and written > proved + 2 * share * abs(proved):
        return _differ(name, written, proved)
    return ""


def _estimates(verdict: Outcome, counted: Outcome) -> str:
    """Numbers counted in float64, recounted; rounding hides what is below max(n, p) u sigma_max."""
    if verdict.rank != counted.rank:
        return _differ("rank", verdict.rank, counted.rank)
    smallest, condition = counted.sigma_min, counted.condition
    hidden = 0.0  # of the smallest singular value, as a share of it
    if smallest is not None and condition is not None:
        hidden = (counted.width + 1) * 2.0**-52 * condition
    for name in ("sigma_min", "condition"):
        if not _close(getattr(verdict, name), getattr(counted, name), ESTIMATES + hidden):
            return _differ(name, getattr(verdict, name), getattr(counted, name))
    written, proved = verdict.logabsdet, counted.logabsdet
    allowed = ESTIMATES + 2 * counted.distinct * min(hidden, 1.0) / (1 + abs(proved or 0.0))
    return "" if _close(written, proved, allowed, 1.0) else _differ("logabsdet", written, proved)


def _texts(verdict: Outcome, again: Outcome) -> str:
    """What the verdict says in words, and the samples that it names."""
    planned = NOT_COMPUTED.fullmatch(verdict.reason)
    sizes = (str(again.distinct), str(again.width + again.bias))
    if verdict.reason != again.reason and not (planned and planned.groups() == sizes):
        return _differ("reason", verdict.reason, again.reason)
    if sorted(verdict.assumptions) != sorted(again.assumptions):
        return _differ("assumptions", verdict.assumptions, again.assumptions)
    for name in ("culprits", "repeated"):
        written, found = getattr(verdict, name), getattr(again, name)
        if sorted(map(sorted, written)) != sorted(map(sorted, found)):
            return _differ(name, written, found)
    same = len(verdict.explanation) == len(again.explanation)
    if not same or not all(map(_same_text, verdict.explanation, again.explanation)):
        return _differ("explanation", verdict.explanation, again.explanation)
    return ""


def _close(a: Any, b: Any, share: float, floor: float = 0.0) -> bool:
    """Equal, or both numbers that differ by `share` of max(floor, the greater one) at most."""
    if isinstance(a, bool) or isinstance(b, bool) or not all(_number(v) for v in (a, b)):
        return type(a) is type(b) and bool(a == b)
    if a == b or (math.isnan(a) and math.isnan(b)):
        return True
    return bool(abs(a - b) <= share * max(floor, abs(a), abs(b)) < math.inf)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _same_text(a: str, b: str) -> bool:
    """The same words, and the same numbers but for rounding."""
    one, other = NUMBER.split(a), NUMBER.split(b)
    return len(one) == len(other) and all(
        _close(float(p), float(q), NUMBERS) if k % 2 else p == q
        for k, (p, q) in enumerate(zip(one, other, strict=True))
    )


def _proved_now(again: Outcome) -> str:
    """What the proof that was made now says; the bounds are its own."""
    said = []
    if again.sigma_min_lower is not None:
        said.append(f"smallest singular value >= {bound_text(again.sigma_min_lower)}")
    if again.logabsdet_lower is not None:
        said.append(f"log det of the Gram matrix >= {bound_text(again.logabsdet_lower, 6)}")
    if again.margin is not None:
        said.append(f"margin {again.margin:.3g}")
    proved = f"; proved now: {', '.join(said)}" if said else ""
    old = ", constants of the triangular certificate" if again.version == 1 else ""
    names = ", ".join(NOT_COMPARED)
    return f"{proved}; not compared: {names}, tiles and attempts in constants{old}"
