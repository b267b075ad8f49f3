"""tp.Trainer: Algorithm 1 end to end on small problems."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from twophase_ext.core.seeds import epoch_order

pytestmark = pytest.mark.filterwarnings("error")


def hidden_bits(model: nn.Module, last: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in bits(model).items() if not k.startswith(last + ".")}


class Recorder:
    """Keeps the model's state at the perturbation and after every epoch."""

    def __init__(self) -> None:
        self.states, self.phases, self.at_tau = [], [], None

    def on_perturb(self, run) -> None:
        self.at_tau = bits(run.network.model)

    def on_epoch_end(self, run, record) -> None:
        self.states.append(bits(run.network.model))
        self.phases.append(record["phase"])


@pytest.mark.parametrize("cache", ["hidden", "backbone", "none"])
def test_second_phase_moves_only_the_last_layer(cache):
    x, y = toy_data()
    model, recorder = toy_mlp(), Recorder()
    result = quiet(model, feature_cache=cache, callbacks=[recorder]).fit((x, y))
    assert result.status == "completed" and recorder.phases == [1, 1, 2, 2]
    before = {k: v for k, v in recorder.at_tau.items() if not k.startswith("4.")}
    assert same_bits(before, hidden_bits(model, "4"))
    assert not torch.equal(recorder.at_tau["4.weight"], model[4].weight)
    assert not torch.equal(recorder.states[1]["0.weight"], recorder.at_tau["0.weight"])
    assert torch.equal(recorder.states[1]["4.weight"], recorder.at_tau["4.weight"])


def test_frozen_batch_norm_and_dropout_give_fixed_features():
    x, y = toy_images(40)
    model, recorder = toy_convnet(), Recorder()
    result = quiet(model, callbacks=[recorder]).fit((x, y))
    hidden = {k: v for k, v in recorder.at_tau.items() if not k.startswith("head.out.")}
    assert same_bits(hidden, hidden_bits(model, "head.out"))
    assert not torch.equal(
        recorder.states[1]["bn.running_mean"], recorder.at_tau["bn.running_mean"]
    )
    # the statistics are update_bn's over the clean set in index order
    other = toy_convnet(dropout=0.0)
    other.load_state_dict(recorder.at_tau)
    torch.optim.swa_utils.update_bn(x.split(256), other)
    torch.testing.assert_close(other.bn.running_mean, model.bn.running_mean, rtol=0, atol=0)
    assert result.hidden_hash


def test_batch_statistics_are_possible_and_cache_nothing():
    x, y = toy_images(33)
    model, recorder = toy_convnet(), Recorder()
    result = quiet(model, batch_norm="batch", callbacks=[recorder]).fit((x, y))
    assert result.feature_cache == "none"
    assert torch.equal(recorder.at_tau["conv.weight"], model.conv.weight)
    assert not torch.equal(recorder.at_tau["bn.running_mean"], model.bn.running_mean)


@pytest.mark.parametrize("cache", ["hidden", "backbone", "none"])
def test_cache_modes_train_the_same_network(cache):
    x, y = toy_images(33)
    states = []
    for mode in ("hidden", cache):
        model = toy_convnet(dropout=0.0)
        quiet(model, feature_cache=mode, precision="float64").fit((x, y))
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-11, atol=1e-12)


def test_history_csv_and_folder(tmp_path):
    x, y = toy_data()
    result = quiet(toy_mlp(), tmp_path / "run", verify="svd").fit((x, y), (x[:20], y[:20]))
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert (
        [int(row["epoch"]) for row in rows] == [0, 1, 2, 3] == [r["epoch"] for r in result.history]
    )
    for row, record in zip(rows, result.history, strict=True):
        assert float(row["train_loss"]) == record["train_loss"]
        assert 0 <= float(row["val_accuracy"]) <= 1
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "environment.json", "verdict.json", "checkpoint.pt"} <= names
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["tau_epoch"] == 2 and config["noise_std"] == 1e-3
    assert tp.Verdict.load(tmp_path / "run" / "verdict.json") == result.verdict
    assert result.verdict.status == "full rank"
    assert "phase 2" in str(result)
    assert not list((tmp_path / "run").glob("*.part"))


