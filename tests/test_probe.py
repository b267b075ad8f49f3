"""tau = 0: somebody else's backbone as it is, and the last layer's own convex problem."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

import twophase_ext as tp
from helpers import Given, bits, quiet, same_bits, toy_data
from twophase.report import write_report
from twophase_ext.integrations.transition import Transition

pytestmark = pytest.mark.filterwarnings("ignore:the last hidden layer has")
D, L2 = 12, 1e-2


class Backbone(nn.Module):
    """ReLU as a module and in the forward, BatchNorm with statistics of other data, dropout."""

    def __init__(self, trains: bool = True) -> None:
        super().__init__()
        self.trains, self.drop, self.act = trains, nn.Dropout(0.5), nn.ReLU()
        self.a, self.bn, self.b = nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Linear(16, D)

    def forward(self, x):
        if self.training and not self.trains:
            raise RuntimeError("only for inference")
        return F.relu(self.b(self.drop(self.act(self.bn(self.a(x))))))


def backbone(**settings) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Backbone(**settings)
        model.bn.running_mean.uniform_(-1, 1)
        model.bn.running_var.uniform_(0.5, 2)
    return model.requires_grad_(False)


def head(body: nn.Module, bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(body, nn.Linear(D, 3, bias=bias))


def probe(model, data, **settings):
    run = {"tau": 0, "second_phase": "exact", "exact": {"l2": L2, "gap": 1e-9}, **settings}
    return quiet(model, **run).fit(data)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_probe_is_logistic_regression_over_the_backbone_as_it_is(precision):
    (x, y), body = toy_data(200), backbone()
    model = head(body).train()
    before = bits(body)
    result = probe(model, (x, y), precision=precision)
    assert same_bits(before, {k: v.to(before[k].dtype) for k, v in bits(body).items()})
    h = backbone().eval()(x).double()
    m = torch.cat([h, torch.ones(len(x), 1).double()], 1)  # scikit-learn's intercept has no l2
    judge = LogisticRegression(C=1 / (len(x) * L2), fit_intercept=False, tol=1e-10, max_iter=1000)
    known = torch.tensor(judge.fit(m.numpy(), y.numpy()).coef_)
    found = torch.cat([model[1].weight, model[1].bias[:, None]], 1).detach().double()
    assert (found - known).norm() <= 1e-4 * known.norm()

    def objective(w):
        return float(F.cross_entropy(m @ w.T, y) + L2 / 2 * w.square().sum())

    gap = result.minimum.last_layer
    assert objective(found) - objective(known) <= gap <= 1e-6
    assert result.minimum.condition == "failed" and "at least" in str(result.minimum)
    assert "above its minimum over the last layer" in str(result)
    assert "no first phase (tau = 0)" in result.lead


def test_no_step_needs_training_mode():
    data = toy_data(65)  # a last batch of one sample
    model = head(backbone(trains=False))
    assert quiet(model, tau=0, epochs=1).fit(data).status == "completed"
    with pytest.raises(ValueError, match="not in training mode: only for inference"):
        quiet(model, tau=1, epochs=2).fit(data)
    with pytest.raises(ValueError, match="epochs: expected 2 or more with two phases, got 1"):
        quiet(model, epochs=1)
    for tau in (-1, 100):
        with pytest.raises(ValueError, match=r"tau: expected an epoch in 0\.\.99, got"):
            quiet(model, tau=tau, epochs=100)
    with pytest.raises(ValueError, match="tau: expected an epoch in 1"):  # of another's trainer
        Transition(0, noise_std=1e-3, seed=0, last_layer=None, verify=False)


@pytest.mark.parametrize(
    ("frozen", "settings", "kept"),
    [
        (False, {"tau": 0}, True),
        (False, {"tau": 0, "batch_norm": "frozen"}, False),
        (True, {"tau": 1}, True),
        (True, {"tau": 1, "second_phase": "none"}, True),
        (False, {"tau": 1}, False),
        (False, {"tau": 0, "second_phase": "none"}, False),
        (False, {"tau": 1, "batch_norm": "kept"}, True),
    ],
)
def test_whose_statistics_are_kept(frozen, settings, kept):
    body, data = backbone(), toy_data(60)
    body.requires_grad_(not frozen)
    before = [body.bn.running_mean.clone(), body.bn.running_var.clone()]
    trainer = quiet(head(body), epochs=2, verify=False, **settings)
    trainer.fit(data)
    assert trainer.config.batch_norm == ("kept" if kept else "frozen")
    for now, then in zip([body.bn.running_mean, body.bn.running_var], before, strict=True):
        assert torch.equal(now, then) == kept
    assert bool(body.bn.num_batches_tracked) != kept


def test_kept_statistics_are_those_of_the_whole_run():
    body = backbone().requires_grad_(True)
    branches = {"a": {"batch_norm": "kept"}}
    with pytest.raises(ValueError, match="batch_norm: a has 'kept', but the first phase trains"):
        quiet(head(body), tau=2, epochs=4).branch(branches, toy_data())


class Twice(Backbone):
    """The same ReLU over the frozen layers and over one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(D, D)

    def forward(self, x):
        return self.act(self.own(super().forward(x)))


