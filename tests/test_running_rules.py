"""Each rule by itself: float32's bounds hold what float64 shows, and are not absurdly large."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from running_models import Does, Stop
from twophase_ext.expressivity.bounded import Unbounded
from twophase_ext.expressivity.running.features import bounded_features
from twophase_ext.expressivity.running.operand import Operand

PLACES = (torch.arange(40) % 7).view(1, 5, 8)
IDS = torch.tensor([[0, 2, 1, 2], [3, 3, 0, 1], [1, 0, 0, 2]])


def images(function):
    """Of images, rounded before: an error goes in."""
    return lambda x: function(x.unflatten(1, (2, 6, 8)) * 0.3 + 0.1).flatten(1)


def rows(function):
    return lambda x: function((x * 0.3 + 0.1).unflatten(1, (12, 8))).flatten(1)


RULES = {
    "avg_pool2d": images(lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 1))),
    "avg_pool2d, ceil": images(lambda x: F.avg_pool2d(x, 3, 2, 1, True, False)),
    "avg_pool2d, divisor": images(lambda x: F.avg_pool2d(x, 2, divisor_override=3)),
    "avg_pool1d": rows(lambda x: F.avg_pool1d(x, 3, 2)),
    "avg_pool3d": images(lambda x: F.avg_pool3d(x[:, :, None], (1, 3, 3), 2, (0, 1, 1))),
    "adaptive_avg_pool2d": images(lambda x: F.adaptive_avg_pool2d(x, (4, 3))),
    "adaptive_avg_pool3d": images(lambda x: F.adaptive_avg_pool3d(x[:, None], (2, 4, 3))),
    "adaptive_max_pool2d": images(lambda x: F.adaptive_max_pool2d(x, (4, 3))),
    "bilinear": images(lambda x: F.interpolate(x, (9, 5), mode="bilinear")),
    "bilinear, corners": images(
        lambda x: F.interpolate(x, (9, 5), mode="bilinear", align_corners=True)
    ),
    "bilinear, antialias": images(
        lambda x: F.interpolate(x, (4, 5), mode="bilinear", antialias=True)
    ),
    "linear": rows(lambda x: F.interpolate(x, 5, mode="linear")),
    "trilinear": images(lambda x: F.interpolate(x[:, None], (3, 9, 5), mode="trilinear")),
    "nearest": images(lambda x: F.interpolate(x, scale_factor=2)),
    "pixel_shuffle": images(lambda x: F.pixel_shuffle(x.view(-1, 8, 3, 4), 2)),
    "index": rows(lambda x: x[:, [3, 1, 1]]),
    "scatter_add": rows(lambda x: x.new_zeros(len(x), 3, 8).index_add(1, torch.arange(12) % 3, x)),
    "scatter_add, wide": rows(
        lambda x: torch.zeros_like(x[:, :3]).scatter_add(
            1, (torch.arange(12) % 3)[None, :, None].expand_as(x), x
        )
    ),
    "scatter mean": rows(
        lambda x: torch.zeros_like(x[:, :3]).scatter_reduce(
            1, (torch.arange(12) % 3)[None, :, None].expand_as(x), x, "mean"
        )
    ),
    "scatter amax": rows(
        lambda x: torch.zeros_like(x[:, :3]).scatter_reduce_(
            1, (torch.arange(12) % 3)[None, :, None].expand_as(x), x, "amax"
        )
    ),
    "gather": rows(
        lambda x: x.gather(1, (torch.arange(40) % 7).view(1, 5, 8).expand(len(x), 5, 8))
    ),
    "sort": rows(lambda x: x.sort(1).values),
    "topk": rows(lambda x: x.topk(3, 1).values),
    "std": rows(lambda x: x.std(1)),
    "std, biased": rows(lambda x: x.std((1, 2), correction=0)[:, None].expand(-1, 3)),
    "var_mean": rows(lambda x: torch.cat(torch.var_mean(x, 1), 1)),
    "norm 1": rows(lambda x: x.norm(1, -1)),
    "norm inf": rows(lambda x: torch.linalg.vector_norm(x, torch.inf, dim=1)),
    "glu": rows(lambda x: F.glu(x, 1)),
    "smooth maximum": images(tp.nn.SmoothMaxPool(3, 2, 1, beta=20.0)),
    "smooth maximum, small beta": images(tp.nn.SmoothMaxPool(2, beta=1e-3)),
    "smooth maximum, dilated": images(tp.nn.SmoothMaxPool(3, 1, 1, (1, 2), True, beta=3.0)),
    "smooth maximum of rounded numbers": images(
        lambda x: tp.ops.smooth_max_pool((x + 1e4) - 1e4, 3, 1, 1, beta=20.0)
    ),
    "smooth maximum, 1d": rows(tp.nn.SmoothMaxPool(3, 1, axes=1, beta=20.0)),
    "smooth maximum, 3d": images(
        lambda x: tp.ops.smooth_max_pool(x[:, None], 2, 1, 1, axes=3, beta=20.0)
    ),
    "max_pool2d, dilated": images(lambda x: F.max_pool2d(x, 3, 1, 1, (1, 2))),
    "constants of no rule": rows(lambda x: x * torch.fft.fft(torch.arange(8.0)).real),
    "constants of powers": rows(lambda x: x + torch.pow(torch.tensor(0.7), torch.arange(8))),
    "lerp": rows(lambda x: x[:, :6].lerp(x[:, 6:], 0.7)),
    "softplus": rows(lambda x: F.softplus(x, 3.0)),
    "log1p": rows(lambda x: x.abs().log1p()),
    "expm1": rows(lambda x: x.expm1()),
    "power 5": rows(lambda x: x**5),
    "power 0.2": rows(lambda x: (x.square() + 0.3) ** 0.2),
    "power -1.5": rows(lambda x: (x.square() + 0.3) ** -1.5),
    "erfc": rows(torch.erfc),
    "atan": rows(torch.atan),
    "softshrink": rows(F.softshrink),
    "floor": lambda x: x.floor() * 0.1,
    "spectral norm": nn.utils.parametrizations.spectral_norm(nn.Linear(96, 4)),
    "weight norm": nn.Sequential(
        nn.Unflatten(1, (2, 6, 8)),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3)),
        nn.Flatten(),
    ),
    "einsum": rows(lambda x: torch.einsum("bij,bkj->bik", x, x)),
    "cosine": rows(lambda x: F.cosine_similarity(x[:, :6], x[:, 6:], -1)),
    "separable": images(lambda x: F.conv2d(x, torch.full((2, 1, 3, 3), 0.3).to(x), groups=2)),
    "transposed": nn.Sequential(
        nn.Unflatten(1, (2, 6, 8)), nn.ConvTranspose2d(2, 3, 3, 2, 1), nn.Flatten()
    ),
    "conv3d": images(lambda x: F.conv3d(x[:, None], torch.full((2, 1, 2, 3, 3), 0.3).to(x))),
}


@pytest.mark.parametrize("name", RULES)
def test_one_rule(name):
    torch.manual_seed(0)
    found = RULES[name]
    model = Stop(found if isinstance(found, nn.Module) else Does(found), 3).eval()
    x = torch.randn(5, 96) * torch.tensor([1.0, 1e-3, 30.0, 1.0, 2.0])[:, None]
    with torch.no_grad():
        bounded = bounded_features(model, model.stop, [x], n=len(x))
        true = copy.deepcopy(model).double().backbone(x.double())
    apart = (bounded.z - true).norm(dim=1)
    assert bool((apart <= bounded.error).all())
    assert float(apart.max()) > 0 or name in ("floor", "softshrink")
    unit = 2.0**-24 * (true.norm(dim=1) + 1)
    assert bool((bounded.error <= 1e6 * torch.maximum(apart, unit)).all())


class Tokens(nn.Module):
    """Of integers: rows of a table, and the last one that is not 0."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(4, 6), nn.Linear(6, 7)

    def forward(self, ids):
        h = torch.tanh(self.mix(self.table(ids)))
        last = (torch.arange(ids.shape[1]) * (ids != 0)).argmax(1)
        return h[torch.arange(len(ids)), last]


