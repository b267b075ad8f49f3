"""What is proved is what the user's own model computes, for every sample and at every call."""

import copy
import io
from contextlib import redirect_stdout

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import Given, bits, quiet, same_bits, toy_data, toy_mlp
from lying_models import NO_CLAIM, RANK_ONE, Net
from twophase_ext.expressivity import agreement
from twophase_ext.expressivity import problem as problem_module
from twophase_ext.model.network import Network

WAYS = [
    {"method": "separation"},
    {"method": "certificate"},
    {"w": "witness", "method": "certificate"},
    {"w": "witness"},
    {"w": "init", "method": "certificate"},
    {"method": "svd"},
    {},
]
CLAIMS = ("proved", "full rank", "deficient")
ONE = pytest.mark.usefixtures("one_thread")
pytestmark = ONE


def inputs(n=8, dtype=torch.float64):
    return torch.rand(n, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)


def verdicts(build, dtype):
    x = inputs(dtype=dtype)
    for way in WAYS:
        torch.manual_seed(0)
        model = build().to(dtype)
        before = bits(model)
        try:
            yield way, tp.verify_expressivity(model, x, **way), model, x
        except ValueError as error:  # refused by name
            assert str(error).startswith(("model: ", "last_layer: ")), error
        assert same_bits(before, bits(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", RANK_ONE)
def test_nothing_is_claimed_of_networks_whose_rows_are_one(name, dtype):
    for way, verdict, *_ in verdicts(RANK_ONE[name], dtype):
        assert verdict.status == "undecided", (way, str(verdict))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NO_CLAIM)
def test_nothing_is_claimed_of_what_is_no_function_of_the_sample(name, dtype):
    if name == "the precision" and dtype == torch.float64:
        pytest.skip("there it computes what it says")
    for way, verdict, *_ in verdicts(NO_CLAIM[name], dtype):
        assert verdict.status == "undecided", (way, str(verdict))


def test_ordinary_networks_are_proved_as_before():
    for _, verdict, model, x in verdicts(Net, torch.float32):
        assert verdict.status in CLAIMS[:2], str(verdict)
        if verdict.sigma_min_lower is not None:
            own = copy.deepcopy(model).double()
            own.load_state_dict(verdict.witness or {}, strict=False)
            with torch.no_grad():
                h = own.act(own.wide(own.stem(x.double())))
            matrix = torch.cat([h, torch.ones(len(h), 1)], 1)
            assert verdict.sigma_min_lower <= float(torch.linalg.svdvals(matrix)[-1])


def test_each_part_of_the_comparison_is_needed(monkeypatch):
    """Without the pass over the copy, without the other weights, something false is believed."""
    monkeypatch.setattr(agreement, "_require_copy", lambda *_: None)
    torch.manual_seed(0)
    model = Net(between=lambda m, a: a * 0 if len(a) > 2 and a.dtype == torch.float64 else a)
    verdict = tp.verify_expressivity(model, inputs(dtype=torch.float32), method="separation")
    assert verdict.status == "proved"
    monkeypatch.undo()
    verdict = tp.verify_expressivity(model, inputs(dtype=torch.float32), method="separation")
    assert verdict.status == "undecided"


def test_large_values_alone_show_a_guard():
    """The third sample's h is clamped; the first two, that layers are found with, are not."""
    model = Net(before=None, between=None)
    guard = Given(lambda m, x: m.net.last(m.guard(m.net.act(m.net.wide(m.net.stem(x))))), net=model)
    guard.guard = lambda h: h.clamp(max=0.01) if h.max() > 2 else h
    x = inputs()
    x[5] = 400
    for way in WAYS[:2]:
        assert tp.verify_expressivity(guard.double(), x, **way).status == "undecided"


def test_inputs_are_never_written():
    class InPlace(Net):
        def forward(self, x):
            return super().forward(x.sub_(0.5).div_(0.25))

    class Apart(Net):
        def forward(self, x):
            return super().forward((x - 0.5) / 0.25)

    for dtype in (torch.float32, torch.float64):
        x, y = inputs(dtype=dtype), torch.tensor([0, 1] * 4)
        before = x.clone()
        for way in WAYS:
            torch.manual_seed(0)
            given = tp.verify_expressivity(InPlace().to(dtype), x, **way)
            torch.manual_seed(0)
            wanted = tp.verify_expressivity(Apart().to(dtype), before.clone(), **way)
            assert (given.status, given.claim) == (wanted.status, wanted.claim), way
        tp.check_assumptions(InPlace().to(dtype), x)
        tp.nn.widen(InPlace().to(dtype), n=8, example_input=x)
        tp.ntk_rank(InPlace().to(dtype), x, method="bound")
        quiet(InPlace().to(dtype), precision=str(dtype)[6:], epochs=2, tau=1).fit((x, y))
        assert torch.equal(x, before)


def test_equal_inputs_count_once_only_where_their_rows_are_equal():
    x = inputs()
    x[3] = x[0]
    verdict = tp.verify_expressivity(Net().double(), x)
    assert (verdict.status, verdict.distinct) == ("proved", len(x) - 1)
    code = nn.Parameter(torch.zeros(8, 4))  # zero now, not for all weights

    class Placed(Net):
        def __init__(self):
            super().__init__(before=lambda m, z: z + m.code[: len(z)])
            self.code = code

    verdict = tp.verify_expressivity(Placed().double(), x)
    assert verdict.status == "undecided" and "place" in verdict.reason
    assert [0, 3] in verdict.repeated


def test_subnormal_inputs_are_not_called_equal_where_they_are_flushed():
    x = torch.tensor([[0.0], [5e-312], [1.0]], dtype=torch.float64)
    model = nn.Sequential(nn.Linear(1, 8), tp.nn.Softplus(1.0), nn.Linear(8, 1)).double()
    assert tp.verify_expressivity(model, x).status == "proved"
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        verdict = tp.verify_expressivity(model, x)
    finally:
        torch.set_flush_denormal(False)
    assert verdict.status == "undecided" and "flush" in verdict.reason


def test_float32_within_a_float64_copy_is_seen():
    class Narrow(nn.Module):
        def forward(self, x):
            return x.to(torch.float32).to(x.dtype)

    torch.manual_seed(0)
    affine = nn.Sequential(nn.Linear(4, 32), Narrow(), nn.Linear(32, 32), nn.Linear(32, 3))
    x = torch.randn(12, 4)
    for w in ("current", "init"):
        verdict = tp.verify_expressivity(affine, x, w=w)
        assert (verdict.status, verdict.rank) == ("undecided", 5)
        assert "float32" in verdict.dtype
    assert tp.verify_expressivity(affine, x, method="certificate").status == "undecided"


def test_features_are_kept_under_what_they_follow_from(tmp_path):
    def net(act):
        torch.manual_seed(0)
        first, wide = nn.Linear(3, 3), nn.Linear(3, 16)
        with torch.no_grad():
            first.weight.copy_(torch.eye(3))
            first.bias.zero_()
        return nn.Sequential(first, act, wide, tp.nn.Softplus(10.0), nn.Linear(16, 1))

    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    x[1], x[2] = -torch.rand(3) - 0.1, -torch.rand(3) - 0.2  # ReLU: both 0
    smooth = tp.verify_expressivity(net(nn.Tanh()), x, method="separation", folder=tmp_path)
    assert smooth.status == "proved"
    kinked = tp.verify_expressivity(net(nn.ReLU()), x, method="separation", folder=tmp_path)
    assert kinked.status == "undecided"

    class Branch(Net):
        def __init__(self):
            super().__init__(before=lambda m, z: z * m.scale)
            self.scale = 1.0

    torch.manual_seed(0)
    model = Branch()
    known = tp.verify_expressivity(model, inputs(), method="separation", folder=tmp_path)
    model.scale = 0.0
    now = tp.verify_expressivity(model, inputs(), method="separation", folder=tmp_path)
    assert (known.status, now.status) == ("proved", "undecided")


def test_frozen_branches_keep_their_weights():
    class Residual(Net):
        def forward(self, x):
            return self.last(self.act(self.wide(x + self.stem(x))))

    torch.manual_seed(0)
    model = Residual().double()
    with torch.no_grad():  # x + stem(x) forgets the first coordinate
        model.stem.weight.zero_()
        model.stem.weight[0, 0] = -1
        model.stem.bias.zero_()
    model.stem.requires_grad_(False)
    x = inputs()
    x[1, 1:] = x[0, 1:]
    for way in WAYS:
        verdict = tp.verify_expressivity(model, x, **way)
        assert verdict.status == "undecided", str(verdict)
        assert not any("stem" in name for name in verdict.witness or {})
    model.stem.requires_grad_(True)
    assert tp.verify_expressivity(model, x, w="witness").status == "proved"


def test_one_tokens_row_is_a_last_layers_too():
    class Decoder(nn.Module):
        def __init__(self, pick):
            super().__init__()
            self.pick, self.embed = pick, nn.Embedding(60, 16)
            self.mix, self.score = nn.Linear(16, 16), nn.Linear(16, 3, bias=False)

        def forward(self, x):
            return self.pick(self.score(torch.tanh(self.mix(self.embed(x)))))

    x = torch.arange(96).view(8, 12).T % 59 + 1
    torch.manual_seed(0)
    model = Decoder(lambda logits: logits[torch.arange(len(logits)), -1])
    assert Network(model, x[:2]).last.name == "score"
    tp.nn.widen(model, 12, example_input=x)
    result = quiet(model, epochs=4, tau=2, verify="auto").fit((x, torch.arange(12) % 3))
    with torch.no_grad():
        own = float(F.cross_entropy(model.eval()(x), torch.arange(12) % 3))
    assert result.final["train_loss"] == pytest.approx(own, rel=1e-5)
    assert result.verdict.status in CLAIMS[:2]
    for pick in (
        lambda logits: logits[:, -1] + 1,
        lambda logits: logits.max(1).values,
        lambda logits: logits[:, -1].clamp(min=0),
    ):
        with pytest.raises(ValueError, match="last_layer"):
            Network(Decoder(pick), x[:2])


def test_subclasses_that_compute_the_affine_map_are_last_layers():
    class Plain(nn.Linear):
        def forward(self, x):
            if torch.jit.is_scripting():
                return x
            return F.linear(x, self.weight, self.bias)

    class Shrunk(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias) * (1 - 1e-6)

    class Guarded(nn.Linear):
        def forward(self, x):
            return super().forward(x).clamp(-50, 50)

    x = torch.rand(5, 4)
    for kind, fits in ((Plain, True), (Shrunk, False), (Guarded, False)):
        model = nn.Sequential(nn.Linear(4, 6), tp.nn.Softplus(), kind(6, 3))
        if fits:
            assert Network(model, x).last.name == "2"
        else:
            with pytest.raises((TypeError, ValueError), match="last_layer"):
                Network(model, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda last: last.register_forward_hook(lambda _, __, out: out / 100),
        lambda last: last.register_forward_pre_hook(lambda _, a: (a[0] / 100,)),
        lambda last: last.register_forward_hook(lambda *_: None),
        lambda last: setattr(last, "forward", lambda h: F.linear(h, last.weight) / 100),
        lambda last: nn.utils.parametrizations.weight_norm(last),
        lambda last: nn.utils.weight_norm(last),
    ],
)
def test_a_last_layer_that_is_not_its_weights_is_refused_everywhere(change):
    model, (x, y) = toy_mlp(), toy_data(12)
    change(model[4])
    for call in (
        lambda: quiet(model).fit((x, y)),
        lambda: tp.verify_expressivity(model, x),
        lambda: tp.ntk_rank(model, x),
        lambda: tp.freeze(model, train=(x, y)),
        lambda: tp.freeze(model, last_layer=model[4]),
        lambda: tp.FeatureCache(model.eval(), (x, y)),
        lambda: tp.nn.widen(model, 12, example_input=x),
    ):
        with pytest.raises((ValueError, TypeError), match="last_layer"):
            call()
    rows = tp.check_assumptions(model, x).rows
    assert [(r.name, r.status) for r in rows] == [("affine last layer", "failed")]


