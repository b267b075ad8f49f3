"""The certificate file. docs/certificate.md describes the format."""

import hashlib
import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._load import build_info
from ..files import write_json

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


def environment() -> dict[str, Any]:
    """What computed: versions, processor, threads."""
    from ..training.runfolder import processor_name  # training imports this package

    info = build_info()
    return {
        "twophase_ext": info["version"],
        "isa": info["isa"],
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
    }


def hash_tensors(tensors: list[Tensor]) -> str:
    """SHA-256 of the numbers as float64, and of the shape of one sample; batching is not seen."""
    digest = hashlib.sha256()
    for k, part in enumerate(tensors):
        if k == 0:
            digest.update(repr(tuple(part.shape[1:])).encode())
        digest.update((part.detach().cpu().double() + 0.0).contiguous().numpy().data)
    return digest.hexdigest()


def describe_model(model: nn.Module) -> str:
    """SHA-256 of what a model computes besides its state: classes, plain attributes, forwards."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        kind = type(module)
        digest.update(f"{name} {kind.__module__}.{kind.__qualname__} {module.training}\n".encode())
        for attribute in sorted(vars(module)):
            if not attribute.startswith("_") and attribute not in ("training", "train"):
                value = vars(module)[attribute]
                digest.update(f"{attribute}={_content(value)}\n".encode())
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            digest.update(repr([_content(hook) for hook in hooks.values()]).encode())
        digest.update(_content(kind.forward).encode())
    return digest.hexdigest()


def _content(value: Any) -> str:
    """A plain value, a tensor or a function in words that tell it from another one."""
    if isinstance(value, Tensor):
        return hash_tensors([value[None]]) if not value.is_meta else str(value.shape)
    if isinstance(value, list | tuple | set):
        return f"{type(value).__name__}({', '.join(map(_content, value))})"
    if isinstance(value, dict):
        return repr({str(k): _content(v) for k, v in value.items()})
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    if code is not None:
        constants = [c if not hasattr(c, "co_code") else c.co_code.hex() for c in code.co_consts]
        held = [c.cell_contents for c in getattr(value, "__closure__", None) or () if _filled(c)]
        plain = [c for c in held if isinstance(c, int | float | str | bool | None)]
        return f"{code.co_code.hex()} {constants} {code.co_names} {plain}"
    if isinstance(value, int | float | complex | str | bytes | torch.dtype | None):
        return repr(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def hash_hidden_layers(model: nn.Module, state: dict[str, Tensor], last_layer: str) -> str:
    """SHA-256 of the architecture, the last layer's name and the hidden layers' state."""
    digest = hashlib.sha256(f"{model}\n{last_layer}\n".encode())
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