def test_places_may_be_the_samples_own_where_they_are_exact():
    model = Stop(Tokens(), 7).eval()
    found = bounded_features(model, model.stop, [IDS], n=3)
    true = copy.deepcopy(model).double().backbone(IDS)
    assert bool(((found.z - true).norm(dim=1) <= found.error).all())
    assert 0 < float(found.error.max()) < 1e-4


def test_another_sample_s_place_is_refused():
    mixes = {
        "another row": lambda m, ids: m.table(ids)[torch.arange(len(ids)).flip(0), ids[:, 0]],
        "rows by numbers": lambda m, ids: m.table(ids)[ids[:, 0] % 3, 0],
    }
    for run in mixes.values():
        model = Stop(Tokens(), 6).eval()
        model.backbone.forward = lambda ids, run=run, m=model.backbone: run(m, ids)
        with pytest.raises(Unbounded, match="brings different samples together"):
            bounded_features(model, model.stop, [IDS], n=3)


def test_decisions_by_integers_have_to_come_out_alike():
    """`mask.all()` and the like: one path for all batches, or no bound."""

    class Padded(Tokens):
        def forward(self, ids):
            h = torch.tanh(self.mix(self.table(ids)))
            if (ids == 3).any():
                h = h * 2
            return h.mean(1)

    model = Stop(Padded(), 7).eval()
    some = torch.cat([IDS[:1], IDS[2:]])
    found = bounded_features(model, model.stop, [some], n=2)
    assert bool(found.error.isfinite().all())
    with pytest.raises(Unbounded, match="something else for other samples"):
        bounded_features(model, model.stop, [IDS[:1], IDS[1:2]], n=2)


