"""Softplus: derivatives of every order, torch.func, forward mode, torch.compile, opcheck."""

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from twophase_ext import softplus, softplus_

ops = torch.ops.twophase
BETA = 3.0
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def smooth(z: torch.Tensor) -> torch.Tensor:
    """The float64 formula, by an operation of torch that is differentiable to any order."""
    return torch.logaddexp(BETA * z, torch.zeros_like(z)) / BETA


def ours(z: torch.Tensor) -> torch.Tensor:
    return softplus(z, BETA)


def ours_in_place(z: torch.Tensor) -> torch.Tensor:
    return softplus_(z * 1.0, BETA)


def data(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a, b) -> None:
    """Equal but for some roundings of float64: wrong formulas are off by 1e-2 and more."""
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def derivatives(function, x, g, gg):
    """(dx, and the double backward by g and by x) of one function, from plain autograd."""
    x, g = x.clone().requires_grad_(), g.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, g, create_graph=True)
    by_g, by_x = torch.autograd.grad(first, (g, x), gg)
    return first.detach(), by_g, by_x


@pytest.mark.parametrize("beta", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_backwards_against_mpmath(dtype, beta, isa):
    x, g, gg = (data(400, seed=k).to(dtype) for k in range(3))
    x = (x.double() * 4 / beta).to(dtype)
    with mpmath.workdps(40):
        truth = []
        for a, b, c in zip(x.tolist(), g.tolist(), gg.tolist(), strict=True):
            s = 1 / (1 + mpmath.exp(-mpmath.mpf(beta) * a))
            truth.append((b * s, c * s, mpmath.mpf(c) * b * beta * s * (1 - s)))

        def errors(function):
            results = (t.tolist() for t in derivatives(function, x, g, gg))
            return [
                float(max(abs(p - q) for p, q in zip(result, column, strict=True)))
                for result, column in zip(results, zip(*truth, strict=True), strict=True)
            ]

        mine = errors(lambda z: softplus(z, beta))
        for theirs in (F.softplus, lambda z, b: F.softplus(z, b, threshold=80.0)):
            for e, t in zip(mine, errors(lambda z, f=theirs: f(z, beta)), strict=True):
                assert e <= 2 * t


@pytest.mark.parametrize("beta", [1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_backwards_against_float64(dtype, beta, device):
    x, g, gg = (data(50_000, seed=k) for k in range(3))
    x, g, gg = ((t * f).to(dtype).to(device) for t, f in ((x, 4 / beta), (g, 1), (gg, 1)))
    s = torch.sigmoid(beta * x.double())
    s_rest = torch.sigmoid(-beta * x.double())
    truth = (g * s, gg * s, gg.double() * g.double() * beta * s * s_rest)
    mine = derivatives(lambda z: softplus(z, beta), x, g, gg)
    theirs = derivatives(lambda z: F.softplus(z, beta, threshold=80.0), x, g, gg)
    for a, b, t in zip(mine, theirs, truth, strict=True):
        rounding = 4 * torch.finfo(torch.float64).eps * t.abs().max()  # of the truth itself
        assert (a.double() - t).abs().max() <= 2 * (b.double() - t).abs().max() + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_at_the_ends(dtype, device):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1e4, 1e4], dtype=dtype)
    x = x.to(device).requires_grad_()
    softplus(x).sum().backward()
    assert x.grad[0].isnan()
    assert x.grad[1:].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_backward_makes_no_subnormals(isa):
    x = torch.linspace(-1.2, 0.1, 10_001).requires_grad_()
    softplus(x).sum().backward()
    assert bool(((x.grad == 0) | (x.grad >= 2.0**-64)).all())
    assert 0 < int((x.grad == 0).sum()) < 10_000


@pytest.mark.parametrize("function", [ours, ours_in_place])
def test_gradcheck(function):
    x = data(3, 4).requires_grad_()
    assert gradcheck(
        function,
        x,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(function, x, check_fwd_over_rev=True, check_batched_grad=True)


def test_gradcheck_in_place_on_a_view():
    def function(z):
        w = z * 1.0
        softplus_(w[:, 1:3], BETA)
        return w

    x = data(3, 4).requires_grad_()
    assert gradcheck(function, x, check_forward_ad=True)
    assert gradgradcheck(function, x)


def test_gradcheck_of_the_raw_operators():
    gg, g, y = data(5, seed=2), data(5, seed=3), smooth(data(5))
    for t in (gg, g, y):
        t.requires_grad_()
    assert gradcheck(lambda z: ops.softplus(z, BETA), g)
    assert gradcheck(lambda *t: ops.softplus_backward(*t, BETA), (g, y))
    assert gradgradcheck(lambda *t: ops.softplus_backward(*t, BETA), (g, y))
    assert gradcheck(lambda *t: ops.softplus_double_backward(*t, BETA), (gg, g, y))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_high_orders_in_both_modes(order):
    """Nested jvps: plain operations inside a jvp lose the outer levels' tangents silently."""
    z = data(7)

    def forward(f):
        for _ in range(order):
            f = (lambda h: lambda t: jvp(h, (t,), (torch.ones_like(t),))[1])(f)
        return f(z)

    def reverse(f):
        for _ in range(order):
            f = (lambda h: lambda t: vjp(h, t)[1](torch.ones_like(t))[0])(f)
        return f(z)

    expected = reverse(smooth)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(forward(ours), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(reverse(ours), expected, rtol=1e-11, atol=1e-11)


def test_third_derivative_by_autograd():
    def third(f):
        x = data(9).requires_grad_()
        value = f(x)
        for _ in range(3):
            (value,) = torch.autograd.grad((value**2).sum(), x, create_graph=True)
        return value

    torch.testing.assert_close(third(ours), third(smooth), rtol=1e-11, atol=1e-11)


X, V = data(4, 5), data(4, 5, seed=2)


def energy(f):
    return lambda z: (f(z) ** 2).sum()


TRANSFORMS = {
    "vmap": lambda f: vmap(f)(X),
    "vmap dim 1": lambda f: vmap(f, in_dims=1, out_dims=1)(X),
    "vmap dim -1": lambda f: vmap(f, in_dims=-1)(X),
    "vmap vmap": lambda f: vmap(vmap(f), in_dims=1)(X),
    "vmap of a vmap's slices": lambda f: vmap(lambda z: f(z[::2]))(X),
    "grad": lambda f: grad(energy(f))(X),
    "vjp": lambda f: vjp(f, X)[1](V)[0],
    "jvp": lambda f: jvp(f, (X,), (V,)),
    "vmap grad": lambda f: vmap(grad(energy(f)))(X),
    "vmap jvp": lambda f: vmap(lambda z, v: jvp(f, (z,), (v,)))(X, V),
    "vmap over tangents": lambda f: vmap(lambda v: jvp(f, (X[0],), (v,)))(V),
    "vmap over cotangents": lambda f: vmap(lambda v: vjp(f, X[0])[1](v)[0])(V),
    "hessian": lambda f: hessian(energy(f))(X[0]),
    "vmap hessian": lambda f: vmap(hessian(energy(f)))(X),
    "jacrev jacrev": lambda f: jacrev(jacrev(energy(f)))(X[0]),
    "jacrev jacfwd": lambda f: jacrev(jacfwd(energy(f)))(X[0]),
    "three forward": lambda f: jacfwd(jacfwd(jacfwd(f)))(X[0]),
    "forward reverse reverse": lambda f: jacfwd(jacrev(jacrev(energy(f))))(X[0]),
    "reverse forward forward": lambda f: jacrev(jacfwd(jacfwd(energy(f))))(X[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_func(name):
    transform = TRANSFORMS[name]
    expected = transform(smooth)
    if name != "jvp":
        assert all(t.abs().max() > 1e-2 for t in torch.utils._pytree.tree_leaves(expected))
    close(transform(ours), expected)


@pytest.mark.parametrize("name", ["vmap", "grad", "jvp", "vmap grad", "vmap jvp", "hessian"])
def test_func_in_place(name):
    close(TRANSFORMS[name](ours_in_place), TRANSFORMS[name](smooth))


def test_linearize():
    _, tangent = linearize(ours, X)
    close(tangent(V), jvp(smooth, (X,), (V,))[1])


@pytest.mark.parametrize("function", [ours, ours_in_place])
def test_dual_numbers(function):
    x = X.clone().requires_grad_()
    expected = jvp(smooth, (X,), (V,))[1]
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, V)))
        close(value, smooth(X))
        close(tangent, expected)
        (mixed,) = torch.autograd.grad(tangent.sum(), x)  # reverse over forward
    close(mixed, V * grad(lambda z: jvp(smooth, (z,), (torch.ones_like(z),))[1].sum())(X))


def test_dual_numbers_change_the_tensor_itself():
    expected = jvp(smooth, (X,), (V,))[1]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X.clone(), V.clone())
        assert softplus_(dual, BETA) is dual
        close(forward_ad.unpack_dual(dual).tangent, expected)


def test_changed_output_is_noticed():
    for function in (ours, ours_in_place):
        y = function(X.clone().requires_grad_())
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    def tensor(seed):
        return data(4, 5, seed=seed).to(device).requires_grad_(requires_grad)

    y = ops.softplus(tensor(0).detach(), BETA).requires_grad_(requires_grad)
    cases = [
        (ops.softplus, (tensor(0), BETA)),
        (ops.softplus, (tensor(0).t(), BETA)),
        (ops.softplus_, (tensor(0).detach(), BETA)),
        (ops.softplus_backward, (tensor(1), y, BETA)),
        (ops.softplus_double_backward, (tensor(2), tensor(1), y, BETA)),
    ]
    for op, arguments in cases:
        results = torch.library.opcheck(op, arguments)
        assert set(results.values()) == {"SUCCESS"}


def test_meta_tensors():
    x = torch.empty(4, 5, device="meta").t()
    assert softplus(x).stride() == x.stride()
    assert softplus_(x) is x


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield lambda f, backend="aot_eager": torch.compile(f, backend=backend, fullgraph=True)
    torch.compiler.reset()


@pytest.mark.slow
def test_compile_by_inductor(compiled):
    def forward(z):
        w = z * 2  # the in-place form overwrites an intermediate
        return (softplus(z, BETA) * softplus_(w, BETA)).sum()

    x = X.float().requires_grad_()
    loss = compiled(forward, "inductor")(x)
    loss.backward()
    exact_x = X.clone().requires_grad_()
    exact = (smooth(exact_x) * smooth(exact_x * 2)).sum()
    exact.backward()
    torch.testing.assert_close(loss.double(), exact)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-6)


def test_compile_in_place_on_the_input(compiled):
    x = X.clone()
    pointer = x.data_ptr()
    result = compiled(lambda z: softplus_(z, BETA))(x)
    assert result.data_ptr() == pointer == x.data_ptr()
    close(x, smooth(X))


@pytest.mark.parametrize(
    "name", ["vmap dim 1", "grad", "vjp", "jvp", "vmap grad", "hessian", "jacrev jacrev"]
)
def test_compile_around_func(name, compiled):
    # the raw operator gave zeros for jvp here, and no grad at all
    transform = TRANSFORMS[name]
    close(compiled(lambda: transform(ours))(), transform(smooth))


def test_compile_keeps_one_graph_for_new_sizes():
    torch.compiler.reset()
    graphs = []
    function = torch.compile(ours, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True)
    for n in (3, 5, 7, 9):
        close(function(X.new_ones(n, 4)), smooth(X.new_ones(n, 4)))
    assert len(graphs) <= 2  # one for the first size, one for any size


@pytest.mark.parametrize("compile_it", [False, True])
def test_autocast(compile_it, compiled):
    def layer(z, w):
        return softplus(z @ w, BETA)

    z, w = X.float().requires_grad_(), V.t().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = (compiled(layer) if compile_it else layer)(z, w)
        assert softplus(z, BETA).dtype == torch.float32  # as it comes
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert z.grad.dtype == w.grad.dtype == torch.float32
    exact = X.clone().requires_grad_()
    smooth(exact @ V.t()).sum().backward()
    assert (z.grad - exact.grad).abs().max() <= 2**-6 * exact.grad.abs().max()
