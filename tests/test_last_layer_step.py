"""last_layer_step_: loss, gradient and SGD update of the last layer in one call."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import on_each_isa
from last_layer_problem import LOSSES, Problem, assert_as_good_as_torch
from twophase.reference import last_layer as twin
from twophase_ext.ops import last_layer_step_

PLAIN = {"lr": 0.1}
MOMENTUM = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}
DAMPED = {"lr": 0.05, "momentum": 0.5, "dampening": 0.25, "weight_decay": 1e-5}
NESTEROV = {"lr": 0.2, "momentum": 0.9, "nesterov": True}
RULES = [PLAIN, MOMENTUM, DAMPED, NESTEROV]
# (samples, outputs, features): one, tails of vectors, chunks, slices, blocks of rows and outputs,
# packed panels (from 32 outputs on), more samples than panels hold
SHAPES = [
    (1, 1, 1),
    (2, 3, 7),
    (3, 10, 255),
    (5, 11, 257),
    (64, 10, 513),
    (65, 7, 1031),
    (66, 23, 600),
    (7, 101, 300),
    (16, 10, 17003),
    (70, 37, 1031),
    (600, 33, 300),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_good_as_torch(device, shape, loss, dtype):
    for rule, bias in itertools.product(RULES if shape[2] < 300 else [MOMENTUM], (True, False)):
        problem = Problem(*shape, loss=loss, bias=bias, dtype=dtype, **rule)
        assert_as_good_as_torch(problem, *on_each_isa(lambda p=problem: p.ours(device)))


@settings(max_examples=40)
@given(
    b=st.integers(1, 9),
    k=st.integers(1, 25),
    m=st.integers(1, 70) | st.integers(500, 530),
    loss=st.sampled_from(LOSSES),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    rule=st.sampled_from(RULES),
)
@example(7, 24, 7, "squared_error", False, torch.float32, PLAIN)
@example(2, 6, 15, "squared_error", True, torch.float32, NESTEROV)
def test_any_shape_and_rule(b, k, m, loss, bias, dtype, rule):
    """Also where torch has nearly none of the numbers wrong: the two examples."""
    problem = Problem(b, k, m, loss=loss, bias=bias, dtype=dtype, **rule)
    assert_as_good_as_torch(problem, *on_each_isa(problem.ours))


def test_twin(device, isa):
    for loss in LOSSES:
        problem = Problem(6, 4, 37, loss=loss, dtype=torch.float64, **NESTEROV)
        weight, bias, buffers = problem.weight.clone(), problem.bias.clone(), [None, None]
        losses = [
            twin.last_layer_step_(weight, bias, buffers, h, y, loss=loss, **NESTEROV)
            for h, y in problem.batches
        ]
        expected = [torch.stack(losses), weight, bias, *buffers]
        torch.testing.assert_close(problem.ours(device), expected, rtol=1e-12, atol=1e-13)


def test_same_bits_for_any_number_of_threads(isa):
    for shape in ((33, 10, 9001), (33, 40, 2100)):
        problem, results = Problem(*shape, **MOMENTUM), []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(problem.ours())
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def step(weight, h, y, **changes):
    arguments = {"bias": None, "weight_buffer": None, "bias_buffer": None, "lr": 0.1} | changes
    return last_layer_step_(weight, h=h, target=y, **arguments)


def test_strides_of_the_features(device, isa):
    g = torch.Generator().manual_seed(0)
    weight, y = torch.randn(4, 35, generator=g).to(device), torch.tensor([0, 3, 1]).to(device)
    wide = torch.randn(6, 80, generator=g).to(device)
    for h in (
        wide[:3, :35],  # row stride beyond the row
        wide[::2, 7:42],
        wide[:3, ::2][:, :35],  # gaps inside the row: copied
        wide.T[10:13, :][:, :1].expand(3, 35),  # no stride inside the row: copied
        wide[:1, :35].expand(3, 35),  # one row for all samples
    ):
        ours, packed = weight.clone(), weight.clone()
        assert torch.equal(step(ours, h, y), step(packed, h.contiguous(), y))
        assert torch.equal(ours, packed)


@pytest.mark.parametrize("k", [3, 35])
@pytest.mark.parametrize("m", [1, 15, 33, 513, 1025])
def test_touches_nothing_around_its_arrays(device, m, k, isa):
    """All arrays lie in one buffer of NaN: reading beyond an end would spread it."""
    b, gap = 5, 40
    weight, h = torch.randn(k, m), torch.randn(b, m)
    y = torch.tensor([0, 1, 2, 0, 1], device=device)
    buffer = torch.full((2 * k * m + 4 * gap + b * (m + 3),), torch.nan, device=device)
    inside_w = buffer[gap : gap + k * m].view(k, m)
    inside_v = buffer[2 * gap + k * m : 2 * gap + 2 * k * m].view(k, m)
    rows = buffer[3 * gap + 2 * k * m :][: b * (m + 3)].view(b, m + 3)[:, :m]
    for inside, value in ((inside_w, weight), (inside_v, torch.zeros(k, m)), (rows, h)):
        inside.copy_(value)
    untouched = buffer.isnan().sum()
    before = inside_w.data_ptr()
    loss = step(inside_w, rows, y, weight_buffer=inside_v, momentum=0.9)
    assert inside_w.data_ptr() == before and not torch.equal(inside_w.cpu(), weight)
    assert buffer.isnan().sum() == untouched and torch.equal(rows.cpu(), h)
    assert loss.isfinite() and inside_w.isfinite().all() and inside_v.isfinite().all()


def test_parameters_that_require_grad():
    layer = torch.nn.Linear(20, 3)
    h, y = torch.randn(4, 20, requires_grad=True), torch.tensor([0, 1, 2, 0])
    before = layer.weight.detach().clone()
    loss = last_layer_step_(layer.weight, layer.bias, None, None, h, y, lr=0.1)
    assert not loss.requires_grad and loss.shape == ()
    torch.testing.assert_close(loss, F.cross_entropy(h @ before.T + 0, y), rtol=1, atol=1)
    assert not torch.equal(layer.weight, before) and layer.weight.grad is None


def test_large_logits(device, isa):
    h = torch.tensor([[1.0], [-1.0]], device=device)
    weight = torch.tensor([[5000.0], [-5000.0], [0.0]], device=device)
    assert step(weight, h, torch.tensor([0, 1], device=device)) == 0
    assert torch.equal(weight.cpu(), torch.tensor([[5000.0], [-5000.0], [0.0]]))
    assert step(weight, h, torch.tensor([1, 1], device=device)) == 5000  # (10000 + 0) / 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("loss", LOSSES)
def test_not_finite_is_returned_and_spreads_as_in_torch(device, loss, bad, isa):
    for outputs in (3, 37):
        problem = Problem(5, outputs, 40, loss=loss, **MOMENTUM)
        problem.batches = [problem.batches[0]]
        problem.batches[0][0][2, 17] = bad
        ours, theirs = problem.ours(device), problem.by_torch()
        assert not ours[0].isfinite().any()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite()) and torch.equal(a.isnan(), b.isnan())


def test_logits_of_minus_infinity_have_no_part(isa):
    """As in torch: a class that cannot be, in either way to multiply."""
    for k in (3, 40):
        weight, h = torch.zeros(k, 1), torch.ones(2, 1)
        weight[-1] = -torch.inf
        loss = step(weight, h, torch.tensor([0, 1]), lr=0.0)
        torch.testing.assert_close(loss, torch.tensor(k - 1.0).log())


def good_arguments():
    return {
        "weight": torch.zeros(3, 8),
        "bias": torch.zeros(3),
        "weight_buffer": torch.zeros(3, 8),
        "bias_buffer": torch.zeros(3),
        "h": torch.ones(4, 8),
        "target": torch.tensor([0, 1, 2, 0]),
        "lr": 0.1,
        "momentum": 0.9,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.tensor([0, 1, 3, -1])}, ValueError, "0 to 2, got 3 in row 2"),
        ({"target": torch.tensor([0, -100, 1, 1])}, ValueError, "got -100 in row 1"),
        ({"target": torch.tensor([0, 1, 2])}, ValueError, r"target: expected shape \[4\]"),
        ({"target": torch.zeros(4)}, TypeError, "target: expected torch.int64"),
        ({"loss": "squared_error"}, TypeError, "target: expected torch.float32"),
        (
            {"loss": "squared_error", "target": torch.zeros(4, 2)},
            ValueError,
            r"target: expected shape \[4, 3\], got \[4, 2\]",
        ),
        ({"loss": "hinge"}, ValueError, "loss: expected one of cross_entropy, squared_error"),
        ({"h": torch.ones(0, 8), "target": torch.zeros(0).long()}, ValueError, "at least one"),
        ({"h": torch.ones(4, 2, 8)}, ValueError, "h: expected 2 dimensions, got 3"),
        ({"h": torch.ones(4, 9)}, ValueError, r"weight: expected shape \[3, 9\], got \[3, 8\]"),
        ({"h": torch.ones(4, 8).half()}, TypeError, "h: expected float32 or float64"),
        ({"weight": torch.zeros(3, 8).double()}, TypeError, "weight: expected the dtype of h"),
        ({"weight": torch.zeros(8, 3).T}, ValueError, "weight: expected a contiguous"),
        ({"weight_buffer": torch.zeros(8, 3).T}, ValueError, "weight_buffer: expected a cont"),
        ({"weight_buffer": None}, ValueError, "weight_buffer: expected a tensor"),
        ({"bias_buffer": None}, ValueError, "bias_buffer: expected a tensor"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \[3\], got \[4\]"),
        ({"lr": -0.1}, ValueError, "lr: expected"),
        ({"lr": float("nan")}, ValueError, "lr: expected"),
        ({"momentum": -1.0}, ValueError, "momentum: expected"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay: expected"),
        ({"nesterov": True, "dampening": 0.5}, ValueError, "nesterov: expected"),
        ({"nesterov": True, "momentum": 0.0}, ValueError, "nesterov: expected"),
    ],
)
def test_errors_come_before_any_change(device, change, error, message):
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (good_arguments() | change).items()
    }
    with pytest.raises(error, match=message):
        last_layer_step_(**arguments)
    for name in ("weight", "bias", "weight_buffer", "bias_buffer"):
        assert arguments[name] is None or not arguments[name].any()


def test_gradient_is_never_in_memory():
    """Peak of the resident memory during a step whose gradient would take 100 MiB."""
    status, peak_reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    weight, h = torch.zeros(100, 2**18), torch.ones(2, 2**18)
    arguments = (weight, h, torch.tensor([3, 4]))
    step(*arguments)  # the threads and their stacks are there now

    def kibibytes(field):
        return int(status.read_text().split(f"{field}:")[1].split()[0])

    try:
        peak_reset.write_text("5")
        before = kibibytes("VmRSS")
        step(*arguments)
        peak = kibibytes("VmHWM")
    except (OSError, IndexError):
        pytest.skip("the system does not tell the peak of resident memory")
    assert peak - before < 10 * 1024


@pytest.mark.parametrize("loss", [0, 1])
@pytest.mark.parametrize("with_buffers", [True, False])
def test_opcheck(device, loss, with_buffers):
    weight, bias = torch.randn(3, 20, device=device), torch.randn(3, device=device)
    target = torch.tensor([0, 2], device=device) if loss == 0 else torch.randn(2, 3, device=device)
    buffers = [torch.zeros_like(weight), torch.zeros_like(bias)] if with_buffers else [None, None]
    momentum = 0.9 if with_buffers else 0.0
    h = torch.randn(2, 20, device=device)
    torch.library.opcheck(
        torch.ops.twophase.last_layer_step_,
        (weight, bias, *buffers, h, target, loss, 0.1, momentum, 0.0, 1e-3, False, False),
    )
