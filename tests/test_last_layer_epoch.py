"""last_layer_epoch_: many mini-batch steps in one call are the steps one by one."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ISAS, instruction_set, on_each_isa
from twophase.reference import last_layer as twin
from twophase_ext.ops import last_layer_epoch_, last_layer_step_

PLAIN = {}
MOMENTUM = {"momentum": 0.9, "weight_decay": 1e-2}
DAMPED = {"momentum": 0.5, "dampening": 0.25, "weight_decay": 1e-5}
NESTEROV = {"momentum": 0.9, "nesterov": True}
RULES = [PLAIN, MOMENTUM, DAMPED, NESTEROV]
LOSSES = ["cross_entropy", "squared_error"]
# (samples, outputs, features, batch)
SHAPES = [
    (1, 1, 1, 1),
    (20, 3, 7, 6),
    (30, 23, 600, 8),
    (70, 10, 1031, 66),
    (9, 101, 300, 4),
    (70, 33, 300, 66),
]


class Problem:
    """A last layer, features, and an order with repeats and steps of unequal size."""

    def __init__(self, n, k, m, batch, *, loss="cross_entropy", bias=True, dtype=torch.float32):
        g = torch.Generator().manual_seed(1000 * n + 10 * k + m)
        self.loss, self.dtype = loss, dtype
        self.weight = (torch.randn(k, m, generator=g) / m**0.5).to(dtype)
        self.bias = torch.randn(k, generator=g).to(dtype) if bias else None
        self.h = (torch.rand(n, m, generator=g) / m**0.5).to(dtype)
        self.y = torch.randint(k, (n,), generator=g)
        if loss == "squared_error":
            self.y = torch.randn(n, k, generator=g).to(dtype)
        self.order = torch.cat(
            [torch.randperm(n, generator=g), torch.randint(n, (7,), generator=g)]
        )
        ends = [*range(0, len(self.order), batch), len(self.order)]
        self.bounds = sorted({*ends, 1})
        self.lr = [0.1 / (s + 1) for s in range(len(self.bounds) - 1)]

    def state(self, device="cpu", momentum=True):
        """Weight, bias and buffers, whose content must not matter at a first step."""
        own = [None if t is None else t.clone().to(device) for t in (self.weight, self.bias)]
        full = [None if t is None else torch.full_like(t, 7.0) for t in own]
        return [*own, *(full if momentum else [None, None])]

    def ours(self, device="cpu", h=None, steps=None, state=None, is_first_step=True, **rule):
        state = self.state(device, bool(rule.get("momentum"))) if state is None else state
        first, last = steps or (0, len(self.lr))
        bounds = [bound - self.bounds[first] for bound in self.bounds[first : last + 1]]
        losses = last_layer_epoch_(
            *state,
            (self.h if h is None else h).to(device),
            self.y.to(device),
            self.order[self.bounds[first] : self.bounds[last]],
            bounds=bounds,
            loss=self.loss,
            lr=self.lr[first:last],
            is_first_step=is_first_step,
            **rule,
        )
        return [None if t is None else t.cpu() for t in (losses, *state)]

    def by_twin(self, dtype, **rule):
        """The plain loop in another precision."""

        def own(t):
            return None if t is None else t.clone().to(dtype)

        weight, bias, buffers = own(self.weight), own(self.bias), [None, None]
        y = self.y if self.loss == "cross_entropy" else own(self.y)
        losses = twin.last_layer_epoch_(
            weight,
            bias,
            buffers,
            own(self.h),
            y,
            [self.order[a:b] for a, b in pairwise(self.bounds)],
            loss=self.loss,
            lr=self.lr,
            **rule,
        )
        return losses, weight, bias


def assert_as_good(ours, exact, torchs):
    """At most twice torch's own error, and some roundings of float32."""
    for a, b, c in zip(ours[:3], exact, torchs, strict=True):
        allowed = 2 * float((c.double() - b).abs().max()) + 4e-7 * float(b.abs().max())
        assert float((a.double() - b).abs().max()) <= allowed


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_plain_loop(device, shape, loss, rule):
    for bias in (True, False):
        problem = Problem(*shape, loss=loss, bias=bias, dtype=torch.float64)
        exact = problem.by_twin(torch.float64, **rule)
        for ours in on_each_isa(lambda p=problem: p.ours(device, **rule)):
            for a, b in zip(ours[:3], exact, strict=True):
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    problem = Problem(*shape, loss=loss)
    exact = problem.by_twin(torch.float64, **rule)
    torchs = problem.by_twin(torch.float32, **rule)
    for ours in on_each_isa(lambda: problem.ours(device, **rule)):
        assert_as_good(ours, exact, torchs)