def test_decisions_by_real_numbers_are_refused():
    model = Stop(Does(lambda x: x * 2 if bool((x > 0).any()) else x), 3).eval()
    with pytest.raises(Unbounded, match=r"any: it adds up the samples|decides"):
        bounded_features(model, model.stop, [torch.randn(4, 3)], n=4)


class Rewriting(nn.Module):
    """Norms are asked for before and after numbers are written in place, through views, too."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        y = F.silu(self.norm(self.first(x)))
        z = (y * 2).tanh() + y
        y.mul_(1e8)
        z = z + self.norm(self.first(x)) + F.gelu(y) * 1e-7
        y[:, 2:5].add_(1e9)
        z = F.gelu(z) + (F.gelu(y) * 1e-9).sigmoid() + F.gelu(y.transpose(0, 1)).transpose(0, 1)
        return self.last(z)


def test_norms_that_are_kept_are_of_the_numbers_that_are_there(monkeypatch):
    kept = Operand._known
    reused = []

    def checked(operand, what, compute):
        reused.append(what in operand.sizes)
        found = kept(operand, what, compute)
        if not operand.constant:
            order = 2 if what == "norm" else math.inf
            rows = torch.linalg.vector_norm(operand.rows().double(), order, dim=1)
            true = torch.zeros(operand.samples).double().index_add_(0, operand.ids, rows**order)
            true = operand.by_sample(rows, "amax") if what == "largest" else true.sqrt()
            assert bool((found >= true * (1 - 1e-12)).all())
            assert bool((found <= true * 1.00001 + 1e-150).all())
        return found

    monkeypatch.setattr(Operand, "_known", checked)
    torch.manual_seed(0)
    model = Rewriting().double().eval()
    x = torch.randn(6, 6, dtype=torch.float64)
    found = bounded_features(model, model.last, [x[:3], x[3:]], n=6)
    assert bool(found.error.isfinite().all())
    assert any(reused) and not all(reused)
