"""What is found before the first step, and what no longer ends a run that is otherwise fine."""

import signal
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from interrupts import End

Outputs = namedtuple("Outputs", ["logits", "aux"])


class Aux(nn.Module):
    """An auxiliary head in training mode, as GoogLeNet and Inception have."""

    def __init__(self, give) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5, 32), nn.Linear(32, 64)
            self.bn, self.c = nn.BatchNorm1d(64), nn.Linear(64, 3)
            self.aux = nn.Linear(32, 3)
        self.give = give

    def forward(self, x):
        h = torch.tanh(self.a(x))
        out = self.c(self.bn(torch.tanh(self.b(h))))
        return self.give(out, self.aux(h)) if self.training else out


FIRST = [
    lambda out, aux: (out, aux),
    lambda out, aux: [out, aux],
    Outputs,
    lambda out, aux: {"out": out, "aux": aux},
    lambda out, aux: (out, None),
]


@pytest.mark.parametrize("give", FIRST)
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"accumulate": 2}])
def test_the_main_output_is_trained(give, settings):
    found = quiet(Aux(give), **settings).fit(toy_data())
    plain = quiet(Aux(lambda out, aux: out), **settings).fit(toy_data())
    losses = [[row["train_loss"] for row in r.history] for r in (found, plain)]
    assert losses[0] == losses[1]
    assert same_bits(bits(found.model), bits(plain.model))


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda out, aux: (aux[:, :2], out), r"tuple with first \[2, 2\]"),
        (lambda out, aux: (out.mean(), out), r"tuple with first \[\]"),
        (lambda out, aux: out.mean(), r"got \[\]"),
        (lambda out, aux: (), "tuple with first NoneType"),
        (lambda out, aux: None, "NoneType"),
        (lambda out, aux: torch.cat([out, aux], 1), r"got \[2, 6\]"),
        (lambda out, aux: 1 / 0, "not in training mode: division by zero"),
    ],
)
def test_other_outputs_in_training_mode_are_refused(give, message, tmp_path):
    model = Aux(give)
    before, modes = bits(model), [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=f"model: .*{message}"):
        quiet(model, tmp_path / "run").fit(toy_data())
    assert same_bits(bits(model), before) and not (tmp_path / "run").exists()
    assert [m.training for m in model.modules()] == modes


def only_float32(q, y):
    if q.dtype is not torch.float32:
        raise TypeError("float32 alone")
    return F.mse_loss(q, y)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (only_float32, "fails on float64 outputs.*float32 alone"),
        (lambda q, y: (q - y).square(), "expected a 0-d tensor"),
        (lambda q, y: (q - y).square().mean().detach(), "does not require grad"),
        (lambda q, y: (q.detach().numpy() - y.numpy()).mean(), "fails on outputs"),
    ],
)
def test_losses_that_cannot_be_evaluated_are_refused(function, message):
    loss = tp.ConvexLoss(function, smoothness=2.0, name="own")
    x, _ = toy_data()
    with pytest.raises(ValueError, match=f"loss: .*{message}"):
        quiet(toy_mlp(), loss=loss, second_phase="gd").fit((x, torch.randn(len(x), 3)))


