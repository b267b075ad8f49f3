"""last_layer_logits and last_layer_update_: a step by holders of some columns each."""

from itertools import pairwise

import pytest
import torch

from twophase.reference import last_layer as twin
from twophase_ext.ops import last_layer_logits, last_layer_step_, last_layer_update_

RULES = [
    {"lr": 0.1},
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2},
    {"lr": 0.05, "momentum": 0.5, "dampening": 0.25},
    {"lr": 0.2, "momentum": 0.9, "nesterov": True},
]
LOSSES = ["cross_entropy", "squared_error"]
# (rows of h, rows of a batch, outputs, bounds of the holders' columns)
SHAPES = [
    (1, 1, 1, [0, 1]),
    (9, 5, 3, [0, 4, 7]),
    (80, 64, 10, [0, 171, 342, 513]),
    (70, 65, 23, [0, 1, 1031]),
    (70, 65, 35, [0, 300, 700]),
]


def problem(n, b, k, m, loss, dtype):
    g = torch.Generator().manual_seed(n + m)
    h = (torch.randn(n, m, generator=g) / m**0.5).to(dtype)
    weight, bias = torch.randn(k, m, generator=g).to(dtype), torch.randn(k, generator=g).to(dtype)
    y = torch.randint(k, (n,), generator=g)
    if loss == "squared_error":
        y = torch.randn(n, k, generator=g).to(dtype)
    batches = [torch.randint(n, (b,), generator=g) for _ in range(3)]
    return h, weight, bias, y, batches


