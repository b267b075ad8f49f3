"""The smooth maximum over pooling windows: values, gradients, layouts, special values, errors."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import instruction_set
from twophase import reference
from twophase_ext.ops import smooth_max_pool

ops = torch.ops.twophase
POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
FLOATS = [torch.float32, torch.float64]
DTYPES = [torch.float16, torch.bfloat16, *FLOATS]


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def exact(x: list[float], beta: float) -> tuple[mpmath.mpf, list[mpmath.mpf]]:
    """The smooth maximum of some numbers, and its gradient."""
    powers = [mpmath.exp(mpmath.mpf(beta) * v) for v in x]
    total = mpmath.fsum(powers)
    return mpmath.log(total) / beta, [power / total for power in powers]


@pytest.mark.parametrize("beta", [1e-3, 1.0, 100.0, 1e5])
@pytest.mark.parametrize("count", [1, 2, 9, 130])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_and_gradients_against_mpmath(dtype, count, beta, isa):
    """Windows apart: every output has numbers of its own. Near each other, far apart, and equal."""
    size = torch.tensor([0.1, 3.0, 40.0, 0.0], dtype=torch.float64).repeat_interleave(5)
    x = (data(20, count) * size[:, None] / beta + data(20, 1, seed=1)).to(dtype)
    g = data(20, 1, seed=2, dtype=dtype)
    settings = ([count], [count], [0], [1], False, beta)
    y = ops.smooth_max_pool(x, *settings)
    by_x = ops.smooth_max_pool_backward(g, x, *settings)
    theirs = torch.logsumexp(beta * x, 1) / beta
    their_weights = torch.softmax(beta * x, 1) * g
    u = torch.finfo(dtype).eps / 2
    with mpmath.workdps(50):
        errors: list[list[float]] = [[], [], [], []]
        for i in range(20):
            top, weights = exact(x[i].tolist(), beta)
            off = float(abs(y[i, 0].item() - top))
            # the bound of the proofs (expressivity/running/reductions.py)
            allowed = (count + 16 + 12 * math.log(count)) * u / beta
            assert off <= u * abs(y[i, 0].item()) + allowed
            errors[0].append(off)
            errors[1].append(float(abs(theirs[i].item() - top)))
            share = mpmath.mpf(g[i].item())
            for found, row in ((errors[2], by_x[i]), (errors[3], their_weights[i])):
                pairs = zip(row.tolist(), weights, strict=True)
                found.append(max(float(abs(v - share * w)) for v, w in pairs))
    assert max(errors[0]) <= 2 * max(errors[1]) + u * float(y.abs().max())
    assert max(errors[2]) <= 2 * max(errors[3]) + 8 * u * float(g.abs().max())


@st.composite
def pools(draw):
    """(x, arguments of the operator) that torch's max pooling takes."""
    axes = draw(st.integers(1, 3))
    along = []
    for _ in range(axes):
        kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        padding = draw(st.integers(0, kernel // 2))
        span = dilation * (kernel - 1) + 1
        size = max(1, span - 2 * padding) + draw(st.integers(0, 9))
        along.append((kernel, draw(st.integers(1, 5)), padding, dilation, size))
    kernel, stride, padding, dilation, sizes = (list(v) for v in zip(*along, strict=True))
    outer = draw(st.sampled_from([(1, 1), (2, 3), (3,), (0, 2)]))
    x = data(*outer, *sizes, seed=draw(st.integers(0, 99)))
    return x, (kernel, stride, padding, dilation, draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(pools(), st.booleans())
def test_windows_are_those_of_torch(pool, channels_last):
    x, arguments = pool
    axes = len(arguments[0])
    if channels_last and x.dim() == axes + 2 and axes > 1:
        x = x.contiguous(memory_format=LAST[axes])
    y = ops.smooth_max_pool(x, *arguments, 20.0)
    theirs = POOLS[axes](x, *arguments)
    assert y.shape == theirs.shape
    empty = y == -math.inf  # a dilated window may lie in the padding altogether
    assert torch.equal(empty, theirs == -math.inf)
    torch.testing.assert_close(y, reference.smooth_max_pool(x, *arguments, 20.0))
    g = data(*y.shape, seed=5).masked_fill(empty, 0.0)
    by_x = ops.smooth_max_pool_backward(g, x, *arguments, 20.0)
    assert by_x.stride() == x.stride()
    if not bool(empty.any()):
        expected = reference.smooth_max_pool_backward(g, x, *arguments, 20.0)
        torch.testing.assert_close(by_x, expected, rtol=1e-12, atol=1e-13)


# Larger than what is computed at once: images that are cut along each dimension, many small ones.
LARGE = {
    "rows": (data(2, 2, 150, 160), [3, 3], [2, 2]),
    "line": (data(1, 2, 50_000), [5], [2]),
    "slices": (data(1, 1, 12, 90, 50), [2, 3, 3], [1, 2, 2]),
    "many": (data(40, 50, 9, 8), [3, 3], [2, 2]),
    "channels": (data(2, 70, 40, 33), [3, 2], [2, 1]),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_large_images(name, channels_last, isa):
    x, kernel, stride = LARGE[name]
    axes = len(kernel)
    if channels_last:
        if axes == 1:
            pytest.skip("torch has no such format")
        x = x.contiguous(memory_format=LAST[axes])
    arguments = (kernel, stride, [1] * axes, [1] * axes, True, 20.0)
    y = ops.smooth_max_pool(x, *arguments)
    torch.testing.assert_close(y, reference.smooth_max_pool(x, *arguments))
    assert not channels_last or y.is_contiguous(memory_format=LAST[axes])
    g = data(*y.shape, seed=5)  # not in the layout of y
    by_x = ops.smooth_max_pool_backward(g, x, *arguments)
    expected = reference.smooth_max_pool_backward(g, x, *arguments)
    torch.testing.assert_close(by_x, expected, rtol=1e-12, atol=1e-13)
    # one sum in float32 for each number of a 16-bit gradient
    half = x.half()
    by_half = ops.smooth_max_pool_backward(g.half(), half, *arguments)
    wide = ops.smooth_max_pool_backward(g.half().float(), half.float(), *arguments)
    assert (by_half.float() - wide).abs().max() <= 2**-11 * wide.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count_and_layout(dtype, isa):
    x = data(5, 70, 33, 40).to(dtype)
    arguments = ([3, 2], [2, 2], [1, 1], [1, 1], False, 30.0)
    g = data(*ops.smooth_max_pool(x, *arguments).shape, seed=1).to(dtype)

    def both(x):
        y = ops.smooth_max_pool(x, *arguments)
        return y, ops.smooth_max_pool_backward(g, x, *arguments)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = both(x)
        strided = x.new_zeros(5, 70, 66, 40)[:, :, ::2].copy_(x)
        layouts = [both(strided)]
        torch.set_num_threads(3)
        layouts += [both(x), (both(x.contiguous(memory_format=LAST[2]))[0], one[1])]
    finally:
        torch.set_num_threads(before)
    for y, by_x in layouts:
        assert torch.equal(y, one[0])
        assert torch.equal(by_x, one[1])


def test_instruction_sets_agree_to_rounding(isa):
    x = data(3, 5, 20, 21)
    arguments = ([3, 3], [1, 2], [1, 0], [1, 2], True, 5.0)
    with instruction_set("baseline"):
        plain = ops.smooth_max_pool(x, *arguments)
    torch.testing.assert_close(ops.smooth_max_pool(x, *arguments), plain, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values(dtype, isa):
    inf, nan = math.inf, math.nan
    rows = [[nan, 1, 2], [1, nan, inf], [inf, 1, -inf], [-inf, -inf, -inf], [1, -inf, 0], [inf] * 3]
    x = torch.tensor(rows, dtype=dtype).requires_grad_()
    y = smooth_max_pool(x, 3, axes=1)[:, 0]
    assert bool(y[:2].isnan().all()) and y[2:].tolist() == [inf, -inf, 1.0, inf]
    y[3:5].sum().backward()
    small = 0.0 if dtype == torch.float32 else pytest.approx(math.exp(-100), rel=1e-12)
    # a gradient where the maximum is infinite is none; it stays within its window
    assert bool(x.grad[3].isnan().all()) and x.grad[4].tolist() == [1.0, 0.0, small]
    # windows that are computed, and read by nobody, mix the end of a row with the next one
    wide = torch.zeros(1, 4, 8, dtype=dtype)
    wide[0, 1, 0] = nan
    wide.requires_grad_()
    smooth_max_pool(wide, 3, 1, axes=2)[0, 2:].sum().backward()  # rows 2 and 3 alone
    smooth_max_pool(wide[:, 2:], 2, 2, axes=2).sum().backward()
    assert bool(wide.grad[0, 0].isfinite().all()) and bool(wide.grad[0, 2:].isfinite().all())
    # far apart: no subnormal on the way, and no product with one
    far = torch.linspace(-1, 0, 512, dtype=dtype).view(1, 1, -1).requires_grad_()
    smooth_max_pool(far, 512, axes=1, beta=300.0 if dtype == torch.float32 else 2000.0).backward()
    least = 2.0 ** (-64 if dtype == torch.float32 else -512)
    assert bool(((far.grad == 0) | (far.grad > least / 512)).all())
    assert 0 < int((far.grad == 0).sum()) < 512


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_rounded_once(dtype):
    x = data(2, 3, 9, 9).to(dtype)
    arguments = ([3, 3], [2, 2], [1, 1], [1, 1], False, 30.0)
    y = ops.smooth_max_pool(x, *arguments)
    assert y.dtype == dtype
    assert torch.equal(y, ops.smooth_max_pool(x.float(), *arguments).to(dtype))


BAD = {
    "x: expected 3 or 4 dimensions, got 2": (torch.zeros(3, 3), (2,), {}),
    "x: expected a floating-point tensor, got Long": (
        torch.zeros(1, 3, 3, dtype=torch.int64),
        (2,),
        {},
    ),
    "x: expected at least 4 numbers in dimension 2, got 3": (torch.zeros(1, 4, 3), (4,), {}),
    "kernel_size: expected numbers from 1, got 0": (torch.zeros(1, 3, 3), (0, 1), {}),
    "stride: expected numbers from 1, got -1": (torch.zeros(1, 3, 3), (2, -1), {}),
    "padding: expected at most half of the kernel size 2, got 2": (
        torch.zeros(1, 3, 3),
        (2, 1, 2),
        {},
    ),
    "dilation: expected numbers from 1, got 0": (torch.zeros(1, 3, 3), (2, 1, 0, 0), {}),
    "padding: expected 2 numbers, one a dimension, got 3": (
        torch.zeros(1, 3, 3),
        (2, 1, (0, 0, 0)),
        {},
    ),
    "kernel_size: expected one number or 2, one a dimension": (
        torch.zeros(1, 3, 3),
        ((2, 2, 2),),
        {},
    ),
    "axes: expected 1, 2 or 3, got 4": (torch.zeros(1, 3, 3), (2,), {"axes": 4}),
    "beta: expected a number between 1e-30 and 1e30, got 0": (
        torch.zeros(1, 3, 3),
        (2,),
        {"beta": 0},
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals(message):
    x, arguments, named = BAD[message]
    with pytest.raises(ValueError, match=f"^{message}".replace("+", r"\+")):
        smooth_max_pool(x, *arguments, **named)


def test_wrong_types_and_shapes():
    with pytest.raises(TypeError, match=r"^x: expected a torch.Tensor, got list"):
        smooth_max_pool([1.0], 2)
    with pytest.raises(TypeError, match=r"^beta: expected a number, got str"):
        smooth_max_pool(torch.zeros(1, 3, 3), 2, beta="1")
    x, arguments = torch.zeros(1, 4, 4), ([2, 2], [2, 2], [0, 0], [1, 1], False, 1.0)
    with pytest.raises(ValueError, match=r"^grad: expected the shape of the result \[1, 2, 2\]"):
        ops.smooth_max_pool_backward(x, x, *arguments)