@pytest.mark.parametrize("error", [MemoryError("no room"), IndexError("a rule"), ValueError("x")])
def test_a_verification_that_fails_is_undecided(error, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr("twophase_ext.training.proof.verify_network", fails)
    with pytest.warns(UserWarning, match="training goes on"):
        result = quiet(toy_mlp(), verify="auto", second_phase="gd").fit(toy_data())
    assert result.status == "completed" and result.verdict.status == "undecided"
    assert f"{type(error).__name__}: {error}" in result.verdict.reason
    assert result.verdict.n == 60 and result.verdict.width == 80


@pytest.mark.parametrize("mode", ["hidden", "backbone", "hidden-bfloat16"])
def test_a_cache_that_fits_nowhere_is_refused(mode, monkeypatch):
    monkeypatch.setattr(
        "twophase_ext.training.features.cache.available_memory", lambda device: 1000
    )
    with pytest.raises(ValueError, match=f"feature_cache: '{mode}' takes 0.0.* 'auto' takes"):
        quiet(toy_mlp(), feature_cache=mode).fit(toy_data())
    assert quiet(toy_mlp()).fit(toy_data()).feature_cache == "disk"


def test_a_bound_that_fails_ends_no_run(monkeypatch):
    def fails(*args, **kwargs):
        raise ArithmeticError("a comparator")

    monkeypatch.setattr("twophase_ext.training.phases.theorem.guarantee", fails)
    with pytest.warns(UserWarning, match="guarantee not evaluated"):
        result = quiet(toy_mlp(), second_phase="gd").fit(toy_data())
    assert result.status == "completed" and not result.guarantee.curve
    assert result.guarantee.premises[-1] == (
        "bound",
        "not checked",
        "not evaluated: ArithmeticError: a comparator",
    )


# --- signals, modes ----------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 3])
def test_sigterm_saves_as_ctrl_c_does(tmp_path, epoch):
    whole = quiet(toy_convnet()).fit(toy_images())
    handler = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the signal came through"))
    own = signal.getsignal(signal.SIGTERM)
    cut = quiet(toy_convnet(), tmp_path, callbacks=[End(epoch - 1, by=signal.SIGTERM)]).fit(
        toy_images()
    )
    assert cut.status == "interrupted" and len(cut.history) == epoch
    assert "bit-identical" not in str(cut)
    assert ("of tau, not compared again" in str(cut)) == (epoch == 3)
    assert signal.signal(signal.SIGTERM, handler) is own
    resumed = quiet(toy_convnet(seed=1), tmp_path).fit(toy_images(), resume=True)
    assert resumed.status == "completed" and same_bits(bits(resumed.model), bits(whole.model))


def test_after_tau_the_model_stays_in_evaluation_mode(tmp_path):
    model, (x, y) = toy_convnet(), toy_images(200)
    result = quiet(model).fit((x, y))
    assert not any(m.training for m in model.modules())
    assert "in evaluation mode" in str(result)
    before = bits(model)
    losses = [F.cross_entropy(model(x), y).item() for _ in range(2)]
    assert losses == pytest.approx([result.final["train_loss"]] * 2, rel=1e-6)
    assert same_bits(bits(model), before)
    cut = quiet(toy_convnet(), tmp_path, callbacks=[End(2, by=signal.SIGTERM)]).fit((x, y))
    assert cut.status == "interrupted" and not cut.model.training
    for settings in ({"second_phase": "none"}, {"batch_norm": "batch"}):
        result = quiet(toy_convnet(), **settings).fit((x, y))
        assert result.model.training and "in evaluation mode" not in str(result)
    cut = quiet(toy_convnet(), callbacks=[End(0, by=signal.SIGTERM)]).fit((x, y))
    assert cut.status == "interrupted" and cut.model.training  # before tau


def test_a_default_device_changes_nothing():
    """ "meta" stands in for an accelerator: what lands there by chance has no data."""
    x, y = toy_data(40)

    def squares(q, y):
        return (q - y).square().sum(1).mean()

    def everything():
        model = toy_mlp()
        with torch.device("cpu"):
            model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), *toy_mlp(width=60))
            for p in model.parameters():
                nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
        found = [
            [*tp.EpochSampler(5)],
            *(
                tp.verify_expressivity(model, x, w=w, method=method).status
                for w, method in (
                    ("current", "svd"),
                    ("current", "certificate"),
                    ("current", "separation"),
                    ("witness", "certificate"),
                    ("init", "auto"),
                )
            ),
            tp.check_assumptions(model, x).hold,
            tp.rank_logdet(x).numerical_rank,
            tp.loss_floor(x[[0, 0, 1]], y[:3]).upper,
            tp.loss_floor(x[[0, 0, 1]], x[:3], tp.ConvexLoss(squares, 2.0)).upper,
            tp.global_minimum(model, x, y).loss,
            tp.ntk_rank(model, x[:6]).rank,
        ]
        for phase in ("base", "gd", "sgd"):
            result = quiet(model, second_phase=phase, verify="auto").fit((x, y), (x, y))
            found += [result.final, getattr(result.guarantee, "curve", None)]
        frozen = tp.freeze(model, train=(x, y))
        found.append(tp.fit_last_layer(model, tp.FeatureCache(model, (x, y)), epochs=2))
        frozen.unfreeze()
        data = [(x[i], y[i]) for i in range(40)]
        found.append(quiet(model).fit(torch.utils.data.Subset(data, range(40))).final)
        return found, bits(model)

    expected = everything()
    with torch.device("meta"):
        found = everything()
    assert found[0] == expected[0] and same_bits(found[1], expected[1])
