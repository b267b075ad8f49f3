"""The perturbation of Algorithm 1, line 5, with noise that every machine reproduces."""

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def stream_key(seed: int, name: str) -> int:
    """64-bit key of a tensor's noise: the first 8 bytes of SHA-256(seed, name), little-endian.

    The seed enters as 8 little-endian bytes (two's complement), the name as UTF-8 without the
    components `module.` and `_orig_mod.` that wrappers add.
    """
    *path, own = name.split(".")
    canonical = ".".join([part for part in path if part not in ("module", "_orig_mod")] + [own])
    data = (seed % 2**64).to_bytes(8, "little") + canonical.encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, uint32 values held in int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # each below 2^48
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & MASK, total & MASK


def philox4x32_10(key: tuple[int, int], counter: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): counter [..., 4] of uint32 in int64 -> [..., 4]."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return torch.stack([c0, c1, c2, c3], -1)


def normal(key: int, numel: int) -> Tensor:
    """The first numel standard normals of a stream, float64: element i is lane i mod 4 of i // 4.

    Box-Muller on u = (w + 0.5) 2^-32 rounded to float32 (never 0): words (0, 1) give lanes 0 and 1,
    words (2, 3) lanes 2 and 3.
    """
    blocks = torch.arange((numel + 3) // 4)
    zero = torch.zeros_like(blocks)
    counter = torch.stack([blocks & MASK, blocks >> 32, zero, zero], -1)
    words = philox4x32_10((key & MASK, key >> 32), counter)
    u = ((words.float() + 0.5) * 2.0**-32).double()
    radius = torch.sqrt(-2 * torch.log(u[:, 0::2]))
    angle = 2 * math.pi * u[:, 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
    return pairs.reshape(-1)[:numel]


@torch.no_grad()
def perturb_(
    named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    std: float | Mapping[str, float],
    *,
    seed: int,
) -> None:
    """w_h <- w_h + delta_h, delta_h ~ N(0, sigma_h^2 I): float32 noise, added in w's precision.

    named_tensors: a dict or pairs, of float32 or float64 tensors (others: TypeError). std: one
    sigma, or a sigma for every name; ValueError where it is missing or not positive and finite in
    float32. Everything is checked before any tensor changes.
    """
    tensors = dict(named_tensors)
    sigmas: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32 or float64, got {tensor.dtype}")
        if isinstance(std, Mapping) and name not in std:
            raise ValueError(f"std: expected a sigma for {name!r}, got none")
        sigma = torch.tensor(std[name] if isinstance(std, Mapping) else std, dtype=torch.float32)
        if not 0 < sigma < torch.inf:
            raise ValueError(f"std: expected sigma > 0 and finite for {name!r}, got {float(sigma)}")
        sigmas[name] = sigma
    for name, tensor in tensors.items():
        z = normal(stream_key(seed, name), tensor.numel()).float()
        tensor += (z * sigmas[name]).view(tensor.shape).to(tensor)