def test_global_hooks_are_refused_by_name():
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: None)
    try:
        with pytest.raises(ValueError, match="global module hooks"):
            quiet(toy_mlp()).fit(toy_data())
    finally:
        handle.remove()


def test_a_forward_that_changes_its_own_weights_is_refused_before_training():
    class Restless(Net):
        def forward(self, x):
            with torch.no_grad():
                self.stem.weight.mul_(0.99)
            return super().forward(x)

    model = Restless()
    before = bits(model)
    with redirect_stdout(io.StringIO()), pytest.raises(ValueError, match=r"stem\.weight"):
        quiet(model).fit((inputs(dtype=torch.float32), torch.tensor([0, 1] * 4)))
    assert same_bits(before, bits(model))


def test_no_batch_has_all_features_of_many_samples(monkeypatch):
    """Of 20,000 samples a copy of them is 3.3 GiB, and some four are held."""
    x = toy_data(300)[0]
    model = toy_mlp()
    tp.nn.widen(model, x)  # M is 300 x 331
    sizes, observe = [], agreement._observe

    def watched(problem, model, x, *rest):
        sizes.append(len(x))
        return observe(problem, model, x, *rest)

    monkeypatch.setattr(agreement, "_observe", watched)
    for most, largest in ((300 * 331, 300), (300 * 331 - 1, 256)):
        monkeypatch.setattr(agreement, "FEATURES", most)
        assert tp.verify_expressivity(model, x, method="separation").status == "proved"
        assert max(sizes) == largest
        sizes.clear()


def test_large_models_run_on_a_part_of_the_samples(monkeypatch):
    """All come once in the user's own model; the float64 copy has a quarter for each draw."""
    x = toy_data(300)[0]
    model = toy_mlp()
    tp.nn.widen(model, x)
    seen, passes = [], agreement._passes

    def watched(problem, own, dtype, stage, **rest):
        for index, found in passes(problem, own, dtype, stage, **rest):
            seen.append((dtype, set(index.tolist())))
            yield index, found

    monkeypatch.setattr(agreement, "_passes", watched)
    monkeypatch.setattr(problem_module.Problem, "compared", 40)
    for method, parts in (("separation", [10, 10, 40]), ("certificate", [20, 40])):
        w = "witness" if method == "certificate" else "current"
        verdict = tp.verify_expressivity(model, x, w=w, method=method)
        assert verdict.status == "proved"
        assert [len(rows) for _, rows in seen] == parts
        assert [dtype for dtype, _ in seen] == [torch.float64] * (len(parts) - 1) + [torch.float32]
        assert not seen[0][1] & seen[1][1] or method == "certificate"
        assert set.union(*(rows for _, rows in seen)) == seen[-1][1]
        assert verdict.stages[-1]["samples"] == sum(parts)
        seen.clear()
