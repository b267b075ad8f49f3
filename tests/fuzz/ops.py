"""The operators, against numpy's extended precision; one call a case."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import twophase_ext as tp
from twophase import reference
from twophase_ext import ops

from . import harness
from .harness import Refused, again, attempt, close, same_bits
from .values import (
    ALL_FLOATS,
    FLOATS,
    STRANGE,
    numbers,
    overlapping,
    relaid,
    scalar,
    shape,
    wrong,
)

L = np.longdouble


def wide(t: Tensor | None) -> Any:
    """The numbers in extended precision."""
    return None if t is None else t.detach().resolve_neg().double().numpy().astype(L)


def usable(t: Any, *dtypes: torch.dtype) -> bool:
    """Whether the reference can say what the result is."""
    return (
        isinstance(t, Tensor)
        and (t.is_cpu and t.layout == torch.strided and not t._is_zerotensor())
        and t.dtype in dtypes
    )


# ---- softplus


def softplus_truth(x: Any, beta: float, dtype: torch.dtype) -> tuple[Any, Any]:
    """(value, bound of the error): csrc/math/softplus.h, its floor and its rounding."""
    info = torch.finfo(dtype if dtype in FLOATS else torch.float32)
    with np.errstate(all="ignore"):
        e = np.exp(-L(beta) * np.abs(x))
        y = np.maximum(x, 0) + np.log1p(e) / L(beta)
        # beta x is rounded before it enters the exponential where there is no fused multiply-add
        spread = 4 + np.minimum(np.abs(L(beta) * x), -math.log(info.tiny))
        bound = spread * info.eps * y + 2.002 * info.tiny * max(1.0, 1 / beta)
        if dtype not in FLOATS:
            own = torch.finfo(dtype)
            bound = bound + np.maximum(own.eps * y, own.tiny * own.eps) / 2 * 1.01
            y = np.where(y > own.max * (1 + own.eps / 4), np.inf, y)
    return y, np.where(np.isnan(bound), 0, bound)


def softplus(r: random.Random) -> None:
    """softplus and softplus_ on every dtype and layout."""
    dtype = r.choice(ALL_FLOATS)
    beta: Any = r.choice((1e-30, 0.5, 1.0, 100.0, 1e30, 10 ** r.uniform(-5, 5)))
    x: Any = relaid(r, numbers(r, shape(r), dtype, scale=r.choice((1, 3 / beta, 50 / beta))), True)
    in_place = r.random() < 0.5
    valid = (
        not in_place
        or not x.numel()
        or not any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True))
    )
    odd = r.random()
    if odd < 0.1:
        beta, valid = r.choice((*STRANGE, 0.0, -1.0, 1e-31, 1e31, float("inf"))), None
    elif odd < 0.25:
        x, valid = wrong(r, x), None
    elif odd < 0.35 and in_place and (view := overlapping(r, x)) is not None:
        x, valid = view, False
    before = x.clone() if usable(x, *ALL_FLOATS) else None
    call = tp.softplus_ if in_place else tp.softplus
    got = attempt(call, x, beta, changes=[x] if in_place else [])
    if isinstance(got, Refused):
        assert not valid, f"refused: {got.error}"
        return
    assert valid is not False, "accepted a tensor whose elements share memory"
    assert not in_place or got is x
    if before is None:
        before = torch.tensor(x) if isinstance(x, np.ndarray | list | float) else None
    if before is not None and usable(before, *ALL_FLOATS):
        value, bound = softplus_truth(wide(before), float(beta), before.dtype)
        close(got, value, bound, "softplus")
    if not valid:
        return
    for _ in range(harness.REPEATS):  # other memory, the same numbers
        view = relaid(r, before.clone())
        call = r.choice((tp.softplus, tp.softplus_))
        same_bits(again(call, view, beta), got, "softplus in another layout")


# ---- perturb_


def normals(key: int, count: int) -> list[float]:
    """The stream in integers and Python's own logarithm and cosine."""
    out: list[float] = []
    for block in range((count + 3) // 4):
        c0, c1, c2, c3 = block & 0xFFFFFFFF, block >> 32, 0, 0
        k0, k1 = key & 0xFFFFFFFF, key >> 32
        for _ in range(10):
            a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
            c0, c1, c2, c3 = (
                (b >> 32) ^ c1 ^ k0,
                b & 0xFFFFFFFF,
                (a >> 32) ^ c3 ^ k1,
                a & 0xFFFFFFFF,
            )
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        for u, v in ((c0, c1), (c2, c3)):
            first, second = ((float(np.float32(w)) + 0.5) for w in (u, v))
            first, second = (float(np.float32(w)) * 2.0**-32 for w in (first, second))
            radius = math.sqrt(-2 * math.log(first))
            quarter = round(4 * second)
            angle = 2 * math.pi * (second - quarter / 4)
            for turn in (0, 1):  # cosine, then sine: a quarter turn behind
                sign, swap = ((1, 0), (-1, 1), (-1, 0), (1, 1))[(quarter - turn) % 4]
                out.append(radius * sign * (math.sin(angle) if swap else math.cos(angle)))
    return out[:count]


def _perturb(named_tensors: Any, std: Any, seed: Any) -> None:
    tp.perturb_(named_tensors, std, seed=seed)


def perturb(r: random.Random) -> None:
    """perturb_ on a few tensors and arrays."""
    tensors: dict[Any, Any] = {}
    for i in range(r.randrange(4)):
        t = relaid(r, numbers(r, shape(r), r.choice(FLOATS)))
        key = r.choice((f"p{i}", f"module.p{i}", f"é.{i}", f"_orig_mod.layer.{i}"))
        tensors[key] = t.numpy() if r.random() < 0.2 else t
    std: Any = r.choice((1e-3, 1.0, 1e-30, torch.finfo(torch.float32).tiny))
    seed: Any = r.choice((0, 1, -1, 2**64 - 1, -(2**63), r.getrandbits(40)))
    valid: bool | None = True
    odd = r.random()
    keys = list(tensors)
    if odd < 0.1:
        std, valid = r.choice((*STRANGE, 0.0, -1.0, float("inf"), 1e-40, 1e39)), None
    elif odd < 0.15:
        seed, valid = r.choice((*STRANGE, 2**64, -(2**63) - 1)), None
    elif odd < 0.35 and keys:
        key = r.choice(keys)
        t = torch.as_tensor(tensors[key])
        view = overlapping(r, t) if r.random() < 0.5 else None
        tensors[key], valid = (wrong(r, t), None) if view is None else (view, False)
    elif odd < 0.45 and keys:
        flat = numbers(r, (6,), torch.float32)
        tensors |= {"a": flat[:4], "b": flat[3:]}
        valid = False
    elif odd < 0.5 and keys:
        std = dict.fromkeys(keys[: r.randrange(len(keys) + 1)], 0.5) | r.choice(({}, {"z": 1.0}))
        valid = None if std.keys() != set(keys) else True
    before = {k: torch.as_tensor(v).clone() for k, v in tensors.items() if _numeric(v)}
    call: Any = tensors if r.random() < 0.5 else list(tensors.items())
    owned = [torch.from_numpy(v) if _writable(v) else v for v in tensors.values()]
    arrays = [v for v in tensors.values() if isinstance(v, np.ndarray)]
    kept = [a.tobytes() for a in arrays]
    names = [
        "named_tensors",
        "tensors",
        "stds",
        *(part for k in tensors for part in str(k).split(".")),
    ]
    # arrays are looked at here: attempt() knows tensors that change, not arrays
    got = attempt(
        _perturb,
        *(call, std, seed) if not arrays else (_Hidden(call), std, seed),
        label="perturb_",
        names=names,
        changes=owned,
    )
    if isinstance(got, Refused):
        assert not valid, f"refused: {got.error}"
        assert kept == [a.tobytes() for a in arrays], "a refused call changed an array"
        return
    assert valid is not False, "accepted tensors that share memory"
    for key, old in before.items():
        if not usable(old, *FLOATS):
            continue
        canonical = reference.stream_key(int(seed), key)
        sigma = float(np.float32(std[key] if isinstance(std, dict) else std))
        z = np.array(normals(canonical, old.numel()), L).reshape(old.shape)
        wanted = wide(old) + L(sigma) * z
        eps = torch.finfo(old.dtype).eps
        bound = 6.5 * 2.0**-24 * sigma * np.abs(z) + eps * np.abs(wanted) + 2.0**-148
        with np.errstate(invalid="ignore"):
            bound = np.where(np.abs(wanted) > torch.finfo(old.dtype).max / 2, np.inf, bound)
        close(torch.as_tensor(tensors[key]), wanted, np.where(np.isnan(bound), 0, bound), "perturb")
    for _ in range(harness.REPEATS if valid else 0):  # other memory, another order
        copies = {k: relaid(r, old.clone()) for k, old in reversed(before.items())}
        again(tp.perturb_, copies, std, seed=seed)
        for key in before:
            same_bits(copies[key], torch.as_tensor(tensors[key]), "perturb_ in another layout")


class _Hidden:
    """Pairs whose memory attempt() does not look at."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __iter__(self) -> Any:
        return iter(self.pairs.items() if isinstance(self.pairs, dict) else self.pairs)


def _writable(v: Any) -> bool:
    return isinstance(v, np.ndarray) and v.flags.writeable and v.dtype.kind in "fiu"


def _numeric(v: Any) -> bool:
    return usable(v, *FLOATS) or (_writable(v) and v.dtype.kind == "f")


# ---- sgd_


def sgd(r: random.Random) -> None:
    """sgd_ on a few tensors, momentum and mask included."""
    count = r.randrange(4)
    momentum: Any = r.choice((0.0, 0.9, 0.5))
    dampening: Any = r.choice((0.0, 0.0, 0.3))
    nesterov = bool(momentum) and not dampening and r.random() < 0.4
    rule: dict[str, Any] = {
        "lr": scalar(r, 0.0, 2.0),
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": r.choice((0.0, 0.1)),
        "nesterov": nesterov,
        "maximize": r.random() < 0.2,
    }
    params: list[Any] = []
    grads: list[Any] = []
    buffers: list[Any] = []
    for _ in range(count):
        size, dtype = shape(r), r.choice(FLOATS)
        p, g, b = (numbers(r, size, dtype) for _ in range(3))
        params.append(relaid(r, p))
        grads.append(relaid(r, g, True))
        buffers.append(r.choice((None, relaid(r, b))))
    nu: Any = r.choice((None, [r.randrange(2) for _ in range(count)]))
    valid: bool | None = True
    odd = r.random()
    if odd < 0.2 and count:
        i, chosen = r.randrange(count), r.choice((params, grads, buffers))
        chosen[i], valid = wrong(r, params[i]), None
    elif odd < 0.3 and count and (view := overlapping(r, params[0])) is not None:
        params[0] = view
        valid = False if nu is None or nu[0] else None
    elif odd < 0.4 and count and params[0].numel():
        p = params[0] = params[0].contiguous()
        i = r.randrange(2)
        if i:
            params.append(p), grads.append(torch.zeros_like(p)), buffers.append(None)
            nu = None
        else:
            grads[0] = p
        valid = False if nu is None or nu[0] else None
    elif odd < 0.5:
        key = r.choice(("lr", "momentum", "dampening", "weight_decay"))
        rule[key], valid = r.choice((*STRANGE, float("inf"))), None
    elif odd < 0.55:
        nu, valid = r.choice(([2] * count, ["a"] * count, [1], 3)), None
    elif odd < 0.6:
        buffers, valid = r.choice((tuple(buffers), buffers[:-1], None)), None  # type: ignore[assignment]
    old = [[wide(t) if usable(t, *FLOATS) else None for t in part or ()]
           for part in (params, grads, buffers)]  # fmt: skip
    kept = (
        [[t if t is None else t.clone() for t in part] for part in (params, grads, buffers)]
        if valid
        else []
    )
    got = attempt(
        *(ops.sgd_, params, grads, buffers),
        **rule,
        nu=nu,
        names=["buffers"],
        changes=[params, list(buffers or ())],
    )
    if isinstance(got, Refused):
        assert not valid, f"refused: {got.error}"
        return
    assert valid is not False, "accepted tensors that share memory"
    values = {k: v for k, v in rule.items() if k not in ("nesterov", "maximize")}
    for i, p in enumerate(params):
        if old[0][i] is None or old[1][i] is None:
            continue
        _check_sgd(
            p, buffers, i, [part[i] if i < len(part) else None for part in old], values, rule, nu
        )
    for _ in range(harness.REPEATS if valid else 0):  # other memory, the same numbers
        p, g, b = ([t if t is None else relaid(r, t.clone()) for t in part] for part in kept)
        again(ops.sgd_, p, g, b, **rule, nu=nu)
        for after, wanted in zip(p, params, strict=True):
            same_bits(after, wanted, "sgd_ in another layout")


def _check_sgd(
    p: Tensor, buffers: Any, i: int, old: list, values: dict, rule: dict, nu: Any
) -> None:
    w, g, b = old
    eps, largest = torch.finfo(p.dtype).eps, torch.finfo(p.dtype).max
    if nu is not None and not nu[i]:
        close(p, w, 0, "sgd_, masked")
        return
    lr, mu, damp, decay = (L(float(v)) for v in values.values())
    with np.errstate(all="ignore"):
        if rule["maximize"]:
            g = -g
        size = np.abs(g) + np.abs(decay * w)
        g = g + decay * w if decay else g
        if mu:
            size = size if b is None else np.abs(mu * b) + np.abs(1 - damp) * size
            b = g if b is None else mu * b + (1 - damp) * g
            if rule["nesterov"]:
                size = size + np.abs(mu) * size
            g = g + mu * b if rule["nesterov"] else b
        wanted = w - lr * g
        total = np.abs(w) + np.abs(lr) * size
        bound = 8 * eps * total + 8 * torch.finfo(p.dtype).tiny * (1 + np.abs(lr))
        # overflow on the way, or a number outside the dtype's range, is not judged
        bound = np.where((size < largest / 16) & (total < largest / 16), bound, np.inf)
        bound = np.where((np.abs(lr) > 0) & (np.abs(lr) < 1e-30), np.inf, bound)
    close(p, wanted, bound, "sgd_")
    if mu and usable(buffers[i], *FLOATS):
        limit = 8 * eps * size + 8 * torch.finfo(p.dtype).tiny
        close(buffers[i], b, np.where(size < largest / 16, limit, np.inf), "sgd_, buffer")


CASES: dict[str, tuple[Callable[[random.Random], None], float]] = {
    "softplus": (softplus, 30),
    "perturb": (perturb, 15),
    "sgd": (sgd, 15),
}