def test_metrics_are_those_of_the_model():
    x, y = toy_data()
    model = toy_mlp()
    result = quiet(model).fit((x, y), (x[:20], y[:20]))
    with torch.no_grad():
        out = model(x)
        loss = nn.functional.cross_entropy(out, y)
    assert math.isclose(result.final["train_loss"], loss, rel_tol=1e-5)
    assert result.final["train_accuracy"] == float((out.argmax(1) == y).double().mean())
    assert math.isclose(result.history[-1]["val_loss"], result.final["val_loss"], rel_tol=1e-12)


def test_noise_has_its_own_stream_and_does_not_shift_the_shuffle():
    x, y = toy_data()
    recorders = []
    for std in (1e-3, 2e-3):
        recorder = Recorder()
        quiet(toy_mlp(), noise_std=std, callbacks=[recorder]).fit((x, y))
        recorders.append(recorder)
    assert same_bits(recorders[0].states[1], recorders[1].states[1])
    base = recorders[0].states[1]["0.weight"].double()
    noise = [r.at_tau["0.weight"].double() - base for r in recorders]
    torch.testing.assert_close(noise[1], 2 * noise[0], rtol=1e-3, atol=1e-6)


def test_noise_std_per_parameter():
    x, y = toy_data()
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    recorder = Recorder()
    stds = {name: 10.0 ** -(k + 1) for k, name in enumerate(names)}
    quiet(toy_mlp(), noise_std=stds, callbacks=[recorder]).fit((x, y))
    for name in names:
        moved = recorder.at_tau[name] - recorder.states[1][name]
        assert 0.2 * stds[name] < float(moved.std()) < 2 * stds[name]
    with pytest.raises(ValueError, match=r"missing \['2.bias'\]"):
        quiet(toy_mlp(), noise_std={k: 1e-3 for k in names[:3]}).fit((x, y))


def test_order_of_an_epoch_comes_from_seed_and_epoch_alone():
    assert torch.equal(epoch_order(1, 5, 100), epoch_order(1, 5, 100))
    assert not torch.equal(epoch_order(1, 5, 100), epoch_order(1, 6, 100))
    assert not torch.equal(epoch_order(1, 5, 100), epoch_order(2, 5, 100))
    assert tp.stream_seed(1, "noise") != tp.stream_seed(1, "shuffle")


def test_the_callers_random_state_is_untouched():
    x, y = toy_images(33)
    model = toy_convnet()
    state = torch.get_rng_state()
    quiet(model).fit((x, y))
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training  # the statistics of the second phase stay


def test_any_optimizer_plain_loop(monkeypatch):
    x, y = toy_data()
    model, recorder = toy_mlp(), Recorder()
    result = quiet(
        model, optimizer=lambda ps: torch.optim.Adam(ps, lr=1e-2), callbacks=[recorder]
    ).fit((x, y))
    assert result.status == "completed"
    assert torch.equal(recorder.at_tau["2.weight"], model[2].weight)
    assert not torch.equal(recorder.at_tau["4.weight"], model[4].weight)
    # weight decay and momentum of the base algorithm must not move what is frozen
    model, recorder = toy_mlp(), Recorder()
    decay = lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.5)  # noqa: E731
    quiet(model, optimizer=decay, callbacks=[recorder]).fit((x, y))
    assert torch.equal(recorder.at_tau["2.weight"], model[2].weight)


