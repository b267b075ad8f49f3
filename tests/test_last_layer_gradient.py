"""last_layer_gradient: loss and full gradient, and the bound of a logit's rounding error."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from helpers import on_each_isa
from twophase.reference import last_layer as twin
from twophase_ext.ops import last_layer_epoch_, last_layer_gradient, logit_error_constant

LOSSES = ["cross_entropy", "squared_error"]


def problem(n, k, m, loss="cross_entropy", dtype=torch.float64):
    g = torch.Generator().manual_seed(n + k + m)
    weight, bias = torch.randn(k, m, generator=g) / max(m, 1) ** 0.5, torch.randn(k, generator=g)
    h, y = torch.rand(n, m, generator=g), torch.randint(k, (n,), generator=g)
    if loss == "squared_error":
        y = torch.randn(n, k, generator=g).to(dtype)
    return weight.to(dtype), bias.to(dtype), h.to(dtype), y


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 3, 0), (64, 10, 257), (200, 23, 600), (65, 2, 9), (70, 40, 300)]
)
def test_matches_autograd(device, shape, loss, isa):
    weight, bias, h, y = (t.to(device) for t in problem(*shape, loss))
    for given in (bias, None):
        ours = last_layer_gradient(weight, given, h, y, loss=loss)
        theirs = twin.last_layer_gradient(weight, given, h, y, loss=loss)
        assert ours[0].dtype == torch.float64
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b.double(), rtol=1e-12, atol=1e-14)
    w, v = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    outputs = F.linear(h, w, v)
    value = (
        F.cross_entropy(outputs, y) if loss == LOSSES[0] else (outputs - y).square().sum(1).mean()
    )
    gradients = torch.autograd.grad(value, (w, v))
    for a, b in zip(last_layer_gradient(weight, bias, h, y, loss=loss)[1:], gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_and_bfloat16(device, loss, isa):
    weight, bias, h, y = problem(300, 10, 900, loss, torch.float32)
    y = y if loss == LOSSES[0] else y.float()
    for features in (h, h.bfloat16()):
        arguments = [t.to(device) for t in (weight, bias, features, y)]
        ours = last_layer_gradient(*arguments, loss=loss)
        wide = [t.double() if t.is_floating_point() else t for t in (weight, bias, features, y)]
        exact = twin.last_layer_gradient(*wide, loss=loss)
        plain = twin.last_layer_gradient(weight, bias, features.float(), y, loss=loss)
        for a, b, c in zip(ours, exact, plain, strict=True):
            error = float((a.cpu().double() - b).abs().max())
            assert error <= 2 * float((c.double() - b).abs().max()) + 1e-7 * float(b.abs().max())


@pytest.mark.parametrize("n", [3, 7, 49, 64])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_of_a_block_is_that_of_a_step(n, loss, isa):
    for k in (10, 33):
        weight, bias, h, y = problem(n, k, 300, loss)
        mean, _, _ = last_layer_gradient(weight, bias, h, y, loss=loss)
        order, none = torch.arange(n), (None, None)
        step = last_layer_epoch_(weight, bias, *none, h, y, order, batch_size=n, lr=0.0, loss=loss)
        assert torch.equal(mean, step[0])


def test_the_same_bits_for_any_number_of_threads(isa):
    weight, bias, h, y = problem(200, 10, 1031, dtype=torch.float32)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(last_layer_gradient(weight, bias, h, y))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("dtype", "h_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize(
    ("m", "k"), [(1, 1), (7, 1), (255, 1), (257, 1), (3000, 1), (9000, 1), (7, 32), (3000, 32)]
)
def test_a_logit_errs_by_less_than_its_constant(m, k, dtype, h_dtype):
    """In rational arithmetic; the logit of a squared error against 0 is its delta's half."""
    u = Fraction(torch.finfo(dtype).eps) / 2
    g = torch.Generator().manual_seed(m)
    nasty = torch.full((m,), (1.0 + 2**-5) * float(u) ** 0.5, dtype=torch.float64)
    nasty[0] = 1.0
    rows = [torch.rand(m, generator=g, dtype=torch.float64), nasty, nasty.flip(0)]
    for row in rows:
        h = row.to(h_dtype)[None]
        for weight in (h.to(dtype, copy=True), torch.randn(1, m, generator=g).to(dtype)):
            weight = weight.expand(k, m).contiguous()
            zero = torch.zeros(1, k, dtype=dtype)
            bias = torch.full((k,), 0.3, dtype=dtype)
            first, rule = torch.tensor([0]), {"batch_size": 1, "lr": 0.5, "loss": LOSSES[1]}

            def logit(layer=(weight, bias), data=(h, zero, first), rule=rule):
                """lr 1/2 on the bias alone: b - delta / 2 = b - q; its rounding is one more u."""
                w, b = (t.clone() for t in layer)
                last_layer_epoch_(w, b, None, None, *data, **rule)
                return Fraction(float(layer[1][-1])) - Fraction(float(b[-1]))

            pairs = zip(h[0].tolist(), weight[0].tolist(), strict=True)
            products = [Fraction(x) * Fraction(v) for x, v in pairs]
            exact = sum(products) + Fraction(float(bias[0]))
            size = sum(map(abs, products)) + Fraction(float(bias[0]))
            extra = 3 * u * (abs(exact) + Fraction(float(bias[0])))
            allowed = logit_error_constant(m, dtype, k=k) * u * size + extra
            assert all(abs(computed - exact) <= allowed for computed in on_each_isa(logit))


def test_the_constant_knows_the_library_s_order():
    assert (
        logit_error_constant(300, torch.float32)
        < 256
        < logit_error_constant(300, torch.float32, k=32)
    )
    assert (
        logit_error_constant(66_001, torch.float32)
        < 600
        < logit_error_constant(66_001, torch.float32, "cuda")
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h": torch.ones(4, 9)}, ValueError, "h: expected 8 features"),
        ({"h": torch.ones(0, 8), "target": torch.zeros(0).long()}, ValueError, "at least one"),
        ({"h": torch.ones(4, 8).half()}, TypeError, "h: expected torch.float32 or bfloat16"),
        ({"target": torch.tensor([0, 1, 3, 0])}, ValueError, "0 to 2, got 3 in row 2"),
        ({"target": torch.zeros(4)}, TypeError, "target: expected torch.int64"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias: expected shape \[3\]"),
        ({"loss": "hinge"}, ValueError, "loss: expected one of"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "weight": torch.zeros(3, 8),
        "bias": torch.zeros(3),
        "h": torch.ones(4, 8),
        "target": torch.tensor([0, 1, 2, 0]),
    }
    with pytest.raises(error, match=message):
        last_layer_gradient(**{**arguments, **change})