def test_a_thousand_steps_are_as_accurate_as_torch():
    """Against float64, within twice the error of torch's own float32 loop."""
    g = torch.Generator().manual_seed(0)
    n, m, k, steps = 500, 700, 10, 1000
    h, y = torch.rand(n, m, generator=g), torch.randint(k, (n,), generator=g)
    order = torch.randint(n, (steps * 16,), generator=g)
    start = torch.randn(k, m, generator=g) / m**0.5
    rule = {"lr": 2e-3, "momentum": 0.9, "weight_decay": 1e-5}

    def eager(dtype):
        layer = torch.nn.Linear(m, k, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(start)
            layer.bias.zero_()
        optimizer, losses = torch.optim.SGD(layer.parameters(), **rule), []
        for i in order.split(16):
            optimizer.zero_grad()
            loss = F.cross_entropy(layer(h[i].to(dtype)), y[i])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return layer.weight.detach().double(), torch.tensor(losses, dtype=torch.float64)

    exact, exact_losses = eager(torch.float64)
    theirs, their_losses = eager(torch.float32)
    for isa, (dtype, factor) in itertools.product(
        ISAS, ((torch.float32, 2.0), (torch.float64, 0.0))
    ):
        weight, bias = start.clone().to(dtype), torch.zeros(k, dtype=dtype)
        buffers = torch.zeros_like(weight), torch.zeros_like(bias)
        with instruction_set(isa):
            losses = last_layer_epoch_(
                weight, bias, *buffers, h.to(dtype), y, order, batch_size=16, **rule
            )
        for ours, true, torchs in (
            (weight, exact, theirs),
            (losses, exact_losses, their_losses),
        ):
            error = float((ours.double() - true).abs().max())
            allowed = factor * float((torchs - true).abs().max())
            assert error <= max(allowed, 1e-12 * float(true.abs().max())), dtype


def test_bfloat16_features_give_the_same_bits_for_any_number_of_threads(isa):
    problem, results = Problem(70, 10, 1031, 16), []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(problem.ours(h=problem.h.bfloat16(), **MOMENTUM))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [10, 37])
def test_the_same_bits_as_step_by_step_split_and_for_any_number_of_threads(k, dtype, loss, isa):
    problem = Problem(70, k, 1031, 16, dtype=dtype, loss=loss)
    state, losses = problem.state(), []
    for s, (begin, end) in enumerate(pairwise(problem.bounds)):
        index = problem.order[begin:end]
        rule = {**MOMENTUM, "lr": problem.lr[s], "is_first_step": s == 0, "loss": loss}
        losses.append(last_layer_step_(*state, problem.h[index], problem.y[index], **rule).double())
    expected = [torch.stack(losses), *state]
    for count in (1, 2, 3, 4, 7):
        torch.set_num_threads(count)
        ours = problem.ours(**MOMENTUM)
        assert torch.equal(ours[0].to(dtype).double(), expected[0])
        assert all(torch.equal(a, b) for a, b in zip(ours[1:], expected[1:], strict=True))
        for cut in (1, 2, len(problem.lr) - 1):
            state = problem.state()
            first = problem.ours(steps=(0, cut), state=state, **MOMENTUM)[0]
            rest = (cut, len(problem.lr))
            last = problem.ours(steps=rest, state=state, is_first_step=False, **MOMENTUM)[0]
            assert torch.equal(torch.cat([first, last]), ours[0])
            assert all(torch.equal(a, b) for a, b in zip(state, ours[1:], strict=True))


def test_bfloat16_features_are_those_widened():
    """As accurate as torch's float32 on the widened ones, for any remainder of a vector."""
    for shape in [
        *SHAPES,
        *((9, 3, m, 4) for m in (*range(2, 67), 515, 8209)),
        *((9, 33, m, 4) for m in range(2, 67, 7)),
    ]:
        problem = Problem(*shape)
        narrow = problem.h.bfloat16()
        found = on_each_isa(lambda p=problem, h=narrow: p.ours(h=h, **MOMENTUM))
        problem.h = narrow.float()
        exact = problem.by_twin(torch.float64, **MOMENTUM)
        torchs = problem.by_twin(torch.float32, **MOMENTUM)
        for ours in found:
            assert_as_good(ours, exact, torchs)


