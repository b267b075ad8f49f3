"""What need not be computed, which branches a backbone can do without, and what is chosen."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import Given, toy_convnet
from running_models import Attention, Residual
from twophase.models import MLP, PreActResNet18
from twophase_ext.expressivity import backbone, methods, problem
from twophase_ext.expressivity.backbone import branches, damped, isometries
from twophase_ext.expressivity.bounded import Unbounded
from twophase_ext.expressivity.running.features import bounded_features, running


def _net(run, **modules):
    """A model whose features are run(self, x), and x of 4 samples [4, 3, 4, 4]."""
    model = Given(lambda m, x: m.last(run(m, x)), last=nn.Identity(), **modules)
    g = torch.Generator().manual_seed(6)
    return model.double().eval(), torch.randn(4, 3, 4, 4, generator=g, dtype=torch.float64)


FUNCTIONAL = {
    "shapes": lambda m, x: x.view(x.size(0), -1).reshape(x.shape[0], 4, -1).flatten(1),
    "permute": lambda m, x: x.permute(0, 2, 3, 1).transpose(1, -1).contiguous().flatten(1),
    "pool": lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "means": lambda m, x: x.mean((2, 3)) + x.mean(-1).mean(dim=2) - torch.sum(x, [2, 3]),
    "scalars": lambda m, x: (2 * x / 3 - 1 + (1 - x) * 0.1).mean((2, 3)).neg(),
    "cat": lambda m, x: torch.cat([x, -x], 1).mean((2, 3)),
    "softplus": lambda m, x: tp.softplus(tp.softplus(x, 5.0).mean((2, 3)), beta=7.0),
    "in place": lambda m, x: tp.softplus_(x.mean((2, 3)), 5.0),
    "smooth": lambda m, x: F.gelu(F.silu(torch.tanh(torch.sigmoid(x).tanh()))).mean((2, 3)),
    "relu": lambda m, x: F.relu(torch.relu(x).relu(), inplace=True).mean((2, 3)),
    "linear": lambda m, x: F.linear(F.pad(x, (1, 1)), m.fc.weight, m.fc.bias).mean((2, 3)),
    "conv": lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, padding=1).mean((2, 3)),
    "dropout off": lambda m, x: F.dropout(x, 0.3, m.training).mean((2, 3)),
    "parameter": lambda m, x: x.mean((2, 3)) * m.bn.weight + m.bn.bias,
    "size arithmetic": lambda m, x: x.view(x.size(0), x.size(1) * x.size(2), -1).mean(2),
    "overwritten": lambda m, x: (tp.softplus_(x * 1, 10.0) + x).mean((2, 3)),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_forms(name):
    """Judged by the model itself in float64: errors far below what could be wrong."""
    modules = {"fc": nn.Linear(6, 5), "conv": nn.Conv2d(3, 2, 3), "bn": nn.BatchNorm1d(3)}
    model, x = _net(FUNCTIONAL[name], **modules)
    found = bounded_features(model, model.last, [x], n=4)
    with torch.no_grad():
        true = model(x.clone())
    assert found.z.shape == true.shape
    assert bool(((found.z - true).norm(dim=1) <= found.error).all())
    assert float(found.error.max()) < 1e-13


@pytest.mark.parametrize("change", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv2d(3, 5, 2)])
def test_weights_that_are_computed(change, layer):
    model, x = _net(lambda m, x: m.a(x).flatten(1), a=change(type(layer)(*_sizes(layer))))
    found = bounded_features(model, model.last, [x], n=4)
    with torch.no_grad():
        true = model(x)
    assert bool(((found.z - true).norm(dim=1) <= found.error).all())
    assert 0 < float(found.error.max()) < 1e-12


def _sizes(layer):
    return (4, 3) if isinstance(layer, nn.Linear) else (3, 5, 2)


def _unknown(x):
    return torch.fft.fft(x).real  # without a rule: numbers of which nothing is known


def test_zero_layers_cost_nothing_and_give_their_bias():
    model, x = _net(
        lambda m, x: (x + m.conv(_unknown(x))).mean((2, 3)), conv=nn.Conv2d(3, 3, 3, padding=1)
    )
    with pytest.raises(Unbounded, match="fft"):
        bounded_features(model, model.last, [x], n=4)
    nn.init.zeros_(model.conv.weight)
    # the numbers that the map leaves unread are lost, and then not computed
    for batches in ([x], [x[:2], x[2:]]):
        found = bounded_features(model, model.last, batches, n=4)
        true = (x + model.conv.bias[:, None, None]).mean((2, 3))
        assert torch.allclose(found.z, true, atol=1e-14)
        assert bool(((found.z - true).norm(dim=1) <= found.error).all())
    steps = running(model, [model.last], x).tape.steps
    unread = {token for step in steps.values() for token in step.unread}
    assert len(unread) == 1


def test_what_is_not_computed_is_not_read():
    """A branch that is switched off in one place is read in another one."""
    model, x = _net(
        lambda m, x: (lambda y: (m.a(y) + y).mean((2, 3)))(x.tanh()), a=nn.Conv2d(3, 3, 1)
    )
    nn.init.zeros_(model.a.weight)
    found = bounded_features(model, model.last, [x[:2], x[2:]], n=4)
    true = (x.tanh() + model.a.bias[:, None, None]).mean((2, 3))
    assert bool(((found.z - true).norm(dim=1) <= found.error).all())


def test_arguments_and_batches():
    model = MLP([3, 4, 9, 2]).double().eval()
    x = torch.randn(6, 3, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = []
    whole = bounded_features(model, model[2], [x], n=6)
    parts = bounded_features(model, model[2], [x[:4], x[4:]], n=6, progress=done.append)
    assert done == [4, 2]
    assert torch.allclose(whole.z, parts.z, atol=1e-15) and whole.z.dtype == torch.float64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for batches, n in (([x], 5), ([x], 7), ([], 1), ([], 0)):
        with pytest.raises(ValueError, match="batches"):
            bounded_features(model, model[2], batches, n=n)
    with pytest.raises(ValueError, match="stop"):
        bounded_features(model, nn.Linear(3, 3), [x], n=6)
    huge = bounded_features(model, model[2], [x * 1e308], n=6)
    assert not bool(huge.error.isfinite().all())


def _branches(model, stop, x):
    return branches(model.double().eval(), [stop], x.double())


def test_branches_are_named():
    preact = PreActResNet18(width=1, wide=4)
    found = _branches(preact, preact.head[0], torch.rand(2, 1, 8, 8))
    assert [b.parameters for b in found] == [(f"blocks.{i}.conv2.weight",) for i in range(8)]
    assert [i for i in range(8) if found[i].plain] == [0, 1, 3, 5, 7]  # beside an identity
    changed = damped(preact, found, [0.5, 1, 0, 1, 1, 1, 1, 1])
    assert changed.keys() == {"blocks.0.conv2.weight", "blocks.2.conv2.weight"}
    weight = preact.state_dict()["blocks.0.conv2.weight"]
    assert torch.equal(changed["blocks.0.conv2.weight"], weight / 2)
    convnet = toy_convnet()
    last = [m for m in convnet.modules() if isinstance(m, nn.Linear)][-1]
    found = _branches(convnet, last, torch.rand(2, 1, 8, 8))
    assert [b.parameters for b in found] == [("conv.weight", "conv.bias")]
    mlp = MLP([3, 4, 9, 2])
    assert _branches(mlp, mlp[2], torch.rand(2, 3)) == []


def test_a_branch_may_end_in_a_norm_and_a_shortcut_be_longer():
    model, x = _net(
        lambda m, x: m.bn(m.b(m.a(x))) + x.neg().neg().neg().neg(),
        a=nn.Conv2d(3, 3, 1),
        b=nn.Conv2d(3, 3, 1, bias=False),
        bn=nn.BatchNorm2d(3),
    )
    assert [b.parameters for b in branches(model, [model.last], x)] == [("b.weight",)]
    model.b.weight.requires_grad_(False)
    assert branches(model, [model.last], x) == []


class ClassToken(nn.Module):
    """A small vision transformer whose features are those of one token, without data of its own."""

    def __init__(self, depth=6, width=16):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        blocks = []
        for _ in range(depth):
            attention = nn.Sequential(
                nn.LayerNorm(width), Attention(width, 2), nn.Linear(width, width)
            )
            mixer = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)
            )
            blocks += [Residual(attention), Residual(mixer)]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 66), tp.nn.Softplus(), nn.Linear(66, 3))

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x.unflatten(1, (5, 6)))], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def test_a_class_token_keeps_an_attention_branch():
    """With every branch off all samples would have the same features: one stays on."""
    torch.manual_seed(0)
    model = ClassToken()
    with torch.no_grad():  # at its own weights nothing is resolved
        for block in model.blocks:
            block.branch[-1].weight.mul_(1e4)
    x = torch.randn(60, 30)
    verdict = tp.verify_expressivity(model, x, w="witness")
    assert verdict.status == "proved", str(verdict)
    assert "off but for blocks.0.branch.2.weight" in verdict.constants["backbone"]
    assert verdict.recheck(model, x, say=lambda _: None)


class Deep(nn.Module):
    """Thirty convolutions without a shortcut, whose errors grow beyond their features."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.Tanh()]
        for k in range(15):
            layers += [nn.Conv2d(16, 16, 3, padding=1, groups=4 if k % 3 else 1), nn.Tanh()]
            layers += [nn.Conv2d(16, 16, (1, 2) if k < 2 else 1), nn.Tanh()]
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 26), tp.nn.Softplus()]
        self.body, self.head = nn.Sequential(*layers), nn.Sequential(*pooled, nn.Linear(26, 3))

    def forward(self, x):
        return self.head(self.body(x))


