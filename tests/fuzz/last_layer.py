"""last_layer_step_, last_layer_epoch_ and last_layer_gradient against extended precision."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twophase_ext import ops

from . import harness
from .harness import Refused, again, attempt, close, same_bits
from .ops import L, wide
from .values import FLOATS, STRANGE, numbers, overlapping, relaid, scalar, wrong

NAMES = ("weight", "bias", "weight_buffer", "bias_buffer", "h", "target", "order")


class Truth:
    """The layer in extended precision, each number with a bound of what rounding can do to it."""

    def __init__(self, tensors: dict[str, Any], loss: str, rule: dict[str, Any]) -> None:
        self.w, self.b = wide(tensors["weight"]), wide(tensors["bias"])
        self.buffers = [wide(tensors[n]) for n in ("weight_buffer", "bias_buffer")]
        self.h, self.y = wide(tensors["h"]), tensors["target"]
        self.y = self.y.numpy() if loss == "cross_entropy" else wide(self.y)
        info = torch.finfo(tensors["weight"].dtype)
        self.eps, self.tiny, self.most = info.eps, info.tiny, info.max / 1e4
        self.loss, self.rule = loss, rule
        self.errors = [np.zeros_like(self.w), None if self.b is None else np.zeros_like(self.b)]
        self.buffer_errors = [0, 0]
        self.overflow = False

    def gradient(self, rows: Any) -> tuple[Any, list[Any], list[Any]]:
        """((loss, its bound), gradients, their bounds)."""
        x, y, n = self.h[rows], self.y[rows], len(rows)
        k, m = self.w.shape
        e = self.eps * (m + n + k + 16)
        q = x @ self.w.T + (0 if self.b is None else self.b)
        size = np.abs(x) @ np.abs(self.w.T) + (0 if self.b is None else np.abs(self.b))
        dq = e * size + np.abs(x) @ self.errors[0].T + self.tiny * 4 * (m + 1)
        if self.errors[1] is not None:
            dq = dq + self.errors[1]
        if self.loss == "cross_entropy":
            top = q - q.max(1, keepdims=True)
            p = np.exp(top)
            p = p / p.sum(1, keepdims=True)
            hot = np.eye(k)[y]
            losses = -(top * hot).sum(1) + np.log(np.exp(top).sum(1))
            value = losses.mean(), (2 * dq.max(1)).mean() + e * (1 + np.abs(losses).mean())
            delta = (p - hot) / n
            # a logit that errs by more than 1 may turn everything
            turned = np.where(dq.max() > 0.5, np.inf, 0)
            wrong_delta = (4 * dq.max(1, keepdims=True) + e) / n + turned
        else:
            error = q - y
            value = (
                (error**2).sum(1).mean(),
                ((2 * np.abs(error) * dq + dq**2 + e * error**2).sum(1).mean()),
            )
            delta, wrong_delta = 2 * error / n, (2 * dq + e * np.abs(error) * 2) / n
        wrong_delta = wrong_delta + self.tiny
        grads = [delta.T @ x, delta.sum(0)]
        bounds = [
            wrong_delta.T @ np.abs(x) + e * np.abs(delta.T) @ np.abs(x) + self.tiny * 4 * n,
            wrong_delta.sum(0) + e * np.abs(delta).sum(0) + self.tiny * 4 * n,
        ]
        finite = [v for v in (size, np.abs(delta).T @ np.abs(x), value[0]) if np.size(v)]
        self.overflow |= any(bool((np.abs(v) > self.most).any()) for v in finite)
        return value, grads, bounds

    def step(self, rows: Any, lr: float, is_first_step: bool) -> Any:
        """One step of SGD; the loss before it and its bound."""
        value, grads, bounds = self.gradient(rows)
        rule = self.rule
        mu, damp, decay = (L(rule[n]) for n in ("momentum", "dampening", "weight_decay"))
        for i, (p, e) in enumerate(((self.w, self.errors[0]), (self.b, self.errors[1]))):
            if p is None:
                continue
            g, dg = grads[i] + decay * p, bounds[i] + decay * e
            dg = dg + 4 * self.eps * (np.abs(grads[i]) + np.abs(decay * p))
            if mu:
                old, before = self.buffers[i], self.buffer_errors[i]
                new = g if is_first_step else mu * old + (1 - damp) * g
                after = dg if is_first_step else (
                    mu * before + np.abs(1 - damp) * dg
                    + 4 * self.eps * (np.abs(mu * old) + np.abs((1 - damp) * g))
                )  # fmt: skip
                self.buffers[i], self.buffer_errors[i] = new, after + 4 * self.tiny
                g, dg = (g + mu * new, dg + mu * after) if rule["nesterov"] else (new, after)
            size = np.abs(p) + np.abs(L(lr) * g)
            self.overflow |= bool((size > self.most).any() | (np.abs(g) > self.most).any())
            p -= L(lr) * g
            e += np.abs(L(lr)) * dg + 4 * self.eps * size + 4 * self.tiny
        return value

    def bound(self, b: Any) -> Any:
        """The bound, infinite where something overflows."""
        return np.inf if self.overflow else 2 * b


def last_layer(r: random.Random) -> None:
    """One call of one of the three."""
    which = r.choice(("step", "epoch", "gradient"))
    dtype = r.choice(FLOATS)
    n, k, m = r.randrange(1, 7), r.randrange(1, 5), r.choice((0, 1, 2, 5, 16, 33, 300))
    n = 70 if r.random() < 0.03 else n
    loss: Any = r.choice(("cross_entropy", "squared_error"))
    momentum = r.choice((0.0, 0.9)) if which != "gradient" else 0.0
    dampening = r.choice((0.0, 0.5)) if momentum else 0.0
    nesterov = bool(momentum) and not dampening and r.random() < 0.5
    rule: dict[str, Any] = {
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": r.choice((0.0, 0.01)),
        "nesterov": nesterov,
    }
    is_first_step = r.random() < 0.5
    low = dtype == torch.float32 and which != "step" and r.random() < 0.2
    labels = torch.randint(k, (n,), generator=torch.Generator().manual_seed(r.getrandbits(32)))
    wild = r.choice((0.0, 0.0, 0.1))
    t: dict[str, Any] = {
        "weight": numbers(r, (k, m), dtype, wild),
        "bias": r.choice((None, numbers(r, (k,), dtype, wild))),
        "weight_buffer": numbers(r, (k, m), dtype, wild) if momentum else None,
        "bias_buffer": numbers(r, (k,), dtype, wild) if momentum else None,
        "h": relaid(r, numbers(r, (n, m), torch.bfloat16 if low else dtype, wild), True),
        "target": relaid(r, labels if loss == "cross_entropy" else numbers(r, (n, k), dtype, wild)),
    }
    lr: Any = scalar(r, 0.0, 1.0)
    call: dict[str, Any] = {}
    if which == "epoch":
        t["order"] = torch.tensor([r.randrange(n) for _ in range(r.randrange(9))]).long()
        size = r.choice((1, 2, 3, 100))
        total = len(t["order"])
        starts = [*range(0, total, size), total] if total else [0]
        call = {"batch_size": size} if r.random() < 0.5 else {"bounds": starts}
        lr = [scalar(r, 0.0, 1.0) for _ in starts[1:]] if r.random() < 0.3 and total else lr
    valid, lr = _mischief(r, t, call, rule, lr, k, n, which)
    if r.random() < 0.03:
        loss, valid = r.choice((*STRANGE, "hinge")), None
    judged = valid and loss in ("cross_entropy", "squared_error")
    # an infinite logit may leave a finite loss, which the truth below does not find
    judged = judged and all(bool(a.isfinite().all()) for a in t.values() if isinstance(a, Tensor))
    truth = Truth(t, loss, rule) if judged else None
    count = 7 if which == "epoch" else 6
    arguments = [t[name] for name in NAMES[:count]]
    kept = [a.clone() if isinstance(a, Tensor) else a for a in arguments] if judged else []
    rule |= call | {"lr": lr, "is_first_step": is_first_step}
    got = _call(which, arguments, loss, rule)
    if isinstance(got, Refused):
        assert not valid, f"refused: {got.error}"
        return
    assert valid is not False, "accepted what it cannot do"
    if truth is None:
        return
    with np.errstate(all="ignore"):
        if which == "gradient":
            value, grads, bounds = truth.gradient(np.arange(n))
            close(got[0], value[0], truth.bound(value[1]), "loss")
            for g, w, b in zip(got[1:], grads, bounds, strict=True):
                close(g, w, truth.bound(b), "gradient")
            _repeat(r, which, kept, loss, rule, [*got])
            return
        _steps(truth, t, which, got, lr, is_first_step, call, n)
        for i, name in enumerate(("weight", "bias")):
            if t[name] is None:
                continue
            close(t[name], (truth.w, truth.b)[i], truth.bound(truth.errors[i]), name)
            if rule["momentum"]:
                error = truth.buffer_errors[i]
                close(t[name + "_buffer"], truth.buffers[i], truth.bound(error), name + "_buffer")
    _repeat(r, which, kept, loss, rule, [got, *arguments[:4]])


def _call(which: str, arguments: list[Any], loss: Any, rule: dict[str, Any]) -> Any:
    if which == "gradient":
        weight, bias, _, _, h, target = arguments
        return attempt(ops.last_layer_gradient, weight, bias, h, target, loss=loss)
    function = ops.last_layer_step_ if which == "step" else ops.last_layer_epoch_
    changes = [a for a in arguments[:4] if isinstance(a, Tensor)]
    return attempt(function, *arguments, loss=loss, changes=changes, **rule)


def _repeat(
    r: random.Random, which: str, kept: list, loss: Any, rule: dict, wanted: list[Any]
) -> None:
    """The same numbers in other memory give the same bits."""
    for _ in range(harness.REPEATS):
        copies = [a if a is None else a.clone() for a in kept]
        copies[4:6] = [relaid(r, a) for a in copies[4:6]]
        if which == "gradient":
            weight, bias, _, _, h, target = copies
            found = [*again(ops.last_layer_gradient, weight, bias, h, target, loss=loss)]
        else:
            function = ops.last_layer_step_ if which == "step" else ops.last_layer_epoch_
            found = [again(function, *copies, loss=loss, **rule), *copies[:4]]
        for a, b in zip(found, wanted, strict=True):
            if a is not None:
                same_bits(a, b, f"last_layer, {which}, in another layout")


def _steps(
    truth: Truth, t: dict, which: str, got: Tensor, lr: Any, is_first_step: bool, call: dict, n: int
) -> None:
    if which == "step":
        value = truth.step(np.arange(n), float(lr), is_first_step)
        bound = truth.bound(value[1]) + truth.eps * np.abs(value[0])
        close(got, value[0], bound, "loss")
        return
    order = t["order"].numpy()
    size = call.get("batch_size")
    bounds = call.get("bounds") or (
        [*range(0, len(order), size), len(order)] if len(order) else [0]
    )
    assert got.shape == (len(bounds) - 1,)
    for s in range(len(bounds) - 1):
        rate = lr[s] if isinstance(lr, list) else float(lr)
        value = truth.step(order[bounds[s] : bounds[s + 1]], rate, is_first_step and s == 0)
        close(got[s], value[0], truth.bound(value[1]), f"loss of step {s}")


def _mischief(
    r: random.Random, t: dict, call: dict, rule: dict, lr: Any, k: int, n: int, which: str
) -> tuple[bool | None, Any]:
    """(True: must be accepted, False: must be refused, None: either; lr)."""
    odd = r.random()
    updated = [a for a in NAMES[:4] if isinstance(t.get(a), Tensor)]
    if which == "gradient":
        updated = []
    if t["bias"] is None and "bias_buffer" in updated:  # not looked at
        updated.remove("bias_buffer")
    if odd < 0.1:
        name = r.choice([a for a in t if isinstance(t[a], Tensor)])
        t[name] = wrong(r, t[name])
        return None, lr
    if odd < 0.2 and updated:
        name, other = r.choice(updated), r.choice(("self", "h", "weight", "target"))
        if other == "self" and (view := overlapping(r, t[name])) is not None:
            t[name] = view
            return False, lr
        if other == "h" and n >= k and t["h"].dtype == t["weight"].dtype and t["h"].numel():
            t["h"] = t["h"].contiguous()
            t["weight"] = t["h"][:k]
            return False, lr
        if name.endswith("_buffer") and t[name].numel() and t[name[:-7]] is not None:
            t[name] = t[name[:-7]]
            return False, lr
        return True, lr
    if odd < 0.25 and t["target"].dtype == torch.int64:
        t["target"] = t["target"].clone()
        t["target"][r.randrange(n)] = r.choice((-1, k, 2**62, -(2**63)))
        return False, lr
    if odd < 0.3 and "order" in t and len(t["order"]):
        t["order"][r.randrange(len(t["order"]))] = r.choice((-1, n, 2**62, -(2**63)))
        return False, lr
    if odd < 0.35 and call:
        call.clear()
        size = r.choice((0, -1, 2**63, *STRANGE))
        bad = ([], [1], [0, 0], [0, 2**63], [0, 9, 3], [-1, 3], ["a"], 3, None)
        call |= r.choice(({"batch_size": size}, {"bounds": r.choice(bad)}))
        return None, lr
    if odd < 0.42 and which != "gradient":
        key = r.choice(("lr", *rule))
        value = r.choice((*STRANGE, -0.5, float("inf")))
        if key == "lr":
            return None, value
        rule[key] = value
        return None, lr
    return True, lr


def columns(r: random.Random) -> None:
    """last_layer_logits and last_layer_update_: holders of columns make one step together."""
    dtype = r.choice(FLOATS)
    n, k, m = r.randrange(1, 6), r.randrange(1, 4), r.choice((1, 2, 7, 40))
    wild = r.choice((0.0, 0.0, 0.1))
    rule: dict[str, Any] = {
        "momentum": r.choice((0.0, 0.9)),
        "dampening": 0.0,
        "weight_decay": r.choice((0.0, 0.01)),
        "nesterov": False,
    }
    lr, is_first_step = scalar(r, 0.0, 1.0), r.random() < 0.5
    index: Any = torch.tensor([r.randrange(n) for _ in range(r.randrange(1, 6))])
    t: dict[str, Any] = {
        "weight": numbers(r, (k, m), dtype, wild),
        "bias": r.choice((None, numbers(r, (k,), dtype, wild))),
        "weight_buffer": numbers(r, (k, m), dtype, wild),
        "bias_buffer": numbers(r, (k,), dtype, wild),
        "h": numbers(r, (n, m), dtype, wild),
        "target": torch.tensor([r.randrange(k) for _ in range(n)]),
    }
    truth = Truth(t, "cross_entropy", rule)
    cut = r.randrange(m + 1)
    parts = [{**t, **{name: t[name][:, a:b].contiguous() for name in ("weight", "weight_buffer")},
              "h": relaid(r, t["h"][:, a:b])} for a, b in ((0, cut), (cut, m))]  # fmt: skip
    for part in parts:  # every holder has a bias of its own
        part["bias"] = None if t["bias"] is None else t["bias"].clone()
        part["bias_buffer"] = t["bias_buffer"].clone()
        part["target"] = t["target"][index]
    odd, valid = r.random(), True
    if odd < 0.3:
        name = r.choice(("weight", "h", "bias", "target", "index"))
        valid = None
        if name == "index":
            index = wrong(r, index) if r.random() < 0.5 else index + n
        elif isinstance(parts[0][name], Tensor):
            parts[0][name] = wrong(r, parts[0][name])
    total: Any = 0
    for part in parts:
        got = attempt(ops.last_layer_logits, part["weight"], part["h"], index)
        if isinstance(got, Refused):
            assert not valid, f"refused: {got.error}"
            return
        total = total + got
    losses = []
    for part in parts:
        arguments = [part[name] for name in NAMES[:5]]
        changes = [a for a in arguments[:4] if isinstance(a, Tensor)]
        got = attempt(
            *(ops.last_layer_update_, *arguments, index, total, part["target"]),
            **(rule | {"lr": lr, "is_first_step": is_first_step}),
            changes=changes,
        )
        if isinstance(got, Refused):
            assert not valid, f"refused: {got.error}"
            return
        losses.append(got)
    if not valid:
        return
    with np.errstate(all="ignore"):
        value = truth.step(index.numpy(), lr, is_first_step)
        close(losses[0], value[0], truth.bound(value[1]), "loss")
        weight = torch.cat([part["weight"] for part in parts], 1)
        close(weight, truth.w, truth.bound(truth.errors[0]), "weight")
        for part in parts if t["bias"] is not None else []:
            close(part["bias"], truth.b, truth.bound(truth.errors[1]), "bias")


CASES: dict[str, tuple[Callable[[random.Random], None], float]] = {
    "last_layer": (last_layer, 20),
    "columns": (columns, 6),
}
