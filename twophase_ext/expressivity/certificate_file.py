"""The certificate file. docs/certificate.md describes the format."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from ..core.files import write_json

SCHEMA = "twophase-verdict/"
VERSION = 2
# Files of version 1 know no distinct inputs: their condition is rank n over all samples.
SINCE_2 = ("distinct", "repeated", "disagreeing")
# Numbers that JSON has no word for.
_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def write(path: Path, fields: dict[str, Any]) -> None:
    """Write the fields with the schema's name, of their version, and a checksum, atomically."""
    rest = {k: v for k, v in fields.items() if fields["version"] > 1 or k not in SINCE_2}
    body = {"schema": f"{SCHEMA}{rest.pop('version')}", **_plain(rest)}
    write_json(path, {**body, "checksum": _checksum(body)})


def read(path: Path) -> dict[str, Any]:
    """The fields, with their version; ValueError where it is no such file, or has been edited."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict):
            checksum = data.pop("checksum", None)
            intact = checksum == _checksum(data)
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise ValueError(f"path: {path} is not a verdict file: {error}") from error
    if not isinstance(data, dict) or not str(data.get("schema", "")).startswith("twophase-verdict"):
        raise ValueError(f"path: {path} is not a verdict file")
    schema = data.pop("schema")
    known = {f"{SCHEMA}{version}": version for version in range(1, VERSION + 1)}
    if schema not in known:
        raise ValueError(f"path: {path} has schema {schema!r}, expected one of {', '.join(known)}")
    if not intact:
        raise ValueError(f"path: {path} has been changed since it was written (checksum)")
    return {**_numbers(data), "version": known[schema]}


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"number"} and value["number"] in _WORDS:
            return _WORDS[value["number"]]
        return {k: _numbers(v) for k, v in value.items()}
    return [_numbers(v) for v in value] if isinstance(value, list) else value