def test_bfloat16_features_read_no_further_than_their_rows(isa):
    for m, k in itertools.product((1, 15, 33, 513, 1031), (3, 35)):
        problem = Problem(5, k, m, 2)
        expected = problem.ours(h=problem.h.bfloat16(), **MOMENTUM)
        around = torch.full((5, m + 3), torch.nan, dtype=torch.bfloat16)
        around[:, :m] = problem.h
        ours = problem.ours(h=around[:, :m], **MOMENTUM)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_rows_anywhere_and_files(tmp_path, isa):
    problem = Problem(30, 5, 40, 8)
    expected = problem.ours(**MOMENTUM)
    wide = torch.full((60, 55), torch.nan)
    rows = wide[::2, 3:43]
    rows.copy_(problem.h)
    mapped = torch.from_file(str(tmp_path / "h"), shared=True, size=1200).view(30, 40)
    mapped.copy_(problem.h)
    for h, flag in ((rows, False), (mapped, True), (problem.h.T.contiguous().T, False)):
        ours = problem.ours(h=h, mapped=flag, **MOMENTUM)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_batch_size_is_bounds():
    problem = Problem(20, 3, 7, 6)
    results = []
    for batches in ({"batch_size": 6}, {"bounds": [0, 6, 12, 18, 24, 27]}):
        state = problem.state(momentum=False)
        losses = last_layer_epoch_(*state, problem.h, problem.y, problem.order, lr=0.1, **batches)
        results.append([losses, *state[:2]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(results[0][0]) == 5 and results[0][0].dtype == torch.float64
    empty, state = problem.order[:0], problem.state(momentum=False)
    none = last_layer_epoch_(*state, problem.h, problem.y, empty, batch_size=4, lr=1.0)
    assert none.shape == (0,)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_spreads_as_in_the_plain_loop(bad):
    problem = Problem(20, 3, 40, 6, loss="squared_error")
    problem.h[problem.order[9], 5] = bad
    ours, theirs = problem.ours(), problem.by_twin(torch.float32)
    for a, b in zip(ours[:3], theirs, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    assert ours[0][0].isfinite() and not ours[0][-1].isfinite()


@settings(max_examples=30)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 14),
    m=st.integers(0, 70),
    batch=st.integers(1, 40),
    loss=st.sampled_from(LOSSES),
    rule=st.sampled_from(RULES),
)
def test_any_shape(n, k, m, batch, loss, rule):
    problem = Problem(n, k, max(m, 1), batch, loss=loss, dtype=torch.float64)
    if m == 0:
        problem.weight, problem.h = problem.weight[:, :0].contiguous(), problem.h[:, :0]
    theirs = problem.by_twin(torch.float64, **rule)
    for ours in on_each_isa(lambda: problem.ours(**rule)):
        for a, b in zip(ours[:3], theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 4}, ValueError, "expected either batch_size or bounds"),
        ({"bounds": None, "batch_size": 0}, ValueError, "batch_size: expected 1 or more, got 0"),
        (
            {"bounds": [0, 4, 4, 6]},
            ValueError,
            "expected ascending numbers, got 4 before 4",
        ),
        ({"bounds": [0, 5]}, ValueError, "bounds: expected numbers from 0 to 6"),
        ({"bounds": [1, 6]}, ValueError, "bounds: expected numbers from 0 to 6"),
        ({"lr": [0.1, 0.2, 0.3]}, ValueError, "lr: expected one number or one for each of 2 steps"),
        ({"lr": [0.1, -0.2]}, ValueError, "lr: expected a finite number >= 0, got -0.2"),
        ({"lr": math.nan}, ValueError, "lr: expected a finite number >= 0"),
        ({"order": torch.tensor([0, 1, 2, 3, 4, 5])}, ValueError, "from 0 to 4, got 5 at 5"),
        ({"order": torch.tensor([0, 1, 2, 3, -1, 4])}, ValueError, "got -1 at 4"),
        ({"order": torch.zeros(6)}, TypeError, "order: expected int64"),
        ({"target": torch.tensor([0, 1, 3, 0, 0])}, ValueError, "0 to 2, got 3 in row 2"),
        ({"target": torch.tensor([0, 1, 2])}, ValueError, r"target: expected shape \[5\]"),
        ({"loss": "hinge"}, ValueError, "loss: expected one of"),
        ({"h": torch.ones(5, 9)}, ValueError, r"h: expected 8 features, got \[5, 9\]"),
        ({"h": torch.ones(5, 8).double()}, TypeError, "or bfloat16 beside float32"),
        ({"weight": torch.zeros(3, 8).bfloat16()}, TypeError, "weight: expected float32 or"),
        ({"weight_buffer": None}, ValueError, "weight_buffer: expected a tensor"),
        ({"bias_buffer": torch.zeros(4)}, ValueError, r"bias_buffer: expected shape \[3\]"),
        ({"momentum": -1.0}, ValueError, "momentum: expected a finite number >= 0"),
        ({"nesterov": True, "dampening": 0.5}, ValueError, "nesterov: expected momentum > 0"),
        ({"weight": torch.zeros(8, 3).T}, ValueError, "weight: expected a contiguous tensor"),
    ],
)
def test_bad_arguments_change_nothing(change, error, message):
    arguments = {
        "weight": torch.zeros(3, 8),
        "bias": torch.zeros(3),
        "weight_buffer": torch.zeros(3, 8),
        "bias_buffer": torch.zeros(3),
        "h": torch.ones(5, 8),
        "target": torch.tensor([0, 1, 2, 0, 1]),
        "order": torch.tensor([0, 1, 2, 3, 4, 0]),
        "bounds": [0, 4, 6],
        "lr": 0.1,
        "momentum": 0.9,
    }
    with pytest.raises(error, match=message):
        last_layer_epoch_(**{**arguments, **change})
    for name in ("weight", "bias", "weight_buffer", "bias_buffer"):
        assert not arguments[name].any()


def test_compiles_without_a_graph_break():
    problem = Problem(20, 3, 7, 6)

    def run(weight, bias, h, y, order):
        return last_layer_epoch_(weight, bias, None, None, h, y, order, batch_size=6, lr=0.1) * 2

    state = problem.state(momentum=False)[:2]
    eager = run(*[t.clone() for t in state], problem.h, problem.y, problem.order)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*state, problem.h, problem.y, problem.order), eager)
