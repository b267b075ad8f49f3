"""Every hash of tensors and models: what a cache, a checkpoint or a certificate belongs to."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def flat(tensor: Tensor) -> Tensor:
    """The tensor's elements in their order on the CPU: one dimension, stride 1.

    reshape(-1) leaves a single element its stride, whatever that is. A sparse tensor is made dense;
    one of the meta device has no elements.
    """
    if tensor.is_meta:
        return torch.empty(0, dtype=tensor.dtype, device="cpu")
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return whole.as_strided((whole.numel(),), (1,))


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bits of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        if tensor.numel():
            digest.update(flat(tensor).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_tensors(tensors: list[Tensor]) -> str:
    """SHA-256 of the numbers as float64, and of the shape of one sample; batching is not seen."""
    digest = hashlib.sha256()
    for k, part in enumerate(tensors):
        if k == 0:
            digest.update(repr(tuple(part.shape[1:])).encode())
        digest.update((flat(part).double() + 0.0).numpy().data)
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
        value = state[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(flat(value).view(torch.uint8).numpy().data)
    return digest.hexdigest()
