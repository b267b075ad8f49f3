"""Softplus: values, special values, layouts, in place, errors."""

import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ISAS, instruction_set
from twophase_ext import softplus, softplus_

FLOATS = [torch.float32, torch.float64]
DTYPES = [torch.float16, torch.bfloat16, *FLOATS]
SMALLEST = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}
# exp(-BOTTOM) is near the smallest normal number
BOTTOM = {torch.float32: 87.0, torch.float64: 708.0}
BETAS = [1e-30, 0.5, 1.0, 100.0, 12345.678, 1e30]


def exact(x: float, beta: float) -> mpmath.mpf:
    with mpmath.workdps(50):
        x, beta = mpmath.mpf(x), mpmath.mpf(beta)
        return max(x, 0) + mpmath.log1p(mpmath.exp(-beta * abs(x))) / beta


def distances(y: torch.Tensor, truth: list) -> np.ndarray:
    """|y - truth|, the differences taken in high precision."""
    with mpmath.workdps(50):
        return np.array([float(abs(v - t)) for v, t in zip(y.tolist(), truth, strict=True)])


def formula(x: torch.Tensor, beta: float) -> torch.Tensor:
    """The exact formula in float64."""
    x = x.double()
    return x.clamp(min=0) + torch.log1p(torch.exp(-beta * x.abs())) / beta