def test_torch_sgd_and_ours_agree():
    x, y = toy_data()
    models = [toy_mlp(dtype=torch.float64) for _ in range(2)]
    for model, cls in zip(models, (torch.optim.SGD, tp.optim.SGD), strict=True):
        settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
        quiet(model, optimizer=lambda ps, c=cls, s=settings: c(ps, **s), precision="float64").fit(
            (x, y)
        )
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_squared_error_and_custom_loss_agree():
    x, _ = toy_data()
    y = x[:, :2].double()
    models = [toy_mlp(classes=2, dtype=torch.float64) for _ in range(2)]
    custom = tp.ConvexLoss(lambda q, t: (q - t).square().sum(1).mean(), smoothness=2.0)
    results = [
        quiet(model, loss=loss, precision="float64").fit((x, y))
        for model, loss in zip(models, ("squared_error", custom), strict=True)
    ]
    assert results[0].final["train_accuracy"] is None
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_inputs_of_every_kind_train_the_same_network():
    x, y = toy_data(32)
    sources = [
        (x, y),
        (x.numpy(), y.numpy()),
        TensorDataset(x, y),
        DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True),
    ]
    states = []
    for source in sources:
        model = toy_mlp()
        quiet(model).fit(source)
        states.append(bits(model))
    assert all(same_bits(states[0], state) for state in states[1:])


def test_uint8_images_are_scaled():
    x, y = toy_images(33)
    x = (x * 255).round().to(torch.uint8)
    models = [toy_convnet(), toy_convnet()]
    quiet(models[0]).fit((x, y))
    quiet(models[1]).fit((x.float() / 255, y))
    assert same_bits(bits(models[0]), bits(models[1]))


def test_random_transforms_are_not_cached():
    class Noisy(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + 0.01 * torch.randn(x.shape), y

    x, y = toy_data(32)
    result = quiet(toy_mlp()).fit(Noisy(x, y))
    assert result.feature_cache == "none"
    with pytest.raises(ValueError, match="feature_cache: 'hidden' needs fixed features"):
        quiet(toy_mlp(), feature_cache="hidden").fit(Noisy(x, y))


def test_model_without_a_wide_layer_is_warned_about():
    x, y = toy_data()
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    with pytest.warns(UserWarning, match="m_H >= N - 1 fails"):
        result = quiet(model, verify="auto").fit((x, y))
    assert result.verdict.status == "deficient" and result.verdict.claim == "exists"
    with (
        pytest.warns(UserWarning, match="m_H >= N - 1 fails"),
        pytest.raises(ValueError, match="needs a last hidden layer"),
    ):
        quiet(toy_linear_head(), feature_cache="backbone").fit((x, y))


def toy_linear_head() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def test_divergence_is_reported_and_the_last_checkpoint_kept(tmp_path):
    x, _ = toy_data()
    target = x[:, :2] * 1e3

    class Explode:
        def on_epoch_end(self, run, record):
            if record["epoch"] == 1:
                for group in run.optimizer.param_groups:
                    group["lr"] = 1e30

    model = toy_mlp(classes=2)
    result = quiet(
        model,
        tmp_path / "run",
        loss="squared_error",
        optimizer=lambda ps: torch.optim.SGD(ps, lr=1e-7),
        epochs=8,
        tau=6,
        callbacks=[Explode()],
    ).fit((x, target))
    assert result.status == "diverged" and result.final == {}
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 2 and all(torch.isfinite(t).all() for t in kept["model"].values())


def test_a_callback_that_moves_hidden_layers_is_caught():
    class Meddler:
        def on_epoch_end(self, run, record):
            if record["phase"] == 2:
                with torch.no_grad():
                    run.network.model[0].bias.add_(1e-3)

    x, y = toy_data()
    with pytest.raises(RuntimeError, match="hidden layers changed"):
        quiet(toy_mlp(), callbacks=[Meddler()]).fit((x, y))


def test_numpy_float64_and_lists():
    x, y = toy_data(32)
    model = toy_mlp()
    quiet(model).fit((x.double().numpy(), np.asarray(y, dtype=np.int32)))
    other = toy_mlp()
    quiet(other).fit((x.tolist(), y.tolist()))
    assert same_bits(bits(model), bits(other))


def test_a_machine_without_git_still_gets_its_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    quiet(toy_mlp(), tmp_path / "run").fit(toy_data())
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["commit"] is None and environment["seed"] == 1
