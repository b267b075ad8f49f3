"""The plain-PyTorch reference against published vectors, mpmath, autograd and torch.optim."""

import hashlib
import itertools

import mpmath
import pytest
import torch
from scipy import stats
from torch import nn
from twophase import reference
from twophase.reference.two_phase import recompute_statistics

# Random123's known-answer vectors for Philox4x32-10: counter, key, output.
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_known_answers(counter, key, expected):
    words = reference.philox4x32_10(tuple(key), torch.tensor(counter))
    assert words.tolist() == expected


def test_stream_key_definition():
    data = (7).to_bytes(8, "little") + b"conv.weight"
    expected = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
    for name in ("conv.weight", "module.conv.weight", "module._orig_mod.conv.weight"):
        assert reference.stream_key(7, name) == expected
    assert reference.stream_key(-1, "a") != reference.stream_key(1, "a")


def test_normal_is_normal_and_prefix_stable():
    z = reference.normal(reference.stream_key(3, "w"), 200_000)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert torch.equal(z[:1001], reference.normal(reference.stream_key(3, "w"), 1001))
    assert reference.normal(5, 0).shape == (0,)


def test_perturb_sigma_and_strides():
    w = torch.zeros(40, 50)
    reference.perturb_({"w": w}, 0.25, seed=1)
    assert abs(float(w.std()) - 0.25) < 4 * 0.25 / (2 * w.numel()) ** 0.5
    transposed = torch.zeros(50, 40).T
    reference.perturb_({"w": transposed}, 0.25, seed=1)
    assert torch.equal(w, transposed)


def test_softplus_against_mpmath():
    mpmath.mp.dps = 40
    x = torch.linspace(-0.6, 0.6, 301, dtype=torch.float64)
    y = reference.softplus(x)
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        exact = mpmath.log1p(mpmath.exp(100 * mpmath.mpf(a))) / 100
        # beta x is rounded before exp sees it: a relative error of u * beta |x|
        assert abs(b - exact) <= 4e-16 * (1 + 100 * abs(a)) * exact
    # derivatives: autograd of the formula away from the kink of |x|
    x = torch.tensor([-0.31, -0.02, 0.013, 0.2], dtype=torch.float64, requires_grad=True)
    y = reference.softplus(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    ones = torch.ones_like(x)
    torch.testing.assert_close(reference.softplus_backward(ones, y), g)
    (gg,) = torch.autograd.grad(g.sum(), x)
    by_grad, by_y = reference.softplus_double_backward(ones, ones, y)
    torch.testing.assert_close(by_grad, g)
    torch.testing.assert_close(by_y * g, gg)


@pytest.mark.parametrize(
    ("momentum", "dampening", "decay", "nesterov", "maximize"),
    [
        c
        for c in itertools.product((0, 0.9), (0, 0.3), (0, 1e-2), (False, True), (False, True))
        if not (c[3] and (c[0] == 0 or c[1] != 0))
    ],
)
def test_sgd_is_torchs(momentum, dampening, decay, nesterov, maximize):
    settings = {
        "lr": 0.1,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    torch.manual_seed(0)
    ours = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    theirs = [nn.Parameter(p.clone()) for p in ours]
    optimizer = torch.optim.SGD(theirs, **settings)
    buffers = [None, None]
    for _ in range(5):
        grads = [torch.randn_like(p) for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        reference.sgd_(ours, grads, buffers, **settings)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-15, atol=1e-16)


def test_sgd_mask_leaves_tensor_and_buffer_alone():
    p, g = [torch.ones(3), torch.ones(3)], [torch.ones(3), torch.ones(3)]
    buffers = [torch.full((3,), 2.0), torch.full((3,), 2.0)]
    reference.sgd_(p, g, buffers, lr=0.1, momentum=0.9, weight_decay=0.1, nu=[0, 1])
    assert torch.equal(p[0], torch.ones(3)) and torch.equal(buffers[0], torch.full((3,), 2.0))
    assert not torch.equal(p[1], torch.ones(3))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_step_is_autograd_and_sgd(loss, bias):
    torch.manual_seed(0)
    layer = nn.Linear(7, 3, bias=bias).double()
    weight = layer.weight.detach().clone()
    b = layer.bias.detach().clone() if bias else None
    settings = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
    optimizer = torch.optim.SGD(layer.parameters(), **settings)
    buffers = [None, None] if bias else [None]
    for _ in range(4):
        h = torch.randn(5, 7, dtype=torch.float64)
        y = torch.randint(3, (5,)) if loss == "cross_entropy" else torch.randn(5, 3).double()
        q = layer(h)
        value = (
            nn.functional.cross_entropy(q, y)
            if loss == "cross_entropy"
            else (q - y).square().sum(1).mean()
        )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        ours = reference.last_layer_step_(weight, b, buffers, h, y, loss=loss, **settings)
        torch.testing.assert_close(ours, value.detach())
    torch.testing.assert_close(weight, layer.weight.detach())
    if bias:
        torch.testing.assert_close(b, layer.bias.detach())


def test_gram_logdet_on_known_ranks():
    torch.manual_seed(0)
    h = torch.randn(2, 6, 9)
    h[1, 3] = h[1, 0]
    rank, logabsdet = reference.gram_logdet(h)
    assert rank.tolist() == [6, 5]
    m = torch.cat([h[0].double(), torch.ones(6, 1)], 1)
    torch.testing.assert_close(logabsdet[0], torch.linalg.slogdet(m @ m.T)[1])
    rank, logabsdet = reference.gram_logdet(torch.randn(5, 2))
    assert rank == 3 and logabsdet == -torch.inf


def small_problem():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 3)
    ).double()
    return model, torch.randn(18, 4, dtype=torch.float64), torch.randint(3, (18,))


def test_two_phase_freezes_the_hidden_layers():
    model, x, y = small_problem()
    states, losses = [], []

    def after(_):
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(model.eval()(x), y)))

    reference.two_phase(
        model,
        "5",
        x,
        y,
        loss=nn.functional.cross_entropy,
        batches=lambda epoch: torch.arange(18).split(6),
        epochs=8,
        tau=4,
        lr=0.05,
        momentum=0.9,
        weight_decay=1e-3,
        after_epoch=after,
    )
    for name, value in states[4].items():
        moved = not torch.equal(value, states[7][name])
        assert moved == name.startswith("5.")
    assert not torch.equal(states[3]["0.weight"], states[4]["0.weight"])
    assert losses[7] < losses[4] < losses[0]


def test_statistics_are_update_bns():
    model, x, _ = small_problem()
    recompute_statistics(model, x, 7)
    mean, var = model[1].running_mean.clone(), model[1].running_var.clone()
    torch.optim.swa_utils.update_bn(x.split(7), model)
    assert torch.equal(mean, model[1].running_mean) and torch.equal(var, model[1].running_var)
