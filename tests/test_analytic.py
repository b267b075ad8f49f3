"""`analytic` with its report, and `classify`: what is real analytic and what is not."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import Given
from twophase_ext.nn import Softplus, analytic, classify


def remaining(model: nn.Module) -> dict[tuple[str, str], str]:
    return {(f.name, f.kind): f.status for f in analytic(model).remaining}


# classify


ELEMENTWISE = [
    *(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.ELU(), nn.CELU(), nn.SELU()),
    *(nn.Hardswish(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Hardshrink(), nn.Softshrink()),
    *(nn.Threshold(0.5, 0.0), nn.Softsign(), nn.RReLU().eval()),
    *(nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish()),
    *(nn.LogSigmoid(), nn.Tanhshrink(), Softplus(10.0), nn.Identity(), nn.Dropout().eval()),
]


@pytest.mark.parametrize("module", ELEMENTWISE, ids=repr)
def test_verdicts_on_activations_agree_with_their_third_differences(module):
    # Of a smooth function f'''(x) stays as it is when the step shrinks; a kink in f, or a jump of
    # f' or f'', makes the quotient grow by the step's factor, 10, at least.
    def largest_third_difference(step: float) -> float:
        x = torch.arange(-4.0, 4.0, step, dtype=torch.float64)
        with torch.no_grad():
            return (module.double()(x).diff(n=3).abs().max() / step**3).item()

    coarse, fine = largest_third_difference(1e-2), largest_third_difference(1e-3)
    grows = fine > 3 * coarse + 1e-3
    (finding,) = classify(nn.Sequential(module))
    assert finding.status == ("not analytic" if grows else "analytic")


def test_torch_softplus_is_not_analytic():
    x = torch.tensor([20.0, math.nextafter(20.0, 21.0)], dtype=torch.float64)
    below, above = nn.Softplus()(x).tolist()
    assert above < below  # a jump down: no increasing analytic function does that
    assert classify(nn.Sequential(nn.Softplus()))[0].status == "not analytic"
    assert classify(nn.Sequential(Softplus()))[0].status == "analytic"


@pytest.mark.parametrize(
    ("module", "status"),
    [
        (nn.BatchNorm1d(3), "analytic"),
        (nn.BatchNorm1d(3, eps=0.0), "unknown"),
        (nn.LayerNorm(3), "analytic"),
        (nn.Dropout(0.5), "analytic"),
        (nn.Threshold(1.0, 0.0), "not analytic"),
        (nn.MaxPool2d(2), "not analytic"),
        (nn.AdaptiveMaxPool1d(2), "not analytic"),
        (nn.AvgPool2d(2), "analytic"),
        (nn.LPPool1d(2, 2), "not analytic"),
        (nn.Embedding(4, 3), "analytic"),
        (nn.Embedding(4, 3, max_norm=1.0), "not analytic"),
        (nn.RNN(3, 3), "analytic"),
        (nn.RNN(3, 3, nonlinearity="relu"), "not analytic"),
        (nn.LSTM(3, 3), "analytic"),
        (nn.TransformerEncoderLayer(4, 2, 8, activation="gelu"), "analytic"),
        (nn.TransformerEncoderLayer(4, 2, 8, activation="relu"), "not analytic"),
        (nn.TransformerEncoderLayer(4, 2, 8, activation=torch.sin), "unknown"),
        (nn.PairwiseDistance(), "unknown"),
    ],
    ids=repr,
)
def test_verdicts_on_layers(module, status):
    model = nn.Sequential(module)
    finding = next(f for f in classify(model) if f.name == "0")
    assert finding.status == status
    assert finding.kind == type(module).__name__
    assert finding.reason


def test_subclass_with_another_forward_is_not_its_base():
    class Hard(nn.Tanh):
        def forward(self, x):
            return x.clamp(-1, 1)

    class Named(nn.Tanh):
        pass

    _, hard, named = classify(nn.Sequential(nn.Linear(3, 3), Hard(), Named()))
    assert (hard.kind, hard.status) == ("function clamp", "not analytic")
    assert (named.kind, named.status) == ("Named", "analytic")


def test_custom_modules():
    class Smooth(nn.Module):
        def forward(self, x):
            return torch.tanh(x) * x.mean() / 3

    def branch(_, x):
        return x if x.sum() > 0 else -x

    found = classify(nn.Sequential(Smooth(), nn.Linear(2, 2)))
    assert [(f.name, f.status) for f in found] == [("0", "analytic"), ("1", "analytic")]
    model = Given(branch, spare=Smooth(), deep=nn.Sequential(Given(lambda m, x: x.abs())))
    by_name = {f.name: f for f in classify(model)}
    assert by_name[""].status == "unknown"
    assert by_name[""].reason.startswith("could not be traced: TraceError")
    assert by_name["spare"].status == by_name["deep.0"].status == "unknown"
    assert by_name["spare"].reason.startswith("not reached")


def test_classify_changes_nothing():
    class Restless(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_buffer("steps", torch.zeros(()))
            self.seen = None

        def forward(self, x):
            self.steps += 1
            self.seen = self.fc(x) + torch.rand(3)
            return self.seen

    model = Restless()
    weight = model.fc.weight
    torch.manual_seed(3)
    found = classify(model)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert ("function rand", "not analytic") in [(f.kind, f.status) for f in found]
    assert "changes its own 'steps'" in found[1].reason
    assert model.seen is None and model.steps == 0 and model.fc.weight is weight


# analytic


@pytest.mark.parametrize(
    ("old", "note"),
    [
        (nn.ReLU(), ""),
        (nn.Threshold(0.0, 0.0), ""),
        (nn.RReLU(), "random"),
        (nn.ELU(), "negative branch"),
        (nn.CELU(), "negative branch"),
        (nn.SELU(), "scale"),
    ],
    ids=repr,
)
def test_relu_like_modules_are_replaced(old, note):
    model = nn.Sequential(nn.Linear(3, 3), old)
    report = analytic(model, beta=50.0)
    assert repr(model[1]) == "Softplus(beta=50)"
    assert isinstance(model[1], Softplus)
    (row,) = report.replaced
    assert (row.name, row.old, row.new) == ("1", repr(old), "Softplus(beta=50)")
    assert note in row.note and bool(note) == bool(row.note)
    assert report.is_analytic and report.traced


def test_torch_softplus_keeps_its_beta():
    model = nn.Sequential(nn.Softplus(beta=3.0))
    analytic(model, beta=100.0)
    assert repr(model[0]) == "Softplus(beta=3)"


@pytest.mark.parametrize(
    "module",
    [
        *(nn.Softsign(), nn.Softshrink(), nn.Threshold(1.0, 0.0), nn.AdaptiveMaxPool2d(2)),
        nn.MaxPool2d(2, return_indices=True),
    ],
    ids=repr,
)
def test_what_cannot_be_replaced_is_reported(module):
    model = nn.Sequential(nn.Linear(2, 2), module)
    report = analytic(model)
    assert model[1] is module
    assert not report.replaced and not report.is_analytic
    (left,) = report.remaining
    assert (left.name, left.kind, left.status) == ("1", type(module).__name__, "not analytic")
    assert ("average pooling" in left.reason) == ("Pool" in left.kind)


@pytest.mark.parametrize(
    "module",
    [nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.LogSigmoid(), Softplus(7.0)],
    ids=repr,
)
def test_analytic_modules_are_left_alone(module):
    model = nn.Sequential(module)
    assert analytic(model).is_analytic
    assert model[0] is module


def test_depth_sharing_mode_and_inplace_are_kept(device):
    relu = nn.ReLU(inplace=True)
    inner = nn.ModuleDict({"act": relu, "bn": nn.BatchNorm1d(4)})
    model = Given(
        lambda m, x: m.last(m.first(m.deep[0]["act"](m.deep[0]["bn"](m.deep[1](x))))),
        first=relu,
        deep=nn.ModuleList([inner, nn.Linear(4, 4)]),
        last=nn.ReLU(),
    ).to(device)
    model.last.eval()
    report = analytic(model)
    assert model.first is model.deep[0]["act"] and model.first is not model.last
    assert model.first.inplace and not model.last.inplace
    assert model.first.training and not model.last.training
    assert {r.name for r in report.replaced} == {"first", "deep.0.act", "last"}
    assert report.is_analytic
    out = model(torch.randn(6, 4, device=device))
    assert out.device.type == device
    assert analytic(model).replaced == ()


def test_error_against_relu_is_at_most_log_2_over_beta():
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    model = nn.Sequential(nn.ReLU(), nn.Identity())
    before = model(x)
    analytic(model, beta=100.0)
    gap = model(x) - before
    assert gap.min() >= 0
    bound = math.log(2) / 100
    assert bound * 0.99 < gap.max() <= bound * (1 + torch.finfo(torch.float64).eps)


HARD_CALLS = {
    "weight clamp": lambda m, x: F.linear(x, m.fc.weight.clamp(-1, 1)),
    "clamp": lambda m, x: torch.clamp(m.fc(x), min=0),
    "method clamp": lambda m, x: m.fc(x).clamp_(0),
    "abs": lambda m, x: m.fc(x).abs(),
    "builtin abs": lambda m, x: abs(m.fc(x)),
    "max": lambda m, x: m.fc(x).max(-1)[0],
    "maximum": lambda m, x: torch.maximum(m.fc(x), x),
    "softplus": lambda m, x: F.softplus(m.fc(x)),
    "sort": lambda m, x: m.fc(x).sort()[0],
    "round": lambda m, x: m.fc(x).round(),
    "normalize": lambda m, x: F.normalize(m.fc(x)),
    "comparison": lambda m, x: m.fc(x) * (m.fc(x) > 0),
    "dropout": lambda m, x: F.dropout(m.fc(x), 0.3),
    "randn_like": lambda m, x: m.fc(x) + torch.randn_like(x),
}


@pytest.mark.parametrize("case", HARD_CALLS)
def test_functional_calls_are_found(case):
    model = nn.Sequential(Given(HARD_CALLS[case], fc=nn.Linear(4, 4)))
    model(torch.randn(4, 4))
    report = analytic(model)
    assert report.traced and not report.is_analytic
    found = [f for f in report.remaining if f.status == "not analytic"]
    assert found and all(f.name == "0" and f.kind.startswith("function ") for f in found)
    function = {"comparison": "gt"}.get(case, case)
    for other in ("torch.", "method ", "builtin ", "in place ", "weight "):
        function = function.removeprefix(other)
    assert found[0].kind == f"function {function}"


SMOOTH_CALLS = {
    "own softplus": lambda m, x: tp.softplus(m.fc(x)) + tp.ops.softplus_(m.fc(x), 3.0),
    "sizes": lambda m, x: m.fc(x).view(x.size(0), x.shape[1] // 2, -1).flatten(1),
    "causal mask": lambda m, x: m.fc(x) * (torch.arange(4) > 1),
    "mask of the inputs": lambda m, x: torch.where(x > 0, m.fc(x), 0.0).masked_fill(x == 1, 2.0),
    "fft": lambda m, x: torch.fft.fft(m.fc(x)).real,
    "constants": lambda m, x: m.fc(x) / math.sqrt(4) + torch.relu(torch.ones(4)),
    "powers": lambda m, x: m.fc(x) ** 2 - torch.exp(-m.fc(x)),
    "norms": lambda m, x: F.layer_norm(m.fc(x), (4,)),
    "dropout off": lambda m, x: F.dropout(m.fc(x), training=m.training),
    "attention": lambda m, x: F.scaled_dot_product_attention(m.fc(x), x, x),
}


@pytest.mark.parametrize("case", SMOOTH_CALLS)
def test_smooth_calls_are_not_reported(case):
    model = Given(SMOOTH_CALLS[case], fc=nn.Linear(4, 4))
    model(torch.randn(4, 4))
    report = analytic(model)
    assert report.is_analytic, str(report)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.fc(x).sqrt(),
        lambda m, x: 1 / m.fc(x),
        lambda m, x: m.fc(x) ** 0.5,
        lambda m, x: m.fc(x).norm(),
        lambda m, x: torch.special.bessel_j0(m.fc(x)),
    ],
)
def test_partly_analytic_or_unlisted_calls_are_unknown(run):
    (left,) = analytic(Given(run, fc=nn.Linear(4, 4))).remaining
    assert left.status == "unknown"


def test_optional_arguments_do_not_stop_the_tracing():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, mask=None, scale=None):
            x = self.fc(x)
            if mask is not None:
                x = x.relu() * mask
            return x if scale is None else abs(x)

    assert analytic(Masked()).is_analytic


def test_failed_tracing_is_said():
    def run(m, x):
        x = m.act(m.fc(x))
        return x.relu() if x.sum() > 0 else x

    model = Given(run, fc=nn.Linear(4, 4), act=nn.ReLU())
    report = analytic(model)
    assert isinstance(model.act, Softplus)
    assert not report.traced and not report.is_analytic
    assert remaining(model)["", "Given"] == "unknown"
    assert "could not be traced: TraceError" in str(report)
    assert "functional calls were not all seen" in str(report)


def test_model_that_cannot_be_copied_is_said():
    model = Given(lambda m, x: m.fc(x), fc=nn.Linear(4, 4))
    model.handle = (i for i in range(3))
    report = analytic(model)
    assert not report.traced
    assert "cannot be copied" in report.remaining[0].reason


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("activation", ["relu", nn.ReLU()])
def test_relu_of_transformer_layers_is_replaced_in_every_path(layer, activation):
    block = layer(8, 2, 16, dropout=0.0, batch_first=True, activation=activation).eval()
    model = nn.Sequential(block)
    x = torch.randn(3, 5, 8)
    arguments = (x,) if layer is nn.TransformerEncoderLayer else (x, x)
    report = analytic(model, beta=0.5)
    assert [r.name for r in report.replaced] == ["0.activation"]
    assert report.is_analytic, str(report)
    smooth = block(*arguments)
    with torch.no_grad():  # where torch takes its fused path, relu or gelu only
        fused = block(*arguments)
    tolerance = 2 * (smooth - block.double()(*(a.double() for a in arguments))).abs().max()
    assert (fused - smooth).abs().max() <= tolerance


def test_wrapped_models():
    for wrap in (nn.DataParallel, lambda m: torch.compile(m, backend="eager")):
        inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        report = analytic(wrap(inner))
        assert [r.name for r in report.replaced] == ["1"] and report.is_analytic
        assert isinstance(inner[1], Softplus)


def test_bad_models():
    with pytest.raises(ValueError, match=r"model: it is itself an nn\.ReLU"):
        analytic(nn.ReLU())
    for function in (analytic, classify):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got"):
            function(torch.relu)


def test_report_is_a_readable_table():
    model = nn.Sequential(nn.Linear(3, 3), nn.ELU(), nn.AdaptiveMaxPool1d(3))
    assert str(analytic(model)).splitlines() == [
        "analytic: not shown",
        "replaced: 1",
        "  where  was             now",
        "  1      ELU(alpha=1.0)  Softplus(beta=100)  "
        "(the negative branch, down to -1, is dropped)",
        "remaining: 1",
        "  where  what               why",
        "  2      AdaptiveMaxPool1d  not analytic: a maximum has kinks where two entries tie; "
        "use average pooling",
    ]
    assert str(analytic(nn.Sequential(nn.Tanh()))).startswith("analytic: yes\nreplaced: 0\n")
