"""Channels that are constant are left out: same numbers, same bounds, and nobody may look."""

import random
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from exact_running import Digits, digits, numbers
from running_models import Stop
from twophase.models import PreActResNet18
from twophase_ext.expressivity import backbone
from twophase_ext.expressivity.bounded import Unbounded
from twophase_ext.expressivity.running import engine, thin, untouched
from twophase_ext.expressivity.running.features import bounded_features, running
from twophase_ext.expressivity.thinning import thin_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no pages to look at")


class Net(nn.Module):
    """Convolutions, norms, activations, sums, pooling, as `kind` draws them."""

    def __init__(self, seed):
        super().__init__()
        self.draw = random.Random(seed)
        r, c = random.Random(seed), 12
        self.stem = nn.Conv2d(2, c, 3, padding=1, bias=r.random() < 0.5)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(3))
        self.blocks = nn.ModuleList(
            nn.Conv2d(c, c, k, r.choice([1, 2]) if i == 2 else 1, k // 2, bias=r.random() < 0.5)
            for i, k in enumerate([3, 1, 3])
        )
        self.short = nn.Conv2d(c, c, 1, 1)
        self.line = nn.Linear(c, 20)
        self.seed, self.fed = seed, nn.Identity()
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 3.0)

    def forward(self, x):
        r = random.Random(self.seed)
        act = r.choice([F.silu, F.gelu, torch.tanh, lambda t: tp.softplus(t, 5.0), F.relu])
        x = self.fed(act(self.norms[0](self.stem(x))))
        y = self.blocks[0](x)
        y = r.choice([act, lambda t: F.leaky_relu(t, 0.1, inplace=True)])(y)
        y = self.norms[1](self.blocks[1](y))
        kind = r.randrange(5)
        s = x if kind < 3 else self.short(x)
        if kind == 0:
            y += s
        elif kind == 1:
            y = s - y
        else:
            y = y + s
        y = act(self.norms[2](self.blocks[2](y))) * 1.5
        if r.random() < 0.4:
            y = F.avg_pool2d(y, 2, padding=r.choice([0, 0, 1]))
        if r.random() < 0.3:
            y = torch.cat([y, y.flip(1)], 1)[:, 3:15]
        last = r.randrange(3)
        if last == 0:
            y = y.mean((2, 3))
        else:
            y = (
                F.adaptive_avg_pool2d(y, 1) if last == 1 else y.mean((2, 3), keepdim=True)
            ).flatten(1)
        return self.line(y) if r.random() < 0.6 else y


def zeroed(net, seed, columns=True):
    """Most rows of the weights zero, and (mostly) the columns of what is constant then."""
    r = random.Random(seed + 1)
    with torch.no_grad():
        for layer in [net.stem, *net.blocks, net.short, net.line]:
            layer.weight[torch.tensor([r.random() < 0.75 for _ in layer.weight])] = 0
            if r.random() < 0.2:
                layer.weight.zero_()
            if layer.weight.dim() == 4 and layer.weight.shape[-1] == 3 and r.random() < 0.5:
                taps = torch.zeros_like(layer.weight)
                taps[..., 1, 1] = layer.weight[..., 1, 1]
                layer.weight.copy_(taps)
    if columns:
        pruned = {}
        own = Stop(net, 20 if net.line else 12).double().eval()
        running(own, [own.stop], images(2, seed), pruned=pruned)
        state = dict(own.backbone.named_parameters())
        with torch.no_grad():
            for name, live in pruned.items():
                state[name.removeprefix("backbone.")][:, ~live] = 0


def images(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 6, 6, dtype=torch.float64, generator=generator)


