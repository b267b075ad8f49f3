"""Gaussian noise on named tensors: the same numbers on every device and for any thread count.

Element i (logical row-major index) of the tensor called `name` receives sigma z_i, where z_i is
lane i mod 4 of Philox4x32-10(key, counter floor(i / 4)) after Box-Muller, and key comes from the
seed and the name alone. Nothing depends on the order of the tensors or on the other tensors.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ..core.names import canonical_name
from ..core.sharded import is_sharded, local, local_part
from ._arguments import require_tensor

_ops = torch.ops.twophase
_SIGMAS = torch.finfo(torch.float32)


def perturb_(
    named_tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    std: float | Mapping[str, float],
    *,
    seed: int,
) -> None:
    """Add Gaussian noise to every tensor in place (Algorithm 1's perturbation of w_(1:H)).

    named_tensors: pairs (name, tensor), as of `module.named_parameters()`, or a dict; float32 or
    float64 of any shape and strides, on any devices; parameters that require grad are allowed, and
    so are NumPy and CuPy arrays and whatever else shares its memory through DLPack.
    std: one sigma, or a dict with a sigma for every name; each must be a normal float32 number
    above 0. seed: any 64-bit integer, signed or unsigned.

    The components `module` and `_orig_mod` that DistributedDataParallel and torch.compile put into
    names do not count. p + sigma z: sigma z is rounded once to float32, also for a float64 tensor.
    A DTensor gets the numbers that the whole tensor would; each process makes them all.

    Raises TypeError for something that is no tensor, for float16 and bfloat16 tensors (the noise
    would round away beside the weight: keep float32 master weights) and other dtypes; ValueError
    for a sigma out of range, a name without sigma or a sigma without tensor, two tensors of one
    name or of one memory. Everything is checked before any tensor is changed. In a graph of
    torch.compile a seed may be symbolic, and of shared memory only the same tensor is noticed.
    """
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    pairs = list(pairs)
    tensors = checked_tensors(pairs)
    sigmas = _sigmas(std, tensors)
    if torch.compiler.is_compiling():  # hashes cannot be traced, and the seed may be symbolic
        signed = seed - 2**64 if seed >= 2**63 else seed
        with torch.no_grad():
            _by_name(list(tensors.values()), list(tensors), signed, list(sigmas.values()))
        return
    stream = _seed_bytes(seed)

    shards = {canonical_name(name): value for name, value in pairs if is_sharded(value)}
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        if name in shards:
            noise = torch.zeros(shards[name].shape, dtype=tensor.dtype, device=tensor.device)
            _ops.perturb_([noise], [_key(stream, name)], [sigmas[name]])
            with torch.no_grad():
                tensor += local_part(noise, shards[name])
            continue
        by_device.setdefault(tensor.device, []).append(name)
    with torch.no_grad():
        for names in by_device.values():
            changed = [tensors[name] for name in names]
            keys = [_key(stream, name) for name in names]
            _ops.perturb_(changed, keys, [sigmas[name] for name in names])
            torch.autograd.graph.increment_version(changed)


def checked_tensors(
    named_tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
) -> dict[str, Tensor]:
    """The tensors by canonical name, with every check that `perturb_` makes of them."""
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    tensors: dict[str, Tensor] = {}
    for name, value in pairs:
        tensor = _shared_tensor(name, value)
        if (key := canonical_name(name)) in tensors:
            raise ValueError(f"named_tensors: expected distinct names, got {key!r} twice")
        tensors[key] = tensor
    _check_memory(tensors)
    return tensors


def _seed_bytes(seed: int) -> bytes:
    if not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    return (seed % 2**64).to_bytes(8, "little")


def _key(stream: bytes, name: str) -> int:
    """The Philox key of a tensor, as the signed 64-bit integer that the operator takes."""
    digest = hashlib.sha256(stream + name.encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _shared_tensor(name: str, value: Any) -> Tensor:
    """The tensor itself, or one over the array's memory; checked."""
    if not isinstance(name, str):
        raise TypeError(f"named_tensors: expected names of type str, got {type(name).__name__}")
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        raise ValueError(f"{name}: expected an array that can be written, got a read-only one")
    if not isinstance(value, Tensor) and not hasattr(value, "__dlpack__"):
        raise TypeError(f"{name}: expected a tensor or an array, got {type(value).__name__}")
    try:
        tensor = value if isinstance(value, Tensor) else torch.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(f"{name}: this {type(value).__name__} cannot be shared: {error}") from error
    tensor = local(tensor)
    if tensor.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"{name}: expected float32 or float64, got {tensor.dtype}: beside a 16-bit weight the "
            "noise rounds away; keep master weights in float32, perturb those and cast them"
        )
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {tensor.dtype}")
    require_tensor(tensor, name, written=True)
    if tensor.numel() and any(
        size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise ValueError(f"{name}: expected elements with memory of their own, got stride 0")
    return tensor


def _check_memory(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tied tensors: their noise would be added twice, and at the same time."""
    if torch.compiler.is_compiling():  # addresses are known when the graph runs
        return
    owners: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            owner = owners.setdefault((tensor.device, tensor.data_ptr()), name)
            if owner != name:
                raise ValueError(f"{name}: expected memory of its own, got that of {owner!r}")


def _sigmas(std: float | Mapping[str, float], tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """A sigma for every tensor, each checked."""
    if isinstance(std, Mapping):
        given: dict[str, float] = {}
        for name, sigma in std.items():
            if (key := canonical_name(name)) in given:
                raise ValueError(f"std: expected distinct names, got {key!r} twice")
            given[key] = sigma
        if missing := [name for name in tensors if name not in given]:
            raise ValueError(f"std: expected a sigma for every tensor, got none for {missing}")
        if unknown := [name for name in given if name not in tensors]:
            raise ValueError(f"std: expected names of the given tensors, got {unknown}")
    else:
        given = dict.fromkeys(tensors, std)
    sigmas = {}
    for name, sigma in given.items():
        try:
            sigmas[name] = float(sigma)
        except OverflowError:
            sigmas[name] = float("inf")
        except (TypeError, ValueError) as error:
            raise TypeError(f"std of {name}: expected a number, got {sigma!r}") from error
        if not _SIGMAS.tiny <= sigmas[name] <= _SIGMAS.max:
            raise ValueError(
                f"std of {name}: expected a finite number > 0 in float32's range, got {sigma}"
            )
    return sigmas


@torch.library.register_fake("twophase::perturb_")
def _(tensors: list[Tensor], keys: list[int], stds: list[float]) -> None:
    return None


@torch.library.custom_op(
    "twophase::perturb_by_name_",
    mutates_args={"tensors"},
    schema="(Tensor(a!)[] tensors, str[] names, SymInt seed, float[] stds) -> ()",
)
def _by_name(tensors: list[Tensor], names: list[str], seed: int, stds: list[float]) -> None:
    """`perturb_` as an operator of a graph."""
    perturb_(zip(names, tensors, strict=True), dict(zip(names, stds, strict=True)), seed=seed)


@_by_name.register_fake
def _(tensors: list[Tensor], names: list[str], seed: int, stds: list[float]) -> None:
    return None
