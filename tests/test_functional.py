"""torch.func over tp.softplus and a model with tp.nn.Softplus, against torch in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import twophase_ext as tp

BETA = 3.0


class Smooth(nn.Module):
    """The same function by an operation of torch that is differentiable to any order."""

    def forward(self, x):
        return torch.logaddexp(BETA * x, torch.zeros_like(x)) / BETA


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(activation, seed: int = 0) -> nn.Module:
    layers = [nn.Linear(3, 4), activation(), nn.Linear(4, 5), activation(), nn.Linear(5, 2)]
    model = nn.Sequential(*layers).double()
    for k, p in enumerate(model.parameters()):
        p.data.copy_(numbers(*p.shape, seed=seed + k))
    return model


X, Y = numbers(6, 3), torch.arange(6) % 2
ACTIVATIONS = {
    "tp.nn.Softplus": lambda: tp.nn.Softplus(BETA),
    "in place": lambda: tp.nn.Softplus(BETA, inplace=True),
}


def closures(model):
    """(parameters, outputs of the parameters and one input, mean loss of the parameters)."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def outputs(p, x):
        return functional_call(model, p, (x,))

    def loss(p, x=X, y=Y):
        return nn.functional.cross_entropy(outputs(p, x), y)

    return parameters, outputs, loss


def per_sample_gradients(model):
    p, _, loss = closures(model)
    one = lambda p, x, y: loss(p, x[None], y[None])  # noqa: E731
    return vmap(grad(one), in_dims=(None, 0, 0))(p, X, Y)


def parameter_jvp(model):
    p, outputs, _ = closures(model)
    tangent = {n: numbers(*t.shape, seed=9) for n, t in p.items()}
    return jvp(lambda q: outputs(q, X), (p,), (tangent,))


def hessian_vector(model):
    p, _, loss = closures(model)
    tangent = {n: numbers(*t.shape, seed=9) for n, t in p.items()}
    return jvp(grad(loss), (p,), (tangent,))[1]


def ensemble(model):
    models = [model, build(lambda: model[1], seed=20)]
    parameters, buffers = stack_module_state(models)
    return vmap(lambda p, b: functional_call(model, (p, b), (X,)))(parameters, buffers)


TRANSFORMS = {
    "grad": lambda m: grad(closures(m)[2])(closures(m)[0]),
    "gradients of each sample": per_sample_gradients,
    "jacrev": lambda m: jacrev(closures(m)[1])(closures(m)[0], X),
    "jacfwd": lambda m: jacfwd(closures(m)[1])(closures(m)[0], X),
    "jacobian by the input, each sample": lambda m: vmap(jacrev(m))(X),
    "jvp": parameter_jvp,
    "hessian by the parameters": lambda m: hessian(closures(m)[2])(closures(m)[0]),
    "hessian by the input, each sample": lambda m: vmap(hessian(lambda x: m(x).sum()))(X),
    "hessian times vector": hessian_vector,
    "vmap over models": ensemble,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_a_model(name, activation):
    expected = TRANSFORMS[name](build(Smooth))
    got = TRANSFORMS[name](build(ACTIVATIONS[activation]))
    leaves = torch.utils._pytree.tree_leaves(expected)
    assert any(leaf.abs().max() > 1e-2 for leaf in leaves)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_softplus_itself_in_a_function_of_its_input():
    def outer(f):
        return lambda x: (f(x) ** 3).sum()

    ours, smooth = outer(lambda x: tp.softplus(x, BETA)), outer(Smooth())
    for transform in (grad, hessian, lambda f: jacrev(jacfwd(f)), lambda f: vmap(grad(f))):
        torch.testing.assert_close(transform(ours)(X), transform(smooth)(X), rtol=1e-11, atol=1e-12)
