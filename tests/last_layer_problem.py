"""Steps of a last layer by last_layer_step_, by torch, and in extended precision with bounds."""

import numpy as np
import torch
import torch.nn.functional as F

from twophase_ext.ops import last_layer_step_

LOSSES = ["cross_entropy", "squared_error"]


class Problem:
    """A last layer with its buffers, three batches, and the rule of the steps."""

    def __init__(self, b, k, m, *, loss="cross_entropy", bias=True, dtype=torch.float32, **rule):
        g = torch.Generator().manual_seed(1000 * b + 10 * k + m)
        self.loss, self.rule, self.dtype = loss, rule, dtype
        self.weight = torch.randn(k, m, generator=g).to(dtype)
        self.bias = torch.randn(k, generator=g).to(dtype) if bias else None
        self.batches = []
        for _ in range(3):
            h = (torch.randn(b, m, generator=g) / m**0.5).to(dtype)  # no divergence at these lr
            if loss == "cross_entropy":
                self.batches.append((h, torch.randint(k, (b,), generator=g)))
            else:
                self.batches.append((h, torch.randn(b, k, generator=g).to(dtype)))

    def ours(self, device="cpu"):
        """[losses, weight, bias, weight_buffer, bias_buffer] after the three steps."""

        def own(t):
            return None if t is None else t.clone().to(device)

        weight, bias = own(self.weight), own(self.bias)
        buffers = [None, None]
        if self.rule.get("momentum"):  # a fresh buffer's content must not matter
            buffers = [None if t is None else torch.full_like(t, 7.0) for t in (weight, bias)]
        losses = [
            last_layer_step_(
                weight,
                bias,
                *buffers,
                h.to(device),
                y.to(device),
                loss=self.loss,
                is_first_step=i == 0,
                **self.rule,
            )
            for i, (h, y) in enumerate(self.batches)
        ]
        return [
            None if t is None else t.cpu() for t in (torch.stack(losses), weight, bias, *buffers)
        ]

    def by_torch(self):
        """The same by autograd and torch.optim.SGD in the problem's dtype."""
        weight = self.weight.clone().requires_grad_()
        bias = None if self.bias is None else self.bias.clone().requires_grad_()
        params = [p for p in (weight, bias) if p is not None]
        optimizer = torch.optim.SGD(params, **self.rule)
        losses = []
        for h, y in self.batches:
            q = F.linear(h, weight, bias)
            loss = F.cross_entropy(q, y) if self.loss == "cross_entropy" else squared_error(q, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        buffers = [
            None if p is None else optimizer.state[p].get("momentum_buffer") for p in (weight, bias)
        ]
        results = (torch.stack(losses), weight, bias, *buffers)
        return [None if t is None else t.detach() for t in results]

    def truth(self):
        """[losses, weight, bias, weight_buffer, bias_buffer] by the formulas in extended precision.

        And how far each may be off, in units of the roundoff: to first order, what comes of one
        rounding of every number that a step stores (logits, derivatives, gradients, momentum,
        parameters), all in the worst direction and carried from step to step. A sum counts as one
        rounding of the sum of its absolute values.
        """

        def wide(t):
            return t.double().numpy().astype(np.longdouble)

        params = [wide(self.weight)] + ([] if self.bias is None else [wide(self.bias)])
        off = [np.zeros_like(p) for p in params]  # how far the parameters are
        buffers, buffers_off = None, None
        losses, losses_off = [], []
        momentum, decay = self.rule.get("momentum", 0), self.rule.get("weight_decay", 0)
        kept, lr = 1 - self.rule.get("dampening", 0), self.rule["lr"]
        for h, y in self.batches:
            x, b = wide(h), len(h)
            q = x @ params[0].T + (params[1] if len(params) == 2 else 0)
            q_off = np.abs(x) @ (np.abs(params[0]) + off[0]).T
            q_off += np.abs(params[1]) + off[1] if len(params) == 2 else 0
            if self.loss == "cross_entropy":
                e = np.exp(q - q.max(1, keepdims=True))
                p, hot = e / e.sum(1, keepdims=True), np.eye(q.shape[1])[y.numpy()]
                losses.append(-np.log((p * hot).sum(1)).mean())
                delta = (p - hot) / b
                delta_off = p * (q_off + (p * q_off).sum(1, keepdims=True)) / b
            else:
                losses.append(((q - wide(y)) ** 2).sum(1).mean())
                delta, delta_off = 2 * (q - wide(y)) / b, 2 * q_off / b
            losses_off.append(losses[-1] + (np.abs(delta) * q_off).sum())
            delta_off = delta_off + np.abs(delta)
            ones = np.ones((b, 1))
            grads = [delta.T @ x, delta.sum(0)][: len(params)]
            grads_off = [
                ((delta_off + np.abs(delta)).T @ np.abs(z)).reshape(g.shape)
                for z, g in zip((x, ones), grads, strict=False)
            ]

            def combined(*terms):
                """Sum of factor * (value, off), and how far it is off."""
                total = sum(factor * value for factor, (value, _) in terms)
                bound = sum(abs(f) * (d + np.abs(v)) for f, (v, d) in terms) + np.abs(total)
                return total, bound

            now = list(zip(params, off, strict=True))
            steps = list(zip(grads, grads_off, strict=True))
            if decay:
                steps = [combined((1, g), (decay, w)) for g, w in zip(steps, now, strict=True)]
            if momentum:
                if buffers is None:
                    moved = steps
                else:
                    old = zip(buffers, buffers_off, strict=True)
                    moved = [
                        combined((momentum, v), (kept, g)) for v, g in zip(old, steps, strict=True)
                    ]
                buffers, buffers_off = map(list, zip(*moved, strict=True))
                if self.rule.get("nesterov"):
                    moved = [
                        combined((1, g), (momentum, v)) for g, v in zip(steps, moved, strict=True)
                    ]
                steps = moved
            now = [combined((1, w), (-lr, g)) for w, g in zip(now, steps, strict=True)]
            params, off = map(list, zip(*now, strict=True))
        none = [None, None]
        results = [np.array(losses), *(params + none)[:2], *((buffers or none) + none)[:2]]
        bounds = [np.array(losses_off), *(off + none)[:2], *((buffers_off or none) + none)[:2]]
        return list(zip(results, bounds, strict=True))


def squared_error(q, y):
    return (q - y).square().sum(1).mean()


def assert_as_good_as_torch(problem, *results):
    """Error against the truth at most twice torch's own, or what roundings alone explain.

    The latter because of few numbers: that torch happens to hit one of them binds nobody.
    """
    by_torch, truths = problem.by_torch(), problem.truth()
    names = ("loss", "weight", "bias", "weight_buffer", "bias_buffer")
    for ours in results:
        for name, got, torchs, (truth, off) in zip(names, ours, by_torch, truths, strict=True):
            if truth is None:
                continue
            error, own = (float(np.abs(t.double().numpy() - truth).max()) for t in (got, torchs))
            rounding = torch.finfo(problem.dtype).eps / 2 * float(off.max())
            assert got.dtype == problem.dtype
            assert error <= max(2 * own, rounding), (name, error, own, rounding)