def test_kinks_of_frozen_layers_are_constants_in_the_weights():
    x, y = toy_data(60)

    def analytic(model):
        rows = [*tp.check_assumptions(model, x).rows]
        return {r.status for r in rows if r.name.startswith("analytic")}

    body = backbone()
    wide = tp.nn.widen(head(body), x)
    assert analytic(wide) == {"held"}
    result = probe(wide, (x, y), second_phase="agd", exact=None, epochs=2, verify="auto")
    assert {status for _, status, _ in result.guarantee.premises} == {"held"}
    assert result.verdict.status == "proved" and result.minimum.condition == "proved"
    body.b.bias.requires_grad_(True)  # F.relu is of a weight again
    assert "failed" in analytic(wide)
    body.b.bias.requires_grad_(False)
    body.bn.weight.requires_grad_(True)  # and here nn.ReLU
    assert "failed" in analytic(wide)
    both = Twice()
    both.requires_grad_(False)
    both.own.requires_grad_(True)
    assert "failed" in analytic(tp.nn.widen(head(both), x))
    hooked = tp.nn.widen(head(backbone()), x)
    hooked[1].wide.register_forward_hook(lambda m, i, o: o.relu())
    assert "failed" in analytic(hooked)
    tied = backbone()  # a trainable view of a frozen weight is no constant
    tied.extra = nn.Parameter(tied.a.weight.data.view(-1))
    model = Given(lambda m, x: m.out(m.body(x)), body=tied, out=nn.Linear(D, 3))
    assert "failed" in analytic(model)


def test_nothing_to_perturb_and_nothing_needed_where_the_rank_is_proved_there():
    x, y = toy_data(6)
    for verify, status in (("auto", "held"), (False, "failed")):
        result = probe(head(backbone()), (x, y), verify=verify)
        rows = {name: (found, why) for name, found, why in result.guarantee.premises}
        assert rows["Gaussian noise at tau"][0] == status
        assert "no hidden tensor" in rows["Gaussian noise at tau"][1]
        assert verify is False or result.verdict.claim == "at w"


def test_branches_and_a_resumed_run_without_a_first_phase(tmp_path):
    data = toy_data(60)
    whole = head(backbone())
    quiet(whole, tau=0, epochs=4).fit(data)
    once = head(backbone())
    branched = quiet(once, tmp_path / "b", tau=0, epochs=4).branch(
        {"a": {}, "b": {"second_phase": "exact", "exact": {"l2": L2}}, "c": {}}, data
    )
    assert same_bits(bits(whole), bits(branched["a"].model))
    assert same_bits(bits(whole), bits(branched["c"].model))
    assert branched["b"].minimum.last_layer <= 1e-5

    class Stop:
        def on_epoch_end(self, run, record):
            if run.epoch == 2:
                raise KeyboardInterrupt

    model = head(backbone())
    folder = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        quiet(model, folder, tau=0, epochs=4, callbacks=[Stop()]).fit(data)
    again = head(backbone())
    quiet(again, folder, tau=0, epochs=4).fit(data, resume=True)
    assert same_bits(bits(whole), bits(again))
    page = tmp_path / "page.html"
    write_report([folder], page)
    assert "no first phase (tau = 0), then" in page.read_text(encoding="utf-8")