def test_isometries_where_there_is_no_shortcut():
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(24, 3, 8, 8)
    with torch.no_grad():
        for layer in model.body[2:]:
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(8)
    model.body[8].weight.requires_grad_(False)
    verdict = tp.verify_expressivity(model, x, w="witness")
    assert verdict.status == "proved", str(verdict)
    assert verdict.constants["backbone"].startswith("isometries after the first map")
    assert "body.0.weight" not in verdict.witness and "body.8.weight" not in verdict.witness
    for name in ("body.2.weight", "body.6.weight"):
        matrix = verdict.witness[name].double().flatten(2).sum(2)
        for part in matrix.chunk(4 if matrix.shape[1] == 4 else 1):
            torch.testing.assert_close(part @ part.T, torch.eye(len(part)).double())
        assert int((verdict.witness[name].flatten(2).abs().sum((0, 1)) > 0).sum()) == 1
    assert not verdict.witness["body.2.bias"].any()
    assert verdict.recheck(model, x, say=lambda _: None)


def test_isometries_of_every_kind_of_weight():
    """Transposed, grouped and channels-last convolutions; what has no middle is left."""
    layers = [nn.Conv2d(3, 15, 3), nn.ConvTranspose2d(15, 7, 3), nn.Conv2d(7, 8, 3)]
    model, x = _net(lambda m, x: m.body(x).mean((2, 3)), body=nn.Sequential(*layers))
    model.body[2].to(memory_format=torch.channels_last)
    found = isometries(model, [model.last], x)
    assert found.keys() == {"body.2.weight", "body.2.bias"}  # 15 rows are no two groups
    matrix = found["body.2.weight"][:, :, 1, 1]
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(7).double())
    assert float(found["body.2.weight"].abs().sum()) == float(matrix.abs().sum())


