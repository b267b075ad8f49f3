"""The plain-PyTorch reference against published vectors, mpmath, autograd and torch.optim."""

import copy
import hashlib
import itertools

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    negative = hashlib.sha256(b"\xff" * 8 + b"a").digest()[:8]
    assert reference.stream_key(-1, "a") == int.from_bytes(negative, "little")
    # only whole components are a wrapper's
    for name in ("my_module.w", "w.module", "modulew"):
        data = (7).to_bytes(8, "little") + name.encode()
        expected = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
        assert reference.stream_key(7, name) == expected


def test_normal_is_normal_and_prefix_stable():
    z = reference.normal(reference.stream_key(3, "w"), 200_000)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert torch.equal(z[:1001], reference.normal(reference.stream_key(3, "w"), 1001))
    assert reference.normal(5, 0).shape == (0,)


def scalar_philox(counter, key):
    """Philox4x32-10 in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox_is_exact_integer_arithmetic(words):
    counter, key = words[:4], words[4:]
    ours = reference.philox4x32_10(tuple(key), torch.tensor([counter, VECTORS[2][0]]))
    assert ours.tolist() == [scalar_philox(c, key) for c in (counter, VECTORS[2][0])]


def test_normal_is_the_written_definition():
    mpmath.mp.dps = 40
    key = reference.stream_key(-5, "layer.weight")
    z = reference.normal(key, 402).tolist()
    half, scale = np.float32(0.5), np.float32(2.0**-32)
    for block in range(101):
        words = scalar_philox([block, 0, 0, 0], [key % 2**32, key >> 32])
        u = [mpmath.mpf(float((np.float32(w) + half) * scale)) for w in words]
        for pair in (0, 1):
            radius = mpmath.sqrt(-2 * mpmath.log(u[2 * pair]))
            angle = 2 * mpmath.pi * u[2 * pair + 1]
            for lane, exact in enumerate((radius * mpmath.cos(angle), radius * mpmath.sin(angle))):
                i = 4 * block + 2 * pair + lane
                # the angle, below 2 pi, carries 2 roundings, the rest one each of size <= radius
                if i < len(z):
                    assert abs(z[i] - exact) <= 2.0**-53 * (4 * float(mpmath.pi) + 4) * radius


def test_perturb_sigma_order_and_precision():
    w = {"a": torch.zeros(40, 50), "b": torch.zeros(3000)}
    reference.perturb_(w.items(), {"a": 0.25, "b": 1e-3}, seed=1)
    for name, sigma in (("a", 0.25), ("b", 1e-3)):
        noise = w[name].flatten().numpy() / sigma
        assert stats.kstest(noise, "norm").pvalue > 1e-3
        assert abs(noise.std() - 1) < 4 / (2 * len(noise)) ** 0.5
    transposed = torch.zeros(50, 40).T
    reference.perturb_({"module.a": transposed}, 0.25, seed=1)
    assert torch.equal(w["a"], transposed)
    # float64 takes the float32 stream, and is not rounded to float32 by the addition
    double = torch.full((40, 50), 1 / 3, dtype=torch.float64)
    reference.perturb_({"a": double}, 0.25, seed=1)
    assert torch.equal(double, torch.full_like(double, 1 / 3) + w["a"].double())


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf"), 1e-50, {"a": 1.0}])
def test_perturb_refuses_before_it_changes(std):
    w = {"a": torch.zeros(3), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"std: expected .*'[ab]'"):
        reference.perturb_(w, std, seed=1)
    with pytest.raises(TypeError, match=r"h: expected float32 or float64, got torch\.bfloat16"):
        reference.perturb_(w | {"h": torch.zeros(3, dtype=torch.bfloat16)}, 1.0, seed=1)
    assert not any(t.any() for t in w.values())


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


def test_softplus_at_the_edges():
    x = torch.tensor([-torch.inf, -1e300, 1e300, torch.inf, torch.nan], dtype=torch.float64)
    y = reference.softplus(x)
    assert y[:4].tolist() == [0.0, 0.0, 1e300, float("inf")] and y[4].isnan()


@pytest.mark.parametrize(
    ("momentum", "dampening", "decay", "nesterov", "maximize"),
    [
        c
        for c in itertools.product((0, 0.9), (0, 0.3), (0, 1e-2), (False, True), (False, True))
        if not (c[3] and (c[0] == 0 or c[1] != 0))
    ],
)
def test_sgd_is_torchs(momentum, dampening, decay, nesterov, maximize):
    options = {
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
    optimizer = torch.optim.SGD(theirs, **options)
    buffers = [None, None]
    for _ in range(5):
        grads = [torch.randn_like(p) for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        reference.sgd_(ours, grads, buffers, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-15, atol=1e-16)


def test_sgd_mask_leaves_tensor_and_buffer_alone():
    p, g = [torch.ones(3), torch.ones(3)], [torch.ones(3), torch.ones(3)]
    buffers = [torch.full((3,), 2.0), torch.full((3,), 2.0)]
    reference.sgd_(p, g, buffers, lr=0.1, momentum=0.9, weight_decay=0.1, nu=[0, 1])
    assert torch.equal(p[0], torch.ones(3)) and torch.equal(buffers[0], torch.full((3,), 2.0))
    assert not torch.equal(p[1], torch.ones(3))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_step_is_autograd_and_sgd(loss, bias, nesterov):
    options = {
        "lr": 0.02,
        "momentum": 0.9,
        "dampening": 0.0 if nesterov else 0.3,
        "weight_decay": 1e-2,
        "nesterov": nesterov,
    }

    def torchs(dtype):
        torch.manual_seed(0)
        layer = nn.Linear(7, 3, bias=bias).to(dtype)
        optimizer = torch.optim.SGD(layer.parameters(), **options)
        values = []
        for h, y in batches:
            q, y = layer(h.to(dtype)), y if loss == "cross_entropy" else y.to(dtype)
            if loss == "cross_entropy":
                value = nn.functional.cross_entropy(q, y)
            else:
                value = (q - y).square().sum(1).mean()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.detach())
        return [torch.stack(values), *(p.detach() for p in layer.parameters())]

    def ours(dtype):
        torch.manual_seed(0)
        layer = nn.Linear(7, 3, bias=bias).to(dtype)
        w, b = layer.weight.detach(), layer.bias.detach() if bias else None
        buffers = [None, None] if bias else [None]
        values = []
        for h, y in batches:
            y = y if loss == "cross_entropy" else y.to(dtype)
            values.append(
                reference.last_layer_step_(w, b, buffers, h.to(dtype), y, loss=loss, **options)
            )
        return [torch.stack(values), w, b] if bias else [torch.stack(values), w]

    torch.manual_seed(1)
    batches = [
        (
            torch.randn(5, 7),
            torch.randint(3, (5,)) if loss == "cross_entropy" else torch.randn(5, 3),
        )
        for _ in range(8)
    ]
    for exact, theirs, mine, mine64 in zip(
        torchs(torch.float64),
        torchs(torch.float32),
        ours(torch.float32),
        ours(torch.float64),
        strict=True,
    ):
        # theirs may be right by luck: a unit in the last place is no error of ours
        error = (theirs - exact).abs().max().clamp(min=2.0**-23 * exact.abs().max())
        assert (mine - exact).abs().max() <= 2 * error
        # float64 has 29 bits more; theirs errs there as well: 2 + 1
        assert (mine64 - exact).abs().max() <= 3 * error * 2.0**-29


def test_last_layer_step_refuses_an_unknown_loss():
    w = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="loss: expected 'cross_entropy' or 'squared_error', got"):
        reference.last_layer_step_(
            w, None, [None], torch.ones(4, 3), torch.ones(4, 2), loss="mse", lr=1.0
        )
    assert not w.any()


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
    rank, logabsdet = reference.gram_logdet(torch.randn(0, 2))
    assert rank == 0 and logabsdet == 0  # the determinant of a 0 x 0 matrix is 1


@pytest.mark.parametrize("weakest", [1e-3, 1.5e-14, 1e-15, 0.0])
def test_gram_logdet_on_known_singular_values(weakest):
    """Rank by numpy's rule, with singular values on both sides of its 12 eps tolerance."""
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(12, 8, dtype=torch.float64))[0]
    sigma = torch.linspace(1, 0.5, 8, dtype=torch.float64)
    sigma[-1] = weakest
    h = u @ sigma.diag() @ v.T
    rank, logabsdet = reference.gram_logdet(h, append_ones=False)
    assert rank == np.linalg.matrix_rank(h.numpy()) == 7 + (weakest > 12 * 2.0**-52)
    if weakest > 1e-6:
        # a perturbation of sigma_min by a few u moves the logarithm by that over sigma_min
        assert abs(logabsdet - 2 * sigma.log().sum()) <= 2 * 8 * 12 * 2.0**-53 / weakest


