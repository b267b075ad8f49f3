"""Models, optimizers and callbacks that a researcher brings."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from helpers import Given, bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from interrupts import End


@pytest.mark.parametrize("n", [1, 2, 9])
def test_few_samples_and_a_large_batch(n):
    x, y = toy_data(n)
    result = quiet(toy_mlp(), batch_size=64, verify="svd", tau=0.999).fit((x, y))
    assert result.status == "completed" and result.verdict.rank == n
    assert [r["phase"] for r in result.history] == [1, 1, 1, 2]


@pytest.mark.filterwarnings("ignore:the last hidden layer has")
def test_no_hidden_layer_at_all():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 3))
    result = quiet(model, verify="auto").fit(toy_data())
    assert result.status == "completed" and result.verdict.status == "deficient"


def test_modes_of_submodules_come_back():
    model = toy_convnet()
    model.bn.eval()
    modes = [m.training for m in model.modules()]
    quiet(model, second_phase="none").fit(toy_images())
    assert [m.training for m in model.modules()] == modes
    quiet(model, batch_norm="batch").fit(toy_images())
    assert [m.training for m in model.modules()] == modes
    quiet(model).fit(toy_images())  # frozen statistics: see Trainer.fit
    assert not any(m.training for m in model.modules())


NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old_weight_norm": nn.utils.weight_norm,
}


@pytest.mark.parametrize("wrap", NORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_normed_hidden_layers(wrap, tmp_path):
    def build(seed=0):
        model = toy_mlp(seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model[0] = NORMS[wrap](model[0])
        return model

    whole = build()
    result = quiet(whole, tmp_path / "whole", verify="auto", epochs=6).fit(toy_data())
    assert result.status == "completed" and result.verdict.status == "proved"
    quiet(build(), tmp_path / "cut", verify="auto", epochs=6, callbacks=[End(3)]).fit(toy_data())
    again = build(seed=5)
    quiet(again, tmp_path / "cut", verify="auto", epochs=6).fit(toy_data(), resume=True)
    assert same_bits(bits(whole), bits(again))


def test_last_weight_of_odd_strides():
    states = []
    for transposed in (False, True):
        model = toy_mlp(dtype=torch.float64)
        if transposed:
            weight = model[4].weight.detach()
            model[4].weight = nn.Parameter(weight.t().contiguous().t())
        quiet(model, precision="float64").fit(toy_data())
        states.append(bits(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("where", ["optimizer", "parameter"])
def test_gradient_hooks_hold_in_both_phases(where):
    """Gradients set to zero by a hook: the last layer must stay where it was at tau."""
    x, y = toy_data()
    model, at_tau = toy_mlp(), {}

    class Keep:
        def on_perturb(self, run):
            at_tau.update(bits(model))

    def factory(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1)

        def clear(*_):
            for p in parameters:
                p.grad = None if p.grad is None else torch.zeros_like(p.grad)

        if where == "optimizer":
            optimizer.register_step_pre_hook(clear)
        return optimizer

    if where == "parameter":
        for p in model.parameters():
            p.register_hook(torch.zeros_like)
    quiet(model, optimizer=factory, callbacks=[Keep()]).fit((x, y))
    assert torch.equal(at_tau["4.weight"], model[4].weight)


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_head_group_with_its_own_rate(flags):
    model = toy_mlp()

    def factory(_):
        groups = [{"params": model[:4].parameters()}, {"params": model[4].parameters(), "lr": 0.2}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.5, **flags)

    result = quiet(model, optimizer=factory).fit(toy_data())
    assert [r["learning_rate"] for r in result.history] == [0.05, 0.05, 0.2, 0.2]
    json.dumps(result.history, allow_nan=False)


@pytest.mark.parametrize("tau", [1, 3])
def test_weights_that_overflow_at_the_last_step_are_divergence(tmp_path, tau):
    """One batch an epoch: the loss before the update is finite, the weights after it are not."""
    model = toy_mlp()

    class Explode:
        def on_epoch_end(self, run, record):
            if record["epoch"] == 1:
                run.optimizer.param_groups[0]["lr"] = 1e38

    result = quiet(
        model,
        tmp_path,
        loss="squared_error",
        optimizer=lambda ps: torch.optim.SGD(ps, lr=1e-9),
        batch_size=60,
        epochs=4,
        tau=tau,
        callbacks=[Explode()],
    ).fit((toy_data()[0], 1e3 * torch.ones(60, 3)))
    assert result.status == "diverged" and len(result.history) == 3
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 2 and all(torch.isfinite(t).all() for t in kept["model"].values())


def test_config_tells_the_optimizer(tmp_path):
    quiet(toy_mlp(), tmp_path / "läufe ∂").fit(toy_data())
    config = json.loads((tmp_path / "läufe ∂" / "config.json").read_text())
    assert config["optimizer"]["class"].endswith("SGD")
    assert config["optimizer"]["groups"][0]["momentum"] == 0.9
    assert config["last_layer"] == "4" and config["n"] == 60


def test_frozen_hidden_parameters_stay_and_bias_free_heads_train():
    model = toy_mlp()
    model[4] = nn.Linear(80, 3, bias=False)
    model[0].weight.requires_grad_(False)
    before = bits(model)
    quiet(model).fit(toy_data())
    assert torch.equal(before["0.weight"], model[0].weight)
    assert not torch.equal(before["4.weight"], model[4].weight)
    assert not torch.equal(before["0.bias"], model[0].bias)


class Flip(torch.utils.data.Dataset):
    """A transform that changes a sample half of the time."""

    def __init__(self, x, y) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i):
        return (self.x[i].flip(0) if torch.rand(()) < 0.5 else self.x[i]), self.y[i]


def test_rare_random_transforms_are_seen_and_have_their_own_stream():
    data = Flip(*toy_data(32))
    state = torch.get_rng_state()
    models = []
    for dropout in (0.0, 0.5):
        seen = []

        def look(m, x, seen=seen):
            if m.training:
                seen.append(x.clone())
            return m.body(m.drop(x))

        model = Given(look, drop=nn.Dropout(dropout), body=toy_mlp())
        for _ in range(3):
            result = quiet(model, epochs=2).fit(data)
            assert result.feature_cache == "none"
        models.append(seen[:4])
    assert all(torch.equal(a, b) for a, b in zip(*models, strict=True))
    assert torch.equal(state, torch.get_rng_state())