class Dense(nn.Module):
    """A dense block, each layer beside all that came before it, and two maps beside each other."""

    def __init__(self, depth=6):
        super().__init__()
        self.first, width = nn.Conv2d(1, 4, 1), 4
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(nn.Conv2d(width, 3, 3, padding=1))
            width += 3
        self.less = nn.Conv2d(width, 3, 1)
        self.other = nn.Conv2d(width, 2, 1)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(80, 66), tp.nn.Softplus(), nn.Linear(66, 3)
        )

    def forward(self, x):
        kept = [self.first(x)]
        for layer in self.layers:
            kept.append(torch.sin(layer(torch.cat(kept, 1))))
        x = torch.cat(kept, 1)
        return self.head(torch.cat([self.less(x), self.other(x)], 1))  # neither beside an identity


def test_dense_layers_are_branches_beside_an_identity():
    torch.manual_seed(0)
    model, x = Dense().double().eval(), torch.rand(24, 1, 4, 4, dtype=torch.float64)
    found = _branches(model, model.head[1], x[:2])
    assert found == [((f"layers.{i}.weight", f"layers.{i}.bias"), True) for i in range(6)]
    with torch.no_grad():
        for layer in model.layers:  # bounds grow beyond the spread with every layer
            layer.weight.mul_(1e4)
    verdict = tp.verify_expressivity(model, x, w="witness")
    assert verdict.status == "proved" and "residual branches" in verdict.constants["backbone"]


def test_a_second_attempt_takes_backbone_and_features_of_the_first(monkeypatch):
    chosen, passes, made = [], [], methods.certify_witness

    def undecided(*arguments, **settings):
        return made(*arguments, **settings).but(status="undecided", reason="not today")

    choose, bounded = backbone._choose, problem.bounded_features

    def counted(*arguments, **settings):
        passes.append(settings["n"])
        return bounded(*arguments, **settings)

    monkeypatch.setattr(methods, "certify_witness", undecided)
    monkeypatch.setattr(backbone, "_choose", lambda *a: chosen.append(1) or choose(*a))
    monkeypatch.setattr(problem, "bounded_features", counted)
    x = torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = tp.nn.widen(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)), n=70
    )
    verdict = tp.verify_expressivity(model, x, w="witness")
    assert (verdict.status, verdict.method) == ("proved", "separation")
    assert chosen == [1] and passes.count(70) == 1
    again = tp.verify_expressivity(model, x, w="witness", method="separation")
    assert again.margin == verdict.margin
