"""The certificate file. docs/certificate.md describes the format."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from ..core.files import write_json

SCHEMA = "twophase-verdict/1"
# Numbers that JSON has no word for.
_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def write(path: Path, fields: dict[str, Any]) -> None:
    """Write the fields with the schema's name and a checksum over both, atomically."""
    body = {"schema": SCHEMA, **_plain(fields)}
    write_json(path, {**body, "checksum": _checksum(body)})


def read(path: Path) -> dict[str, Any]:
    """The fields; ValueError with the reason where it is not such a file, or has been edited."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict):
            checksum = data.pop("checksum", None)
            intact = checksum == _checksum(data)
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise ValueError(f"path: {path} is not a verdict file: {error}") from error
    if not isinstance(data, dict) or not str(data.get("schema", "")).startswith("twophase-verdict"):
        raise ValueError(f"path: {path} is not a verdict file")
    if data["schema"] != SCHEMA:
        raise ValueError(f"path: {path} has schema {data['schema']!r}, expected {SCHEMA}")
    if not intact:
        raise ValueError(f"path: {path} has been changed since it was written (checksum)")
    del data["schema"]
    return _numbers(data)


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