def points(dtype: torch.dtype, beta: float, count: int = 300) -> torch.Tensor:
    """Arguments from the bottom of the range to beyond torch's threshold, dense where it bends."""
    generator = torch.Generator().manual_seed(7)
    spread = [BOTTOM[dtype], 20.0, 4.0]
    parts = [
        (torch.rand(count // 3, dtype=torch.float64, generator=generator) * 2 - 1) * s / beta
        for s in spread
    ]
    edges = torch.tensor([0.0, -0.0, 19.999, 20.001, 1.0, -1.0], dtype=torch.float64) / beta
    return torch.cat([*parts, edges]).to(dtype)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_value_against_mpmath(dtype, beta, isa):
    x = points(dtype, beta)
    truth = [exact(v, beta) for v in x.tolist()]
    ours = distances(softplus(x, beta), truth)
    # torch with its threshold, and with the threshold lifted as far as exp does not overflow
    bound = BOTTOM[dtype]
    for theirs in (F.softplus(x, beta), F.softplus(x, beta, threshold=bound)):
        for reach in (4.0, 20.0, bound):
            near = (x.double() * beta).abs().numpy() <= reach
            assert ours[near].max() <= 2 * distances(theirs, truth)[near].max()
    # Relative error: 5 units in the last place with a fused multiply-add; without one the rounding
    # of beta x, whose size is up to BOTTOM, enters the exponential.
    eps = torch.finfo(dtype).eps
    bound = (5 if isa != "baseline" else 5 + BOTTOM[dtype] / 2) * eps / 2
    floor = 1.001 * SMALLEST[dtype] * max(1.0, 1 / beta)
    relative = [float(e / t) for e, t in zip(ours, truth, strict=True) if t > floor]
    assert len(relative) > len(truth) // 2
    assert max(relative) <= bound


@pytest.mark.parametrize("beta", [1.0, 100.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_value_against_float64(dtype, beta, device, isa):
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(200_000, dtype=torch.float64, generator=generator) * 10 / beta).to(dtype)
    truth = formula(x, beta)
    theirs = (F.softplus(x, beta, threshold=BOTTOM[dtype]).double() - truth).abs().max()
    ours = (softplus(x.to(device), beta).cpu().double() - truth).abs().max()
    # where the dtype is float64 the truth itself has that dtype's rounding
    assert ours <= 2 * max(theirs.item(), torch.finfo(dtype).eps * truth.max().item())


@pytest.mark.parametrize("beta", [1.0, 100.0])
def test_no_threshold(beta, isa):
    # float64 alone can tell: beyond beta z = 20, exp(-beta z) < 2e-9 is lost beside z in float32
    z = torch.linspace(20.01, 30.0, 500, dtype=torch.float64) / beta
    assert bool((softplus(z, beta) > z).all())
    assert torch.equal(F.softplus(z, beta), z)  # the threshold that this function does not have


@pytest.mark.parametrize("beta", [1.0, 100.0, 1e30])
@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values(dtype, beta, device, isa):
    smallest = SMALLEST[dtype]
    tiny = smallest * torch.finfo(dtype).eps  # the smallest subnormal
    inf = math.inf
    largest = torch.finfo(dtype).max
    x = [math.nan, inf, -inf, -largest, largest]
    x += [-0.0, 0.0, tiny, -tiny, smallest / 2, -smallest / 2, -1e4 / beta]
    y = softplus(torch.tensor(x, dtype=dtype, device=device), beta).cpu().tolist()
    assert math.isnan(y[0])
    assert y[1] == inf
    assert y[2] == y[3] == y[11] == smallest
    assert y[4] == largest
    half = math.log(2) / beta
    assert y[5:11] == pytest.approx([half] * 6, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_never_subnormal(dtype, beta, isa):
    # across the place where the exact result becomes subnormal, and far beyond it
    depth = torch.linspace(0.9, 1.2, 20_001, dtype=torch.float64)
    extent = -math.log(SMALLEST[dtype]) - math.log(beta) if beta > 1 else BOTTOM[dtype]
    x = (-depth * max(extent, 1.0) / beta).to(dtype)
    y = softplus(x, beta)
    assert bool((y >= SMALLEST[dtype]).all())
    assert bool((y[:-1] >= y[1:]).all())  # decreasing to the left, the floor included
    assert y[-1] == SMALLEST[dtype]


@pytest.mark.parametrize("beta", [1.0, 3.7, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_pattern(dtype, beta, device, isa):
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    y = softplus(x.to(device), beta).cpu()
    # computed in float32, whose floor shows in bfloat16
    truth = formula(x, beta).clamp(min=SMALLEST[torch.float32]).to(dtype)
    assert torch.equal(y.isnan(), x.isnan())
    number = ~x.isnan()
    ulps = (y[number].view(torch.int16).int() - truth[number].view(torch.int16).int()).abs()
    assert ulps.max() <= 1
    assert (ulps > 0).float().mean() < 1e-3


def layouts(dtype=torch.float32, device="cpu") -> dict[str, torch.Tensor]:
    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, device=device).to(dtype)

    return {
        "contiguous": random(3, 4, 5),
        "channels_last": random(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "channels_last_3d": random(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
        "transposed": random(6, 7).t(),
        "permuted": random(3, 1, 4, 2).permute(2, 0, 3, 1),
        "rows with gaps": random(9, 8)[::2],
        "columns with gaps": random(9, 8)[:, 1:7:2],
        "offset": random(100)[3:],
        "scalar": random(),
        "empty": random(0, 3),
        "empty slice": random(5, 4)[:, 2:2],
        "one element, odd strides": random(4, 4)[1:2, 2:3],
        "long": random(70_001),
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(name, dtype, device, isa):
    x = layouts(dtype, device)[name]
    flat = softplus(x.contiguous().flatten(), 3.0)
    y = softplus(x, 3.0)
    assert y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
    assert y.stride() == torch.empty_like(x).stride()
    assert torch.equal(y.flatten(), flat)
    # derivatives, with gradients in another layout than y's
    g = torch.ones_like(x, memory_format=torch.contiguous_format) * 0.5
    s = torch.ops.twophase.softplus_backward(g, y, 3.0)
    assert s.stride() == torch.empty_like(y).stride()
    assert torch.equal(s.flatten(), torch.ops.twophase.softplus_backward(g.flatten(), flat, 3.0))


def test_expanded_input_and_expanded_gradient(isa):
    x = torch.randn(4, 1).expand(4, 3)
    y = softplus(x, 3.0)
    assert torch.equal(y, softplus(x.contiguous(), 3.0))
    one = torch.ones(()).expand(4, 3)  # what sum().backward() sends
    expected = torch.ops.twophase.softplus_backward(torch.ones(4, 3), y, 3.0)
    assert torch.equal(torch.ops.twophase.softplus_backward(one, y, 3.0), expected)


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(name, dtype, device, isa):
    x = layouts(dtype, device)[name]
    expected = softplus(x, 3.0)
    base = x if x._base is None else x._base
    memory = base.clone()
    untouched = torch.ones_like(base, dtype=torch.bool)
    untouched.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    pointer, strides, version = x.data_ptr(), x.stride(), x._version
    result = softplus_(x, 3.0)
    assert result is x and x.data_ptr() == pointer and x.stride() == strides
    assert torch.equal(x, expected)
    assert torch.equal(base[untouched], memory[untouched])
    assert x._version > version


def test_in_place_allocates_nothing_where_dense():
    x = torch.randn(8, 16, 32, 32).to(memory_format=torch.channels_last)
    with torch.profiler.profile(profile_memory=True) as profile:
        softplus_(x)
    assert sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages()) < 1024


def test_in_place_refuses_repeated_memory():
    column = torch.randn(4, 1)
    before = column.clone()
    with pytest.raises(ValueError, match=r"^x: expected .* do not share memory, got stride 0"):
        softplus_(column.expand(4, 3))
    assert torch.equal(column, before)


def test_in_place_refuses_leaves_and_leaves_them_alone():
    x = torch.randn(5, requires_grad=True)
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        softplus_(x)
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        softplus_(x[1:3])
    assert torch.equal(x.detach(), before)
    with torch.no_grad():
        softplus_(x, 3.0)
    assert torch.equal(x.detach(), softplus(before, 3.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count_and_offset(dtype, isa):
    x = layouts(dtype)["long"]
    reference = softplus(x, 3.0)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(softplus(x, 3.0), reference)
    for start in (1, 3, 7, 69_990):  # vector body and remainder agree
        assert torch.equal(softplus(x[start:], 3.0), reference[start:])


@st.composite
def strided(draw):
    """A tensor of any values (NaN, infinities, subnormals), shape, permutation and steps."""
    dtype = draw(st.sampled_from(FLOATS))
    width = 32 if dtype == torch.float32 else 64
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    number = st.floats(width=width)
    values = draw(st.lists(number, min_size=1, max_size=8))
    full = [n * s for n, s in zip(shape, steps, strict=True)]
    count = math.prod(full)
    base = torch.tensor((values * (count // len(values) + 1))[:count], dtype=dtype).reshape(full)
    x = base[tuple(slice(None, None, s) for s in steps)]
    return x.permute(draw(st.permutations(range(len(shape))))) if shape else x


@settings(max_examples=100)
@given(strided(), st.sampled_from([0.5, 1.0, 100.0]), st.sampled_from(ISAS))
def test_any_tensor(x, beta, isa):
    with instruction_set(isa):
        y, in_place = softplus(x, beta), softplus_(x.clone(), beta)
    truth = formula(x, beta)
    smallest = SMALLEST[x.dtype]
    assert torch.equal(y.isnan(), x.isnan())
    assert bool(((y >= smallest) | y.isnan()).all())
    assert bool(((y >= x) | y.isnan()).all())
    finite = truth.isfinite()
    error = (y.double() - truth).abs()[finite]
    # beta x is rounded before its exponential is taken: in the truth, and in kernels without FMA
    reach = (beta * x.double().abs()[finite]).clamp(max=BOTTOM[x.dtype])
    bound = (4 + reach) * torch.finfo(x.dtype).eps * truth[finite]
    assert bool((error <= bound + 2 * smallest * max(1, 1 / beta)).all())
    torch.testing.assert_close(in_place, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("beta", [0, -1.0, math.nan, math.inf, -math.inf, 1e-31, 1e31])
@pytest.mark.parametrize("function", [softplus, softplus_])
def test_bad_beta(function, beta):
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^beta: expected a number between .* got"):
        function(x, beta)
    assert not x.any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
@pytest.mark.parametrize("function", [softplus, softplus_])
def test_bad_dtype(function, dtype):
    with pytest.raises(ValueError, match=r"^x: expected a floating-point tensor, got"):
        function(torch.zeros(3, dtype=dtype))


def test_arrays_share_their_memory():
    x = np.linspace(-0.1, 0.1, 12).reshape(3, 4).T
    y = softplus(x)
    assert y.dtype == torch.float64 and y.stride() == (1, 4)
    assert torch.equal(y, softplus(torch.from_numpy(x)))
    with pytest.raises(ValueError, match=r"^x: expected a floating-point tensor, got Long"):
        softplus(np.arange(3))


@pytest.mark.parametrize("function", [softplus, softplus_])
def test_bad_types(function):
    with pytest.raises(TypeError, match=r"^x: expected a .*, got str"):
        function("1.0")
    with pytest.raises(TypeError, match=r"^x: expected a torch.Tensor, got ndarray"):
        softplus_(np.zeros(3))  # a read-only array would be copied, and not written
    for beta in ("100", None, torch.tensor(1.0)):
        with pytest.raises(TypeError, match=r"^beta: expected a number, got"):
            function(torch.zeros(3), beta)


def test_shapes_are_checked():
    y = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"^grad: expected the shape of y \[3, 4\], got \[4, 3\]"):
        torch.ops.twophase.softplus_backward(y.t(), y, 1.0)
    with pytest.raises(ValueError, match=r"^grad_grad: expected the shape of y"):
        torch.ops.twophase.softplus_double_backward(y[0], y, y, 1.0)
    with pytest.raises(ValueError, match=r"^grad: expected the shape of y"):
        torch.ops.twophase.softplus_double_backward(y, y[0], y, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_large_results_are_the_same_bits(dtype):
    """From 32 MiB on, results are stored past the caches; slices of them are not."""
    count = (32 << 20) // dtype.itemsize + 5
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = x.split(1 << 20)
    y = softplus(x)
    assert torch.equal(y, torch.cat([softplus(part) for part in parts]))
    back = torch.ops.twophase.softplus_backward
    grads = torch.cat([back(part, softplus(part), 100.0) for part in parts])
    assert torch.equal(back(x, y, 100.0), grads)
