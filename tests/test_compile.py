"""torch.compile with fullgraph=True through every operator, layer and optimizer: eager's bits."""

import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import toy_data, toy_mlp
from twophase_ext import ops


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYER = {"h": numbers(9, 7), "target": torch.arange(9) % 3}


def state() -> list[torch.Tensor]:
    """Weight, bias and their momentum buffers."""
    return [numbers(3, 7, seed=1), numbers(3, seed=2), torch.zeros(3, 7), torch.zeros(3)]


def sgd(p, q, grad, buffer):
    buffers = [None, buffer]
    for _ in range(2):  # the first step of p makes its buffer
        ops.sgd_([p, q], [grad, grad.t()], buffers, lr=0.1, momentum=0.9, weight_decay=0.1)
    return buffers


def epoch(w, b, w_buffer, b_buffer, h, target, order):
    settings = {"batch_size": 4, "lr": 0.1, "momentum": 0.9, "is_first_step": True}
    return ops.last_layer_epoch_(w, b, w_buffer, b_buffer, h, target, order, **settings)


CASES = {
    "softplus": (ops.softplus, lambda: [numbers(4, 5)]),
    "softplus_": (ops.softplus_, lambda: [numbers(4, 5)]),
    "softplus_ on a view": (lambda x: ops.softplus_(x[:, 1:3]), lambda: [numbers(4, 5)]),
    "smooth_max_pool": (
        lambda x: ops.smooth_max_pool(x, 3, 2, 1, beta=5.0),
        lambda: [numbers(2, 3, 7, 6)],
    ),
    "perturb_": (
        lambda a, b: ops.perturb_({"a": a, "_orig_mod.b": b}, {"a": 0.1, "b": 1e-3}, seed=-5),
        lambda: [nn.Parameter(numbers(4, 5)), numbers(6, 3).double().t()],
    ),
    "sgd_": (
        sgd,
        lambda: [numbers(5, 4).t(), numbers(5, 4, seed=1), numbers(4, 5, seed=2), numbers(5, 4)],
    ),
    "last_layer_step_": (
        lambda *t: ops.last_layer_step_(
            *t, lr=0.1, momentum=0.9, nesterov=True, is_first_step=True
        ),
        lambda: [*state(), *LAYER.values()],
    ),
    "last_layer_step_ without bias": (
        lambda w, h, t: ops.last_layer_step_(w, None, None, None, h, t, lr=0.1),
        lambda: [state()[0], *LAYER.values()],
    ),
    "last_layer_logits": (
        ops.last_layer_logits,
        lambda: [state()[0], LAYER["h"], torch.tensor([8, 0, 3])],
    ),
    "last_layer_update_": (
        lambda *t: ops.last_layer_update_(*t, lr=0.1, momentum=0.9, is_first_step=True),
        lambda: [
            *(*state(), LAYER["h"], torch.tensor([8, 0, 3])),
            *(numbers(3, 3).double(), torch.tensor([2, 1, 0])),
        ],
    ),
    "last_layer_epoch_": (epoch, lambda: [*state(), *LAYER.values(), torch.arange(9)]),
    "last_layer_gradient": (
        lambda w, b, h, y: ops.last_layer_gradient(w, b, h, y, loss="squared_error"),
        lambda: [*state()[:2], LAYER["h"], numbers(9, 3)],
    ),
    "gram_logdet": (ops.gram_logdet, lambda: [numbers(2, 6, 9)]),
    "gram_logdet, large": (ops.gram_logdet, lambda: [numbers(257, 260)]),
    "gram_logdet, large, batched": (ops.gram_logdet, lambda: [numbers(2, 257, 3)]),
    "logit_error_constant": (
        lambda x: x * ops.logit_error_constant(x.shape[0], x.dtype),
        lambda: [numbers(300)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operators(name, isa):
    """Outputs and everything written in place."""
    function, make = CASES[name]
    eager, traced = make(), make()
    before = [t.clone() for t in eager]
    expected, got = function(*eager), compiled(function)(*traced)
    torch.testing.assert_close((got, traced), (expected, eager), rtol=0, atol=0, equal_nan=True)
    if function.__name__.endswith("_") or expected is None:
        assert not all(map(torch.equal, before, traced))


def test_every_operator_is_here():
    covered = {name.split()[0].rstrip(",") for name in CASES}
    assert covered == set(ops.__all__)


def test_noise_is_compiled_anew_for_another_seed_or_sigma():
    function = compiled(lambda x, seed, std: tp.perturb_({"x": x}, std, seed=seed))
    for seed, std in ((1, 0.5), (2, 0.5), (2**64 - 1, 0.25), (-1, 0.125), (1, 0.5)):
        traced, eager = torch.zeros(8), torch.zeros(8)
        function(traced, seed, std)
        tp.perturb_({"x": eager}, std, seed=seed)
        assert torch.equal(traced, eager) and traced.any(), (seed, std)


def test_noise_refuses_tied_parameters_in_a_graph_too():
    x = torch.zeros(8)
    with pytest.raises(Exception, match="expected memory of its own"):
        compiled(lambda a, b: tp.perturb_({"a": a, "b": b}, 0.1, seed=1))(x, x)
    assert not x.any()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_layer_and_its_gradients(in_place):
    layer = nn.Sequential(nn.Linear(5, 8), tp.nn.Softplus(10.0, inplace=in_place), nn.Linear(8, 3))
    results = []
    for function in (layer, compiled(layer)):
        x = numbers(6, 5).requires_grad_()
        layer.zero_grad()
        function(x).square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_models_made_analytic_and_wide():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    tp.nn.analytic(model)
    tp.nn.widen(model, n=20)
    x = toy_data(20)[0]
    assert torch.equal(compiled(model)(x), model(x))


@pytest.mark.parametrize("nu", [1, 0])
def test_steps_of_our_sgd(nu):
    """A whole training step, loss to update, is one graph; nu = 0 leaves its group alone."""
    x, y = toy_data(24)
    states = []
    for wrap in (lambda f: f, compiled):
        model = toy_mlp()
        parameters = list(model.parameters())
        optimizer = tp.optim.SGD(
            [{"params": parameters[:4], "nu": nu}, {"params": parameters[4:], "lr": 0.2}],
            lr=0.05,
            momentum=0.9,
            weight_decay=1e-3,
            nesterov=True,
        )
        step = wrap(optimizer.step)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            step()
        states.append([p.detach() for p in parameters])
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert torch.equal(states[0][0], toy_mlp()[0].weight) == (nu == 0)


def test_opcheck_of_the_operators_in_python():
    cases = {
        "gram_logdet_large": [(numbers(2, 5, 6), True), (numbers(1, 5, 2).double(), False)],
        "perturb_by_name_": [([numbers(4), numbers(2, 3).t()], ["a", "b"], 3, [0.1, 0.2])],
    }
    for name, arguments in cases.items():
        for given in arguments:
            found = torch.library.opcheck(getattr(torch.ops.twophase, name), given)
            assert set(found.values()) == {"SUCCESS"}