def network(seed, columns=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(seed)
    zeroed(net, seed, columns)
    net = net.double().eval()
    with torch.no_grad():
        width = net(images(2, 0)).shape[1]
    return Stop(net, width).double().eval()


def found_by(model, x, monkeypatch, live):
    with monkeypatch.context() as patched:
        patched.setattr(engine, "available", lambda: live)
        return bounded_features(model, model.stop, [x[:3], x[3:]], n=len(x))


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_same_as_all_of_the_network(monkeypatch, columns, layout):
    saved = []
    thinned = thin.thinned

    def counted(owner, func, args, kwargs):
        out = thinned(owner, func, args, kwargs)
        saved.append(out is not None)
        return out

    monkeypatch.setattr(engine, "thinned", counted)
    for seed in range(25):
        model, x = network(seed, columns), images(6, seed).contiguous(memory_format=layout)
        one, all_ = (found_by(model, x, monkeypatch, live) for live in (True, False))
        apart = (one.z - all_.z).norm(dim=1)
        assert bool((apart <= one.error + all_.error).all()), seed
        assert bool((one.error <= 3 * all_.error + 1e-14).all()), seed
        with torch.no_grad():
            assert torch.allclose(one.z, model.backbone(x), rtol=1e-9, atol=1e-10)
    assert sum(saved) > (100 if columns else 40)


def test_against_sixty_digits():
    shares = []
    for seed in range(12):
        model, x = network(seed), images(2, seed)
        try:
            found = bounded_features(model, model.stop, [x], n=2)
            with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), Digits() as mode:
                z = model.backbone(x)
        except Unbounded:
            continue
        for row, error in zip(numbers(found.z) - mode.of(z), found.error.tolist(), strict=True):
            true = float(digits.sqrt(sum(v * v for v in row)))
            assert true <= error, seed
            shares.append(true / error if error else 0.0)
    assert len(shares) >= 20 and max(shares) > 1e-4


class Looking(nn.Module):
    def __init__(self, model, look, then):
        super().__init__()
        self.inner, self.look, self.then = model, look, then

    def forward(self, x):
        net = self.inner
        y = net.stem(x)
        self.look(y)
        return self.then(net.norms[0](y) if self.then is torch.relu else y).mean((2, 3))


@pytest.mark.parametrize("then", [torch.relu, lambda y: y.flip(1)], ids=["thin", "all"])
@pytest.mark.parametrize("write", [False, True])
def test_nobody_looks_and_nobody_writes(write, then):
    net = network(4).backbone
    with torch.no_grad():
        net.stem.weight[1:] = 0
        net.stem.weight[0] = 1.0

    def look(y):
        array = y.detach().numpy()
        if write:
            array[0, 3, 1, 2] = 7.0
        return float(array[0, 3, 1, 2])

    for looks in (lambda y: None, look):
        model = Stop(Looking(net, looks, then), 12).double().eval()
        if looks is look:
            with pytest.raises(Unbounded, match="by what is no operator"):
                bounded_features(model, model.stop, [images(4, 0)], n=4)
        else:
            assert bool(
                bounded_features(model, model.stop, [images(4, 0)], n=4).error.isfinite().all()
            )


def test_untouched_memory():
    assert untouched.available()
    described = torch.empty(3, 5, 64, 64, dtype=torch.float64, device="meta").transpose(1, 2)
    kept = untouched.Untouched()
    tensor = kept.like(described)
    assert tensor.shape == described.shape and tensor.stride() == described.stride()
    other = kept.like(described)
    assert kept.release(tensor)
    tensor.fill_(1.0)
    assert kept.all_whole()  # it holds numbers now
    other = kept.like(described)
    float(other[2, 60, 3, 7])
    assert not kept.all_whole()
    last = kept.like(described)
    last[1, 17, 2, 3] = 0.0
    assert not kept.release(last)


def test_a_constant_that_overflows_is_not_left_out():
    """Zero times infinity is no zero in the model itself."""
    model = network(3)
    with torch.no_grad():
        model.backbone.stem.weight[2:] = 0
        model.backbone.norms[0].bias[5] = float("inf")
    try:
        found = bounded_features(model, model.stop, [images(4, 0)], n=4)
    except Unbounded:
        return
    assert not bool(found.z.isfinite().all() and found.error.isfinite().all())


def test_weights_of_few_channels():
    torch.manual_seed(0)
    model = PreActResNet18(1, 10, width=16, wide=30).double().eval()
    x = torch.rand(2, 1, 16, 16, dtype=torch.float64)
    found = thin_weights(model, [model.head[0]], x, 1024, 24)
    live = {name: int(w.flatten(1).any(1).sum()) for name, w in found.items()}
    assert live["conv1.weight"] == 4 and max(live.values()) == 24
    state = model.state_dict()
    for name, weight in found.items():
        kept = weight != 0
        assert torch.equal(weight[kept], state[name][kept])
    model.load_state_dict(found, strict=False)
    h = model.head[0]
    one = bounded_features(model, h, [x, x.flip(0)], n=4)
    with torch.no_grad():
        z = []
        handle = h.register_forward_pre_hook(lambda _, a: z.append(a[0]))
        model(x)
        handle.remove()
    assert torch.allclose(one.z[:2], z[0], rtol=1e-12, atol=1e-12)
    # with room for all channels the middle pixels are left, which this model has alone by now
    whole = thin_weights(model, [h], x, 1 << 20, 1 << 20)
    assert whole and all(torch.equal(weight, state[name]) for name, weight in whole.items())
    model.conv1.weight.requires_grad_(False)
    assert thin_weights(model, [h], x, 1024, 24) == {}
    grouped = nn.Sequential(nn.Conv2d(2, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 5)).double()
    assert thin_weights(grouped, [grouped[2]], torch.rand(2, 2, 6, 6).double(), 8, 4) == {}


