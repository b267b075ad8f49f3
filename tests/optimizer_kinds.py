"""Small optimizers, one of each kind that packages have."""

import random
from collections import deque

import numpy as np
import torch
from torch.optim import Optimizer


class Grouped(Optimizer):
    """As Prodigy, AdamP, Ranger: what it learns lies in the groups, not in the state."""

    def __init__(self, params, lr=0.05) -> None:
        super().__init__(params, {"lr": lr, "d": 1e-2, "k": 0, "seen": None})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            if not grads:
                continue
            norm = sum(float(g.square().sum()) for g in grads) ** 0.5
            group["k"] += 1
            group["d"] = max(group["d"], norm / group["k"])
            group["seen"] = torch.tensor(norm)
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * group["d"])


class Stepping(Optimizer):
    """As Ranger21: the rate follows a counter among the attributes."""

    def __init__(self, params, lr=0.5) -> None:
        super().__init__(params, {"lr": lr})
        self.current, self.name = 0, "steps"

    @torch.no_grad()
    def step(self, closure=None):
        self.current += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / self.current)


class Keyed(Optimizer):
    """As Magma and heavyball: a dict by the parameters' addresses, and views of them."""

    def __init__(self, params, lr=0.05) -> None:
        super().__init__(params, {"lr": lr})
        held = [p for group in self.param_groups for p in group["params"]]
        self.views = {(p.data_ptr(), p.dtype): p.detach().view(-1) for p in held}
        self.sums = {id(p): torch.zeros_like(p) for p in held}
        self.seen = {id(p) for p in held}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) in self.seen:
                    total = self.sums[id(p)].mul_(0.9).add_(p.grad)
                    self.views[p.data_ptr(), p.dtype].sub_(total.view(-1), alpha=group["lr"])


class Drawing(Optimizer):
    """Draws from Python's, NumPy's and torch's global generators."""

    def __init__(self, params, lr=0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        scale = random.random() * np.random.random()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * torch.rand_like(p), alpha=group["lr"] * scale)


class Counting(Optimizer):
    """What it learns lies in attributes, which its state_dict does not have."""

    def __init__(self, params, lr=0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.steps, self.sums = 0, {}

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    total = self.sums.setdefault(p, torch.zeros_like(p))
                    total.mul_(0.9).add_(p.grad)
                    p.sub_(total, alpha=group["lr"] / self.steps**0.5)


class Strict(Optimizer):
    """As Muon: every parameter is a matrix and has a gradient."""

    def __init__(self, params, lr=0.02) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"only 2-D parameters, found one of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 0.1)
                u, _, v = torch.linalg.svd(buffer, full_matrices=False)
                p.add_(u @ v, alpha=-group["lr"])


class Slow(Optimizer):
    """As Lookahead: every second step moves all parameters, with a gradient or without.

    where: of the slow weights, in the state by parameter, or in a list (of lists) beside it.
    """

    def __init__(self, base, where="state") -> None:
        self.base, self.where = base, where
        super().__init__(base.param_groups, {})
        self.base.param_groups = self.param_groups
        flat = [p for group in self.param_groups for p in group["params"]]
        if where == "state":
            for p in flat:
                self.state[p]["slow"] = p.detach().clone() + 0.01
        elif where == "list":
            self.slow = [p.detach().clone() for p in flat]
        else:
            self.slow = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]
        for group in self.param_groups:
            group["counter"] = 0

    def _lists(self):
        if self.where == "state":
            return [[self.state[p]["slow"] for g in self.param_groups for p in g["params"]]]
        return [self.slow] if self.where == "list" else self.slow

    def state_dict(self):
        return {"base": self.base.state_dict(), "slow": [list(ts) for ts in self._lists()]}

    def load_state_dict(self, state):
        self.base.load_state_dict(state["base"])
        self.param_groups = self.base.param_groups
        for own, theirs in zip(self._lists(), state["slow"], strict=True):
            for t, value in zip(own, theirs, strict=True):
                t.copy_(value)

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step()
        slow = iter(self.slow) if self.where == "list" else None
        for k, group in enumerate(self.param_groups):
            group["counter"] += 1
            of_group = iter(self.slow[k]) if self.where == "lists" else slow
            for p in group["params"]:
                kept = self.state[p]["slow"] if of_group is None else next(of_group)
                if group["counter"] % 2 == 0:
                    kept.lerp_(p, 0.5)
                    p.copy_(kept)


class Averaging(Optimizer):
    """As schedulefree: steps at y, eval() goes to the average x, train() back to y."""

    def __init__(self, params, lr=0.1, beta=0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    @torch.no_grad()
    def _move(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train:
                beta = group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - beta if train else 1 - 1 / beta)
                group["train_mode"] = train

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in train mode")
            group["k"] += 1
            c, beta = 1 / group["k"], group["beta"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.detach().clone())
                    p.lerp_(z, c)
                    p.add_(p.grad, alpha=group["lr"] * (beta * (1 - c) - 1))
                    z.sub_(p.grad, alpha=group["lr"])


class Rateless(Optimizer):
    """As Adafactor's and A2Grad's defaults: lr is None, or there is none."""

    def __init__(self, params, none=True) -> None:
        super().__init__(params, {"lr": None} if none else {"scale": 1.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    k = self.state[p]["k"] = self.state[p].get("k", 0) + 1
                    p.sub_(p.grad, alpha=0.1 / k)


class Numeric(Rateless):
    """NumPy's numbers in the groups and in the state."""

    def __init__(self, params) -> None:
        super().__init__(params)
        for group in self.param_groups:
            group.update(lr=np.float64(0.05), betas=(np.float32(0.5), 0.9), k=np.int64(1))
            group["more"] = {"on": np.bool_(True), "scale": np.array(2.0)}

    def step(self, closure=None):
        super().step()
        for state in self.state.values():
            state["k"] = np.int64(state["k"])


class Queued(Rateless):
    """As AdaShift: a state that no checkpoint gives back; late: only from the 10th step on."""

    def __init__(self, params, late=False) -> None:
        super().__init__(params)
        self.late = late

    def step(self, closure=None):
        super().step()
        for state in self.state.values():
            if state["k"] > 9 or not self.late:
                state["queue"] = deque([1.0], maxlen=3)


class Closing(Rateless):
    """As SAM and AliG: without a closure it fails, here behind a change of the weights."""

    @torch.no_grad()
    def step(self, closure=None):
        self.param_groups[0]["params"][0].add_(1)
        if closure is None:
            raise RuntimeError("a closure is needed.")


class Twice(Rateless):
    """As AdaHessian: derivatives of the gradients."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                torch.autograd.grad(p.grad.sum(), p)


class Wide(Rateless):
    """Keeps sums in float64, bytes, and a single element with a stride."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["sum"] = torch.zeros_like(p, dtype=torch.float64)
                    state["bytes"] = torch.arange(p.numel()).to(torch.uint8)
                    state["start"] = p.flatten()[:: p.numel() + 1].clone()
                    state["every"] = torch.zeros(3, 4).T
                assert state["bytes"].dtype is torch.uint8
                state["sum"].mul_(0.9).add_(p.grad)
                p.sub_(state["sum"].to(p.dtype), alpha=0.05)
