"""The smooth maximum over windows: derivatives, torch.func, forward mode, compiled, opcheck."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from twophase import reference
from twophase_ext.ops import smooth_max_pool

ops = torch.ops.twophase
SETTINGS = {
    1: ([3], [2], [1], [1], True, 3.0),
    2: ([3, 2], [2, 1], [1, 0], [1, 2], False, 3.0),
    3: ([2, 2, 3], [1, 2, 3], [1, 0, 1], [1, 1, 1], True, 3.0),
}
SIZES = {1: (7,), 2: (4, 4), 3: (2, 3, 4)}


def data(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ours(z: torch.Tensor) -> torch.Tensor:
    kernel, stride, padding, dilation, ceil_mode, beta = SETTINGS[2]
    return smooth_max_pool(z, kernel, stride, padding, dilation, ceil_mode, beta=beta)


def truth(z: torch.Tensor) -> torch.Tensor:
    return reference.smooth_max_pool(z, *SETTINGS[2])


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_gradcheck(axes):
    kernel, stride, padding, dilation, ceil_mode, beta = SETTINGS[axes]

    def function(z):
        return smooth_max_pool(
            z, kernel, stride, padding, dilation, ceil_mode, axes=axes, beta=beta
        )

    x = data(2, *SIZES[axes]).requires_grad_()
    assert gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, x, check_fwd_over_rev=True)


def test_gradcheck_of_the_raw_operators():
    x = data(1, 2, 4, 4).requires_grad_()
    g = data(*truth(x).shape, seed=2).requires_grad_()
    assert gradcheck(lambda z: ops.smooth_max_pool(z, *SETTINGS[2]), x)
    assert gradcheck(lambda *t: ops.smooth_max_pool_backward(*t, *SETTINGS[2]), (g, x))
    assert gradgradcheck(lambda *t: ops.smooth_max_pool_backward(*t, *SETTINGS[2]), (g, x))


def test_third_derivative_by_autograd():
    def third(f):
        x = data(2, 4, 5).requires_grad_()
        value = f(x)
        for _ in range(3):
            (value,) = torch.autograd.grad((value**2).sum(), x, create_graph=True)
        return value

    torch.testing.assert_close(third(ours), third(truth), rtol=1e-9, atol=1e-9)


X, V = data(3, 2, 4, 4), data(3, 2, 4, 4, seed=2)
W = data(*truth(X).shape, seed=3)


def energy(f):
    return lambda z: (f(z) ** 2).sum()


TRANSFORMS = {
    "vmap": lambda f: vmap(f)(X),
    "vmap dim 1": lambda f: vmap(f, in_dims=1, out_dims=1)(X),
    "vmap of batches": lambda f: vmap(f)(X[:, None].expand(3, 5, 2, 4, 4)),
    "vmap vmap": lambda f: vmap(vmap(f), in_dims=1)(X[:, :, None]),
    "grad": lambda f: grad(energy(f))(X),
    "vjp": lambda f: vjp(f, X)[1](W)[0],
    "jvp": lambda f: jvp(f, (X,), (V,)),
    "vmap grad": lambda f: vmap(grad(energy(f)))(X),
    "vmap jvp": lambda f: vmap(lambda z, v: jvp(f, (z,), (v,)))(X, V),
    "vmap over cotangents": lambda f: vmap(lambda w: vjp(f, X[0])[1](w)[0])(W),
    "hessian": lambda f: hessian(energy(f))(X[0]),
    "jacrev jacrev": lambda f: jacrev(jacrev(energy(f)))(X[0]),
    "jacrev jacfwd": lambda f: jacrev(jacfwd(energy(f)))(X[0]),
    "forward forward": lambda f: jacfwd(jacfwd(energy(f)))(X[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_func(name):
    transform = TRANSFORMS[name]
    expected = transform(truth)
    assert all(t.abs().max() > 1e-2 for t in torch.utils._pytree.tree_leaves(expected))
    close(transform(ours), expected)


def test_dual_numbers():
    x, expected = X.clone().requires_grad_(), jvp(truth, (X,), (V,))
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, V)))
        close((value, tangent), expected)
        (mixed,) = torch.autograd.grad(tangent.sum(), x)
    close(mixed, grad(lambda z: jvp(truth, (z,), (V,))[1].sum())(X))


def test_the_first_derivative_is_the_kernel_s():
    x = X.clone().requires_grad_()
    with torch.profiler.profile() as seen:
        ours(x).sum().backward()
    names = {event.key for event in seen.key_averages()}
    assert {"twophase::smooth_max_pool", "twophase::smooth_max_pool_backward"} <= names
    assert "aten::logsumexp" not in names


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    x = data(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    g = data(*truth(x).shape, seed=2).requires_grad_(requires_grad)
    cases = [
        (ops.smooth_max_pool, (x.requires_grad_(requires_grad), *SETTINGS[2])),
        (ops.smooth_max_pool_backward, (g, x, *SETTINGS[2])),
    ]
    for op, arguments in cases:
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 1, 5, 4), (1, 3, 1, 1), (0, 3, 5, 4)])
def test_fake_kernels_have_the_strides(shape):
    settings = ([1, 1], [2, 1], [0, 0], [1, 1], False, 3.0)
    x = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    for tensor in (x, x.contiguous(), x.transpose(2, 3), x[:, :, ::2], x[:, :1]):
        meta = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")
        y, fake = (ops.smooth_max_pool(t, *settings) for t in (tensor, meta))
        theirs = F.max_pool2d(tensor, 1, (2, 1))
        formats = (torch.contiguous_format, torch.channels_last)
        for kept in formats:
            assert y.is_contiguous(memory_format=kept) >= theirs.is_contiguous(memory_format=kept)
        assert (y.shape, y.stride()) == (fake.shape, fake.stride())
        by = ops.smooth_max_pool_backward(y, tensor, *settings)
        fake = ops.smooth_max_pool_backward(fake, meta, *settings)
        assert (by.shape, by.stride()) == (fake.shape, fake.stride())


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["vmap dim 1", "grad", "vjp", "jvp", "vmap grad", "jacrev jacrev"])
def test_compile_around_func(name, compiled):
    transform = TRANSFORMS[name]
    close(compiled(lambda: transform(ours))(), transform(truth))


def test_compile_and_train(compiled):
    x = X.clone().requires_grad_()
    compiled(energy(ours))(x).backward()
    close(x.grad, grad(energy(truth))(X))