def small_problem():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 3)
    ).double()
    return model, torch.randn(18, 4, dtype=torch.float64), torch.randint(3, (18,))


def test_two_phase_is_two_torch_optimizers():
    """Momentum carried over at tau; a parameter that does not require grad is left alone."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    ours = ours.double()
    ours[0].bias.requires_grad_(False)
    theirs = copy.deepcopy(ours)
    x, y = torch.randn(18, 4, dtype=torch.float64), torch.randint(3, (18,))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    orders = [torch.randperm(18).split(5) for _ in range(6)]
    loss = nn.functional.cross_entropy
    reference.two_phase(
        ours, "4", x, y, loss=loss, batches=orders.__getitem__, epochs=6, tau=4, noise_std=0.01,
        noise_seed=7, **options,
    )  # fmt: skip

    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], **options)
    for epoch, order in enumerate(orders):
        if epoch == 4:
            state = [optimizer.state[p] for p in theirs[4].parameters()]
            for name, p in theirs.named_parameters():
                if p.requires_grad and not name.startswith("4."):
                    p.data += 0.01 * reference.normal(
                        reference.stream_key(7, name), p.numel()
                    ).view(p.shape)
                p.requires_grad_(name.startswith("4."))
            optimizer = torch.optim.SGD(theirs[4].parameters(), **options)
            optimizer.state.update(zip(theirs[4].parameters(), state, strict=True))
        for index in order:
            optimizer.zero_grad()
            loss(theirs(x[index]), y[index]).backward()
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # the twin's noise passes through float32: sigma |z| < 0.06, and the last layer follows it
        tolerance = 0.0 if name == "0.bias" else 0.06 * 2.0**-23
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_two_phase_refuses_a_wrong_layer_or_time():
    model, x, y = small_problem()
    before = copy.deepcopy(model.state_dict())
    options = {"loss": nn.functional.cross_entropy, "epochs": 2, "lr": 0.1}
    batches = lambda _: [torch.arange(18)]  # noqa: E731
    with pytest.raises(ValueError, match=r"last_layer: expected .* got 'head'"):
        reference.two_phase(model, "head", x, y, batches=batches, tau=1, **options)
    with pytest.raises(ValueError, match=r"tau: expected an epoch in 0\.\.2, got 3"):
        reference.two_phase(model, "5", x, y, batches=batches, tau=3, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


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