class Holder:
    """Some columns of h, weight and momentum; the bias as everybody has it."""

    def __init__(self, h, weight, bias, momentum):
        self.h, self.weight, self.bias = h, weight.contiguous(), bias.clone()
        self.buffers = [torch.full_like(t, 7.0) for t in (self.weight, bias)]  # to be overwritten
        if not momentum:
            self.buffers = [None, None]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule))
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_holders_together_do_the_step(shape, loss, rule, dtype, isa):
    n, b, k, cuts = shape
    h, weight, bias, y, batches = problem(n, b, k, cuts[-1], loss, dtype)
    exact = [t.to(torch.float64, copy=True) for t in (weight, bias)]
    buffers = [None, None]
    momentum = rule.get("momentum")
    if momentum:
        buffers = [torch.zeros_like(t) for t in exact]
    parts = [slice(*ends) for ends in pairwise(cuts)]
    holders = [Holder(h[:, p], weight[:, p], bias, momentum) for p in parts]
    tolerance = 1e-13 if dtype == torch.float64 else 2e-5
    for i, index in enumerate(batches):
        target = y[index]
        first = rule if i else {**rule, "dampening": 0.0}  # torch's first step is not damped
        wide = target.double() if target.is_floating_point() else target
        value = reference(exact, buffers, h[index].double(), wide, loss, first)
        logits = sum(last_layer_logits(held.weight, held.h, index) for held in holders)
        for held in holders:
            found = last_layer_update_(
                held.weight, held.bias, *held.buffers, held.h, index, logits, target,
                loss=loss, is_first_step=i == 0, **rule,
            )  # fmt: skip
            torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)
            assert torch.equal(held.bias, holders[0].bias)
    whole = torch.cat([held.weight for held in holders], 1).double()
    torch.testing.assert_close(whole, exact[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(holders[0].bias.double(), exact[1], rtol=tolerance, atol=tolerance)


def reference(weights, buffers, h, y, loss, rule):
    """torch.optim.SGD's step in float64, by the twin's gradient; the loss before it."""
    value, *gradients = twin.last_layer_gradient(*weights, h, y, loss=loss)
    lr, momentum = rule["lr"], rule.get("momentum", 0.0)
    for w, gradient, buffer in zip(weights, gradients, buffers, strict=True):
        step = gradient + rule.get("weight_decay", 0.0) * w
        if buffer is not None:
            buffer.mul_(momentum).add_(step, alpha=1 - rule.get("dampening", 0.0))
            step = step + momentum * buffer if rule.get("nesterov") else buffer
        w -= lr * step
    return value


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("b", [49, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_holder_of_all_has_the_bits_of_last_layer_step(threads, b, dtype, loss, isa):
    h, weight, bias, y, (index, *_) = problem(80, b, 10 if b == 64 else 33, 2049, loss, dtype)
    rule = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}
    mine, other = ([t.clone() for t in (weight, bias)] for _ in range(2))
    buffers, others = ([torch.zeros_like(t) for t in mine] for _ in range(2))
    torch.set_num_threads(threads)
    for step in range(2):
        value = last_layer_step_(
            *mine, *buffers, h[index], y[index], is_first_step=step == 0, loss=loss, **rule
        )
        logits = last_layer_logits(other[0], h, index)
        found = last_layer_update_(
            *other, *others, h, index, logits, y[index], is_first_step=step == 0, loss=loss, **rule
        )
        assert value == found.to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(mine + buffers, other + others, strict=True))


def test_bfloat16_rows_and_rows_apart():
    h, weight, bias, y, (index, *_) = problem(20, 8, 3, 300, "cross_entropy", torch.float32)
    narrow, apart = h.bfloat16(), torch.cat([h, h], 1)[:, :300]
    exact = narrow[index].double() @ weight.double().T
    found = last_layer_logits(weight, narrow, index)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(last_layer_logits(weight, apart, index), last_layer_logits(weight, h, index))
    results = []
    for rows in (narrow, narrow.float()):
        w, b = weight.clone(), bias.clone()
        logits = last_layer_logits(w, rows, index)
        last_layer_update_(w, b, None, None, rows, index, logits, y[index], lr=0.1)
        results.append(w)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused_before_anything_changes():
    h, weight, bias, y, (index, *_) = problem(20, 8, 3, 30, "cross_entropy", torch.float32)
    logits, y = last_layer_logits(weight, h, index), y[index]
    before = weight.clone(), bias.clone()

    def update(**changes):
        given = {"weight": weight, "bias": bias, "weight_buffer": None, "bias_buffer": None}
        given |= {"h": h, "index": index, "logits": logits, "target": y, "lr": 0.1}
        return last_layer_update_(**(given | changes))

    for error, message, changes in [
        (
            ValueError,
            "index: expected indices from 0 to 19, got 20 at 0",
            {"index": index * 0 + 20},
        ),
        (ValueError, "index: expected contiguous int64 indices", {"index": index[:0]}),
        (TypeError, "index: expected int64, got torch.int32", {"index": index.int()}),
        (ValueError, r"h: expected 30 features, got \[20, 29\]", {"h": h[:, 1:]}),
        (TypeError, "h: expected torch.float32 or bfloat16", {"h": h.double()}),
        (TypeError, "weight: expected float32 or float64", {"weight": weight.half()}),
        (TypeError, "logits: expected float64, got torch.float32", {"logits": logits.float()}),
        (ValueError, r"logits: expected contiguous float64 \[8, 3\]", {"logits": logits[1:]}),
        (ValueError, "target: expected labels from 0 to 2, got 3 in row 0", {"target": y * 0 + 3}),
        (ValueError, r"target: expected shape \[8\]", {"target": y[1:]}),
        (ValueError, "lr: expected a finite number >= 0", {"lr": -1.0}),
        (ValueError, "weight_buffer: expected a tensor where momentum", {"momentum": 0.9}),
        (ValueError, "weight: expected a contiguous tensor", {"weight": weight.T.contiguous().T}),
    ]:
        with pytest.raises(error, match=message):
            update(**changes)
    assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])


@pytest.mark.parametrize("loss", [0, 1])
def test_opcheck(loss):
    h, weight, bias, y, (index, *_) = problem(9, 4, 3, 20, LOSSES[loss], torch.float32)
    ops = torch.ops.twophase
    torch.library.opcheck(ops.last_layer_logits, (weight, h, index))
    buffers = [torch.zeros_like(t) for t in (weight, bias)]
    logits = last_layer_logits(weight, h, index)
    rule = (loss, 0.1, 0.9, 0.0, 1e-3, False, False)
    given = (weight, bias, *buffers, h, index, logits, y[index], *rule)
    torch.library.opcheck(ops.last_layer_update_, given)
