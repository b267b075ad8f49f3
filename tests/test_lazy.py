"""The lazy second phase: its steps, its certificates along the way, its refusals and stops."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from interrupts import End
from twophase_ext.model.losses import CROSS_ENTROPY, SQUARED_ERROR
from twophase_ext.model.network import Network
from twophase_ext.training.config import Lazy
from twophase_ext.training.phases import lazy as module

N = 24


pytestmark = pytest.mark.usefixtures("one_thread")


def lazily(model, folder=False, **settings) -> tp.Trainer:
    settings = {"second_phase": "lazy", "verify": "auto", "epochs": 8, "tau": 2, **settings}
    return quiet(model, folder, precision="float64", **settings)


def small(**settings) -> nn.Module:
    return toy_mlp(width=30, **settings)


def targets(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = toy_data(n)
    return x.double(), nn.functional.one_hot(y, 3).double()


def second(result) -> list[dict]:
    return [row for row in result.history if row["phase"] == 2]


def premises(result) -> dict[str, str]:
    return {name: status for name, status, _ in result.guarantee.premises}


def matrix(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        h = model[:-1](x)
    return torch.cat([h, h.new_ones(len(h), 1)], 1)


def only_last(model: nn.Module) -> nn.Module:
    """Hidden layers that do not move: the objective is a convex quadratic with a known L."""
    for p in model[:-1].parameters():
        p.requires_grad_(False)
    return model


def test_steps_are_gradient_descent_with_two_eta_over_l():
    x, y = targets()
    model = small(dtype=torch.float64)

    class Keep:
        def on_perturb(self, run):
            self.at_tau = bits(run.network.model)

    keep = Keep()
    settings = {"lazy": {"smoothness": 500.0, "eta_bar": 0.3}, "callbacks": [keep]}
    result = lazily(model, loss="squared_error", **settings).fit((x, y))
    twin = small(dtype=torch.float64)
    twin.load_state_dict(keep.at_tau)
    losses = []
    for _ in range(6):
        loss = (twin(x) - y).square().sum(1).mean()
        losses.append(loss.item())
        for p, g in zip(
            twin.parameters(), torch.autograd.grad(loss, twin.parameters()), strict=True
        ):
            p.data -= 2 * 0.3 / 500 * g
    rows = second(result)
    assert [row["train_loss"] for row in rows] == pytest.approx(losses, rel=1e-12)
    for name, value in bits(twin).items():
        assert torch.allclose(bits(model)[name], value, rtol=1e-10, atol=1e-12)
    assert all(row["learning_rate"] == 2 * 0.3 / 500 for row in rows)
    assert result.hidden_hash is None  # they moved
    assert losses == sorted(losses, reverse=True)


def test_known_l_monotone_and_within_theorem_3():
    x, y = targets()
    model = only_last(small(dtype=torch.float64))
    rows = matrix(model, x)
    known = 2 / N * float(torch.linalg.matrix_norm(rows, 2) ** 2)
    fit = lazily(model, loss="squared_error", epochs=14, lazy={"smoothness": known})
    result = fit.fit((x, y))
    found = second(result)
    losses = [row["train_loss"] for row in found]
    step = 1 / known
    for now, after in pairwise(found):
        decrease = step * (1 - 0.5) * now["gradient_norm"] ** 2
        assert after["train_loss"] <= now["train_loss"] - decrease + 1e-12
    checks = result.guarantee.checks
    assert [check["steps"] for check in checks] == list(range(13))
    assert all(row["rank"] == N and row["sigma_min"] > 0 for row in found)
    at_tau = checks[0]["lemma7"]
    radius = max(check["lemma7"]["distance"] for check in checks)
    bound = radius * (known * at_tau["loss"] / (2 * 0.25 * 13)) ** 0.5
    assert result.guarantee.bound == pytest.approx(bound, rel=1e-12)
    assert min(losses) <= bound
    assert premises(result) == {
        "Assumption 1, at w^tau": "numerical",
        "Assumption 2": "held",
        "L-smooth objective": "not checked",
        "0 < eta_bar < 1": "held",
        "fixed features": "held",
        "rank preserved": "numerical",
    }
    for check, row in zip(checks, found, strict=False):
        assert check["lemma7"]["loss"] == pytest.approx(row["train_loss"], rel=1e-10)
        assert check["lemma7"]["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=1e-8)
        assert check["lemma7"]["comparator_loss"] < 1e-12 * at_tau["loss"]
        assert check["lemma7"]["bound"] >= check["lemma7"]["loss"]
    assert "for the L given, ranks numerical" in str(result.guarantee) and "Lemma 7" in str(
        result.guarantee
    )


def test_an_l_that_is_too_small_is_contradicted():
    x, y = targets()
    model = only_last(small(dtype=torch.float64))
    known = 2 / N * float(torch.linalg.matrix_norm(matrix(model, x), 2) ** 2)
    settings = {"smoothness": known / 30, "eta_bar": 0.4}
    result = lazily(model, loss="squared_error", lazy=settings).fit((x, y))
    assert premises(result)["L-smooth objective"] == "failed"
    assert result.guarantee.bound is None and "no rate is claimed" in str(result.guarantee)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("bias", [True, False])
def test_lemma_7_holds_at_any_weights(loss, bias):
    x, y = toy_data(N)
    x = x.double()
    for seed in range(4):
        model = small(seed=seed, dtype=torch.float64)
        model[4].bias.requires_grad_(bias)  # frozen, it is a constant of the outputs
        aim = y if loss == "cross_entropy" else nn.functional.one_hot(y, 3).double()
        chosen = CROSS_ENTROPY if loss == "cross_entropy" else SQUARED_ERROR
        network = Network(model, x[:2])
        found = module.lemma7(network, [(x[:9], aim[:9]), (x[9:], aim[9:])], chosen)
        value = chosen(model(x), aim)
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = torch.cat([g.flatten() for g in torch.autograd.grad(value, trained)]).norm()
        assert found["loss"] == pytest.approx(value.item(), rel=1e-12)
        assert found["gradient_norm"] == pytest.approx(float(norm), rel=1e-10)
        assert found["bound"] == found["comparator_loss"] + found["distance"] * float(
            found["gradient_norm"]
        )
        assert found["loss"] <= found["bound"]
        if loss == "squared_error":  # an interpolator; cross-entropy's trades off the distance
            assert found["comparator_loss"] < 1e-12
            rows = matrix(model, x)[:, : 30 + bias]
            nearest = torch.linalg.pinv(rows) @ (aim - model(x).detach())
            assert found["distance"] == pytest.approx(nearest.norm().item(), rel=1e-6)
    assert module.lemma7(network, [(x, aim)], tp.ConvexLoss(lambda q, y: q.sum(), 1.0)) is None


def test_cross_entropy_checks_at_a_cadence():
    x, y = toy_data(N)
    model = small()
    lr = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-3)}
    result = lazily(model, epochs=9, lazy={"verify_every": 3}, **lr).fit((x, y))
    rows = second(result)
    assert [row["rank"] for row in rows] == [None, None, N, None, None, N, N]
    assert [check["steps"] for check in result.guarantee.checks] == [0, 3, 6, 7]
    assert all(row["learning_rate"] == 0.02 for row in rows)
    found = premises(result)
    assert found["L-smooth objective"] == found["rank preserved"] == "not checked"
    assert result.guarantee.bound is None
    assert result.final["train_loss"] <= rows[0]["train_loss"]
    assert 0 <= rows[0]["train_accuracy"] <= 1


def test_batch_norm_statistics_are_constants():
    model = toy_convnet()
    data = toy_images(N)

    class Watch:
        def on_perturb(self, run):
            self.then = {n: b.clone() for n, b in run.network.model.named_buffers()}

    watch = Watch()
    result = lazily(model, callbacks=[watch], lazy={"verify_every": 9}).fit(data)
    assert result.status == "completed"
    assert all(torch.equal(b, watch.then[n]) for n, b in model.named_buffers())
    with pytest.raises(RuntimeError, match="changed during the second phase"):

        class Meddle:
            def on_epoch_end(self, run, record):
                if record["phase"] == 2:
                    run.network.model.bn.running_mean += 1e-3

        lazily(toy_convnet(), callbacks=[Meddle()]).fit(data)


def test_stopped_at_tau(tmp_path):
    x, y = toy_data(N)
    width = 9
    with pytest.warns(UserWarning, match="m_H >= N - 1 fails"):
        result = lazily(toy_mlp(width=width), tmp_path / "run").fit((x, y))
    assert result.status == "stopped" and len(result.history) == 2
    assert result.verdict.status == "deficient" and result.final == {}
    assert "rank N not shown at w^tau" in result.guarantee.stopped
    assert premises(result)["rank preserved"] == "failed" and result.guarantee.bound is None
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["guarantee"]["stopped"] == result.guarantee.stopped
    trainer = lazily(toy_mlp(width=width, seed=5), tmp_path / "run")
    with pytest.warns(UserWarning):
        again = trainer.fit((x, y), resume=True)
    assert again.status == "stopped" and len(again.history) == 2


def collapse_above(limit: float, monkeypatch) -> list[float]:  # steps that lose the rank
    own, seen = module.LazyPhase.verify, []

    def verify(self, method=None):
        verdict = own(self, method)
        if self.step is not None:
            seen.append(self.step)
            if self.step > limit:
                verdict.status, verdict.rank, verdict.reason = "undecided", N - 1, "forced"
        return verdict

    monkeypatch.setattr(module.LazyPhase, "verify", verify)
    return seen


def test_the_step_is_halved_from_the_same_weights(monkeypatch):
    data, tried = toy_data(N), collapse_above(0.003, monkeypatch)
    settings = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.01)}
    model, twin = small(), small()
    result = lazily(model, **settings).fit(data)
    assert tried[:3] == [0.01, 0.005, 0.0025] and set(tried[3:]) == {0.0025}
    rates = [row["learning_rate"] for row in second(result)]
    assert rates == [0.0025] * 6 and result.status == "completed"
    monkeypatch.undo()

    class Lower:
        def on_perturb(self, run):
            run.optimizer.param_groups[0]["lr"] = 0.0025

    lazily(twin, callbacks=[Lower()], **settings).fit(data)
    assert same_bits(bits(model), bits(twin))


def test_stopped_where_no_step_keeps_the_rank(monkeypatch, tmp_path):
    data = toy_data(N)
    tried = collapse_above(0.0, monkeypatch)
    model = small()
    states = []

    class Keep:
        def on_perturb(self, run):
            states.append(bits(run.network.model))

    result = lazily(model, tmp_path / "run", callbacks=[Keep()]).fit(data)
    assert result.status == "stopped" and len(result.history) == 2
    assert len(tried) == module.HALVINGS + 1
    assert "after step 1, nor after 8 halvings: forced" in result.guarantee.stopped
    assert same_bits(bits(model), states[0])  # the weights before the step
    assert [check["status"] for check in result.guarantee.checks] == ["full rank", "undecided"]
    monkeypatch.undo()
    on = lazily(small(seed=4), tmp_path / "run").fit(data, resume=True)
    assert on.status == "completed" and len(on.history) == 8


def test_a_real_loss_of_rank_stops_the_run():
    """One wild step, and from the next on no halving brings the rank back."""
    x, y = targets()
    settings = {"smoothness": 1e-3, "eta_bar": 0.9}
    result = lazily(small(dtype=torch.float64), loss="squared_error", lazy=settings).fit((x, y))
    assert result.status == "stopped" and len(second(result)) == 1
    assert "after step 2, nor after 8 halvings: numerically low" in result.guarantee.stopped
    assert second(result)[0]["rank"] == N
    assert premises(result)["L-smooth objective"] == "failed"  # the loss rose in the only step
    assert premises(result)["rank preserved"] == "failed" and result.guarantee.bound is None


def test_a_proof_of_existence_is_not_enough():
    verdict = tp.Verdict(status="proved", claim="exists", method="separation", n=N, width=30)
    assert not module.rank_shown(verdict)  # of other weights
    assert module.rank_shown(
        tp.Verdict(status="proved", claim="at w", method="certificate", n=N, width=30)
    )
    assert not module.rank_shown(
        tp.Verdict(status="undecided", claim="at w", method="svd", n=N, width=30)
    )


@pytest.mark.parametrize(("epoch", "inside"), [(1, False), (2, True), (4, False), (4, True)])
def test_resumed_runs_end_with_the_same_bits(tmp_path, monkeypatch, epoch, inside):
    data = toy_images(N)
    collapse_above(0.002, monkeypatch)
    settings = {
        "epochs": 6,
        "lazy": {"verify_every": 2},
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9),
    }
    whole = toy_convnet()
    reference = lazily(whole, **settings).fit(data)
    folder = tmp_path / "cut"
    stop = End(epoch, 0 if inside else None)
    first = lazily(toy_convnet(), folder, callbacks=[stop], **settings).fit(data)
    assert first.status == "interrupted" and len(first.history) == epoch + (not inside)
    model = toy_convnet(seed=9)
    on = lazily(model, folder, **settings).fit(data, resume=True)
    assert on.status == "completed" and same_bits(bits(whole), bits(model))
    for row in [*on.history, *reference.history]:
        row.pop("seconds")
    assert on.history == reference.history
    assert on.guarantee.as_dict() == reference.guarantee.as_dict()


def test_other_settings_do_not_continue_a_run(tmp_path):
    data = toy_data(N)
    lazily(small(), tmp_path / "run", lazy={"verify_every": 2}, epochs=4).fit(data)
    with pytest.raises(ValueError, match="made with lazy="):
        lazily(small(), tmp_path / "run", lazy={"verify_every": 3}, epochs=4).fit(data, resume=True)


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, "verify: second_phase='lazy' needs", {"verify": False}),
        (ValueError, "batch_norm: second_phase='lazy'", {"batch_norm": "batch"}),
        (ValueError, "feature_cache: 'hidden' needs fixed", {"feature_cache": "hidden"}),
        (ValueError, r"lazy: expected eta_bar in \(0, 1\), got 1", {"lazy": {"eta_bar": 1.0}}),
        (ValueError, r"lazy: expected smoothness in \(0, inf\)", {"lazy": {"smoothness": 0}}),
        (TypeError, "lazy: expected a number for smoothness", {"lazy": {"smoothness": "big"}}),
        (ValueError, "verify_every: expected at least 1", {"lazy": {"verify_every": 0}}),
        (TypeError, "verify_every: expected an integer", {"lazy": {"verify_every": 0.5}}),
        (ValueError, "lazy: expected settings among .*'L'", {"lazy": {"L": 3.0}}),
        (TypeError, "lazy: expected a dict", {"lazy": 3.0}),
        (ValueError, "lazy: expected None with second_phase='base'", {"second_phase": "base"}),
    ],
)
def test_wrong_settings(error, message, settings):
    with pytest.raises(error, match=message):
        lazily(small(), **{"lazy": Lazy(), **settings})


def test_refused_at_fit_before_anything_changes():
    model = small()
    before = bits(model)

    def groups(parameters):
        half = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.1}]
        return torch.optim.SGD(half, lr=0.01)

    with pytest.raises(ValueError, match=r"learning rates \[0.01, 0.1\].*smoothness"):
        lazily(model, optimizer=groups).fit(toy_data(N))
    assert same_bits(before, bits(model))

    class Random(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            return torch.randn(5), i % 3

    with pytest.raises(ValueError, match="train: second_phase='lazy' needs the gradient of one"):
        lazily(model).fit(Random())
    assert same_bits(before, bits(model))
