"""Finding the last layer and the wide layer of any model, and cutting the model at them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import Given
from twophase_ext.core.names import canonical_name
from twophase_ext.model import layers
from twophase_ext.nn import Softplus, WideHead


class Residual(nn.Module):
    """Skip connections, BatchNorm, dropout, a nested head with the wide layer."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.ModuleDict({"inner": WideHead(4, 9, 3)})
        self.head["inner"].activation.inplace = inplace

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv(tp.softplus(self.norm(x), 10.0))
        return self.head["inner"](self.drop(x.mean((2, 3))))


class Summed(nn.Module):
    """Two heads whose outputs are added; the second is zero at initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x):
        return self.first(x) + self.second(x)


def images(device="cpu", n=5):
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1)).to(device)


def rows(n=5, d=4):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(2))


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# finding the last layer


@pytest.mark.parametrize("given", [None, "head.inner.last_layer", "module"])
def test_nested_last_layer_behind_skip_connections(device, given):
    model = Residual().to(device)
    wanted = model.head["inner"].last_layer
    found = layers.find_last_layer(model, images(device), wanted if given == "module" else given)
    assert found.name == "head.inner.last_layer"
    assert found.module is wanted
    assert hook_count(model) == 0


def test_order_of_execution_counts_not_of_registration():
    model = Given(lambda m, x: m.out(m.hidden(x)), out=nn.Linear(6, 3), hidden=nn.Linear(4, 6))
    assert layers.find_last_layer(model, rows()).name == "out"


def test_unused_head_is_ignored():
    model = Given(lambda m, x: m.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3), c=nn.Linear(4, 3))
    nn.init.zeros_(model.a.weight)
    assert layers.find_last_layer(model, rows()).name == "b"


def test_the_probing_run_leaves_no_trace(device):
    class Restless(Residual):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.register_buffer("cache", torch.full((2,), float("nan")), persistent=False)
            self.register_buffer("absent", None)

        def forward(self, x):
            self.steps += 1
            self.cache = torch.rand(2, device=x.device)
            return super().forward(x + 0 * torch.rand_like(x))

    model = Restless().to(device).train()
    model.norm.eval()
    modes = [m.training for m in model.modules()]
    cache = model.cache
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    torch.manual_seed(5)
    found = layers.find_last_layer(model, images(device))
    layers.find_wide_layer(model, images(device), found)
    drawn = torch.rand(3, device=device)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3, device=device))
    assert [m.training for m in model.modules()] == modes
    assert model.cache is cache and model.absent is None
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer.nan_to_num(7.0), buffers[name].nan_to_num(7.0)), name
    assert all(p.grad is None for p in model.parameters())
    assert hook_count(model) == 0


def test_the_probing_run_is_in_eval_mode():
    # in train mode BatchNorm refuses a single sample
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).train()
    assert layers.find_last_layer(model, rows(1)).name == "2"


def test_model_is_restored_where_its_forward_fails():
    model = Residual().train()
    with pytest.raises(RuntimeError):
        layers.find_last_layer(model, torch.rand(2, 3, 6, 6))
    assert model.training and model.norm.training
    assert hook_count(model) == 0


def test_layers_under_vmap_are_refused_by_name():
    model = Given(
        lambda m, x: torch.func.vmap(lambda row: m.out(m.hidden(row)))(x),
        hidden=nn.Linear(4, 6),
        out=nn.Linear(6, 3),
    )
    with pytest.raises(
        ValueError, match=r"model: torch\.func \(vmap, grad\) runs its Linear layer"
    ):
        layers.find_last_layer(model, rows())


NOT_THE_OUTPUT = {
    "softmax": lambda m, x: F.softmax(m.out(m.hidden(x)), -1),
    "scaled": lambda m, x: 2 * m.out(m.hidden(x)),
    "in place": lambda m, x: m.out(m.hidden(x)).clamp_(-1e9, 1e9),
    "softplus in place": lambda m, x: tp.softplus_(m.out(m.hidden(x))),
    "reshaped": lambda m, x: m.out(m.hidden(x))[None],
}


@pytest.mark.parametrize("case", NOT_THE_OUTPUT)
@pytest.mark.parametrize("given", [None, "out"])
def test_output_that_is_not_the_last_layers_is_refused(case, given):
    model = Given(NOT_THE_OUTPUT[case], hidden=nn.Linear(4, 6), out=nn.Linear(6, 3))
    with pytest.raises(
        ValueError, match=r"last_layer: the model's output is not .*'hidden', 'out'"
    ):
        layers.find_last_layer(model, rows(), given)


def test_two_heads_are_ambiguous():
    # equal values are no proof: the second head adds exact zeros until it is trained
    with pytest.raises(ValueError, match=r"last_layer: .*sum of heads.*'first', 'second'"):
        layers.find_last_layer(Summed(), rows())
    pair = Given(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"model: expected one tensor.*got tuple.*'a', 'b'"):
        layers.find_last_layer(pair, rows())


@pytest.mark.parametrize("given", [None, "fc"])
def test_layer_that_runs_twice_is_ambiguous(given):
    model = Given(lambda m, x: m.fc(torch.tanh(m.fc(x))), fc=nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"last_layer: 'fc' runs 2 times"):
        layers.find_last_layer(model, rows(), given)


@pytest.mark.parametrize("way", ["parameter", "memory"])
def test_tied_weights_are_refused(way):
    model = nn.Sequential(nn.Linear(4, 4), Softplus(), nn.Linear(4, 4))
    weight = model[0].weight
    model[2].weight = weight if way == "parameter" else nn.Parameter(weight.detach())
    with pytest.raises(ValueError, match=r"last_layer: '2' shares its weights with '0\.weight'"):
        layers.find_last_layer(model, rows())


def test_one_module_under_two_names_is_not_tied():
    model = Given(lambda m, x: m.fc(x), fc=nn.Linear(4, 3))
    model.alias = model.fc
    assert layers.find_last_layer(model, rows()).module is model.fc


def test_given_layer_that_does_not_run():
    model = Given(lambda m, x: m.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"'a' runs 0 times .*'b'"):
        layers.find_last_layer(model, rows(), "a")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("nowhere", ValueError, r"last_layer: 'nowhere' is not in the model; .*'0', '2'"),
        (nn.Linear(4, 3), ValueError, r"last_layer: this Linear.* is not in the model; .*'0', '2'"),
        ("1", TypeError, r"last_layer: expected an affine layer \(nn\.Linear\), got Softplus"),
        ("", TypeError, r"expected an affine layer \(nn\.Linear\), got Sequential; .*'0', '2'"),
        (7, TypeError, r"last_layer: expected an nn\.Linear or its name, got int"),
    ],
)
def test_bad_last_layer_argument(given, error, message):
    model = nn.Sequential(nn.Linear(4, 6), Softplus(), nn.Linear(6, 3))
    with pytest.raises(error, match=message):
        layers.find_last_layer(model, rows(), given)


def test_layers_that_only_look_affine_are_refused():
    class Clamped(nn.Linear):
        def forward(self, x):
            return super().forward(x).clamp(min=0)

    with pytest.raises(TypeError, match="got Clamped"):
        layers.find_last_layer(nn.Sequential(Clamped(4, 3)), rows())
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="'0' is parametrized"):
        layers.find_last_layer(nn.Sequential(normed), rows())
    conv = nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten())
    with pytest.raises(ValueError, match=r"comes from the convolution '0'.*nn\.Linear"):
        layers.find_last_layer(conv, images())
    with pytest.raises(ValueError, match="lazy"):
        layers.find_last_layer(nn.Sequential(nn.LazyLinear(3)), rows())


def test_one_row_per_sample_is_required():
    with pytest.raises(ValueError, match=r"one row per sample, \(5, 4\), got \(5, 2, 4\)"):
        layers.find_last_layer(nn.Sequential(nn.Linear(4, 3)), torch.rand(5, 2, 4))


@pytest.mark.parametrize(
    ("example", "error"), [(torch.rand(0, 4), ValueError), ([[1.0] * 4], TypeError)]
)
def test_bad_example(example, error):
    with pytest.raises(error, match="example_input: expected"):
        layers.find_last_layer(nn.Sequential(nn.Linear(4, 3)), example)


# the wide layer


@pytest.mark.parametrize("inplace", [False, True])
def test_wide_layer_is_found(device, inplace):
    model = Residual(inplace).to(device)
    last = layers.find_last_layer(model, images(device))
    wide = layers.find_wide_layer(model, images(device), last)
    assert wide is not None
    assert wide.linear is model.head["inner"].wide
    assert wide.linear_name == "head.inner.wide"
    assert wide.activation_name == "head.inner.activation"
    assert wide.beta == 100.0


def mlp(**extra: nn.Module):
    return {"wide": nn.Linear(4, 6), "act": Softplus(7.0), "out": nn.Linear(6, 3), **extra}


NO_WIDE_LAYER = {
    "residual": lambda m, x: m.out(m.act(m.wide(x)) + 0 * m.side(x)),
    "zero added in place": lambda m, x: m.out(m.act(m.wide(x)).add_(torch.zeros(1))),
    "scaled before": lambda m, x: m.out(m.act(1.0 * m.wide(x))),
    "relu": lambda m, x: m.out(torch.relu(m.wide(x))),
    "torch's softplus": lambda m, x: m.out(F.softplus(m.wide(x), 7.0)),
    "no hidden layer": lambda m, x: m.side_out(x),
    "wide twice": lambda m, x: m.out(m.act(m.wide(x + m.wide(x).mean()))),
}


@pytest.mark.parametrize("case", NO_WIDE_LAYER)
def test_no_wide_layer(case):
    extra = {"side": nn.Linear(4, 6), "side_out": nn.Linear(4, 3)}
    model = Given(NO_WIDE_LAYER[case], **mlp(**extra))
    last = layers.find_last_layer(model, rows())
    assert layers.find_wide_layer(model, rows(), last) is None
    with pytest.raises(ValueError, match="no wide layer"):
        layers.split(model, last).backbone_features(rows())


# cutting the model


@pytest.mark.parametrize("wrap", ["plain", "DataParallel", "compile", "compiled inside"])
def test_split_gives_the_features(device, wrap):
    inner = Residual().to(device).eval()
    model = inner
    if wrap == "DataParallel":
        model = nn.DataParallel(inner)
    elif wrap == "compile":
        model = torch.compile(inner, backend="eager")
    elif wrap == "compiled inside":
        inner.head["inner"] = torch.compile(inner.head["inner"], backend="eager")
    x = images(device)
    with torch.no_grad():
        model(x)  # compiled now, without the hooks to come
    last = layers.find_last_layer(model, x)
    wide = layers.find_wide_layer(model, x, last)
    assert last.name == "head.inner.last_layer"
    assert wide is not None and wide.linear_name == "head.inner.wide"
    cut = layers.split(model, last, wide)
    with torch.no_grad():
        h, z = cut.hidden_features(x), cut.backbone_features(x)
        assert torch.equal(tp.softplus(wide.linear(z), wide.beta), h)
        assert torch.equal(last.module(h), inner(x))
    assert hook_count(inner) == 0


def test_nothing_runs_behind_the_cut():
    ran = []

    class Loud(nn.Linear):
        def forward(self, x):
            ran.append(self)
            return super().forward(x)

    def run(m, x):
        try:
            x = m.act(m.wide(x))
        except Exception:  # a forward that swallows errors must not swallow the cut
            x = x.new_zeros(len(x), 6)
        return m.out(x) if m.out is not None else m.late(x)

    model = Given(run, wide=nn.Linear(4, 6), act=Softplus(), out=nn.Linear(6, 3))
    last = layers.find_last_layer(model, rows())
    model.wide = Loud(4, 6)
    assert layers.input_of(model, model.wide, rows()).shape == (5, 4)
    assert ran == []
    assert layers.input_of(model, last.module, rows()).shape == (5, 6)
    assert ran == [model.wide]


def test_features_carry_gradients_where_the_caller_wants_them():
    model = nn.Sequential(nn.Linear(4, 6), Softplus(), nn.Linear(6, 3))
    h = layers.split(model, layers.find_last_layer(model, rows())).hidden_features(rows())
    h.sum().backward()
    assert model[0].weight.grad is not None and model[2].weight.grad is None


def test_layer_that_is_not_reached():
    with pytest.raises(ValueError, match="does not reach"):
        layers.input_of(nn.Sequential(nn.Linear(4, 3)), nn.Linear(4, 3), rows())


# parameters


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile])
def test_parameters_are_divided_under_canonical_names(wrap):
    model = Residual()
    model.stem.bias.requires_grad_(False)
    last = layers.find_last_layer(model, images())
    hidden = layers.hidden_parameters(wrap(model), last)
    own = layers.last_parameters(wrap(model), last)
    assert set(own) == {"head.inner.last_layer.weight", "head.inner.last_layer.bias"}
    everything = {n: p for n, p in model.named_parameters() if n != "stem.bias"}
    assert {**hidden, **own}.keys() == everything.keys()
    assert all(everything[n] is p for n, p in {**hidden, **own}.items())


def test_canonical_name():
    assert canonical_name("module._orig_mod.a.module.b.weight") == "a.b.weight"
    assert canonical_name("modules.a") == "modules.a"


def test_names_that_collide_are_refused():
    model = Given(lambda m, x: m.fc(x), module=nn.Sequential(), fc=nn.Linear(4, 3))
    model.module.fc = nn.Linear(4, 4)
    last = layers.find_last_layer(model, rows())
    with pytest.raises(ValueError, match=r"two parameters are called 'fc\.weight'"):
        layers.hidden_parameters(model, last)