def test_a_witness_of_few_channels_for_the_users_model(monkeypatch):
    monkeypatch.setattr(backbone, "THIN", (1 << 8,))
    monkeypatch.setattr(backbone, "MANY", 30)
    torch.manual_seed(0)
    x = torch.rand(30, 1, 8, 8)
    model = PreActResNet18(1, 10, width=8, wide=33)
    verdict = tp.verify_expressivity(model, x, w="witness", method="certificate")
    assert verdict.status == "proved" and "channels of 256 numbers" in verdict.constants["backbone"]
    assert verdict.recheck(model, x, say=lambda _: None)
    model.load_state_dict(verdict.witness, strict=False)
    model = model.double().eval()
    with torch.no_grad():
        h = []
        model.head[2].register_forward_pre_hook(lambda _, a: h.append(a[0]))
        model(x.double())
    matrix = torch.cat([h[0], torch.ones(30, 1)], 1)
    sigma = float(torch.linalg.svdvals(matrix)[-1])
    assert 0 < verdict.sigma_min_lower <= sigma * (1 + 1e-9)


@pytest.mark.parametrize("method", ["certificate", "separation"])
def test_few_channels_that_do_not_do_are_all_channels(monkeypatch, method):
    """The pilot's samples are told apart; the last two differ where few channels do not look."""
    monkeypatch.setattr(backbone, "THIN", (1 << 7,))
    monkeypatch.setattr(backbone, "THINNEST", 1 << 7)
    monkeypatch.setattr(backbone, "MANY", 30)
    monkeypatch.setattr(backbone, "THIN_PILOT", 28)
    monkeypatch.setattr(backbone, "ENOUGH", 0.1)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 16, 3, 2, 1), nn.BatchNorm2d(16), tp.nn.Softplus(10.0)),
        *(nn.Conv2d(16, 32, 3, 2, 1), tp.nn.Softplus(10.0), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(128, 33), tp.nn.Softplus(100.0), nn.Linear(33, 3)),
    ).eval()
    with torch.no_grad():
        model[0].weight[:8, 1] = 0  # of the first channels none sees the second image
    x = torch.rand(30, 2, 8, 8)
    x[29, 0] = x[28, 0]
    verdict = tp.verify_expressivity(model, x, w="witness", method=method)
    assert verdict.status == "proved", str(verdict)
    assert "channels of" not in verdict.constants["backbone"]
    x[29, 0, 0, 0] += 0.5
    few = tp.verify_expressivity(model, x, w="witness", method=method)
    assert few.status == "proved" and "channels of 128 numbers" in few.constants["backbone"]


def test_separation_takes_fewer_channels_than_a_certificate(monkeypatch):
    """Unless the pilot's samples are hardly apart: then there are too few for more samples."""
    monkeypatch.setattr(backbone, "THINNEST", 1 << 7)
    monkeypatch.setattr(backbone, "THIN", (1 << 8,))
    monkeypatch.setattr(backbone, "MANY", 30)
    torch.manual_seed(0)
    x, model = torch.rand(30, 1, 8, 8), PreActResNet18(1, 10, width=8, wide=33)

    def numbers(method):
        verdict = tp.verify_expressivity(model, x, w="witness", method=method)
        assert verdict.status == "proved" and verdict.margin > 1
        return verdict.constants["backbone"].split(" numbers")[0]

    assert numbers("separation") == "channels of 128"
    assert numbers("certificate") == "channels of 256"
    monkeypatch.setattr(backbone, "SPARE", 1e30)
    assert "the model's own" in numbers("separation") or "residual" in numbers("separation")
