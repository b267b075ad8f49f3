"""Every example runs with a small setting, and what it shows is so."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

import twophase_ext as tp

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)


def statuses(result: tp.Result) -> dict[str, str]:
    return {name: status for name, status, _ in result.guarantee.premises}


def test_own_model():
    result, verdict = example("own_model")["main"](n=300, epochs=20)
    model = result.model
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert model.classifier.wide.out_features == 330
    assert result.final["val_accuracy"] > 0.8
    assert (result.verdict.status, result.verdict.claim) == ("proved", "at w")
    # LAPACK's singular values at the witness are the judge of the certificate.
    assert (verdict.status, verdict.factorization) == ("proved", "triangular")
    model.load_state_dict(verdict.witness, strict=False)
    model.double().eval()
    x = torch.tensor(load_digits(return_X_y=True)[0][:300] / 16, dtype=torch.float32)
    with torch.no_grad():
        z = model.features(x.double().view(-1, 1, 8, 8))
        h = model.classifier.activation(model.classifier.wide(z))
    sigma = torch.linalg.svdvals(torch.cat([h, h.new_ones(300, 1)], 1))[-1]
    assert 0.1 < verdict.sigma_min_lower <= sigma * (1 + 1e-9)


def test_own_optimizer():
    results = example("own_optimizer")["main"](n=200, epochs=8, steps=200)
    adam, theorem = results["adam"], results["theorem"]
    assert adam.hidden_hash == theorem.hidden_hash
    assert statuses(adam)["no momentum, no weight decay"] == "failed"
    assert adam.guarantee.curve == []
    assert set(statuses(theorem).values()) == {"held"}
    points = [point for point in theorem.guarantee.curve if point["steps"]]
    assert points
    assert all(point["loss"] < point["bound"] for point in points)
    assert theorem.final["train_loss"] < 0.7 * theorem.guarantee.curve[0]["loss"]
    assert theorem.final["train_accuracy"] > 0.9


def test_regression(capsys):
    result = example("regression")["main"](epochs=8, steps=300)
    assert set(statuses(result).values()) == {"held"}
    curve = result.guarantee.curve
    losses = [point["loss"] for point in curve]
    assert curve[-1]["steps"] == 4 * 300
    assert losses == sorted(losses, reverse=True)
    assert all(point["loss"] < point["bound"] for point in curve[1:])
    assert curve[-1]["bound"] < curve[0]["loss"] < 0.8  # it says more than "no rise"
    features, y = (torch.tensor(part) for part in load_diabetes(return_X_y=True))
    x, y = (features - features.mean(0)) / features.std(0), (y - y.mean()) / y.std()
    with torch.no_grad():
        measured = (result.model(x)[:, 0] - y).square().mean()
    assert abs(measured - losses[-1]) < 1e-9
    assert f"{losses[-1]:>9.5f}  {curve[-1]['bound']:>10.5f}" in capsys.readouterr().out


def trained(model: nn.Module, data) -> tp.Result:
    """The Trainer's run with the settings of the two examples below."""
    return tp.Trainer(
        model,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-5),
        epochs=30,
        tau=20,
        verify=False,
        run_dir=False,
        progress=False,
    ).fit(data)


def test_own_loop_has_the_trainers_bits(capsys):
    names = example("own_loop")
    model, frozen = names["main"](n=200, epochs=30, tau=20)
    assert "proved at these weights" in capsys.readouterr().out
    x, y = names["digits"](200)
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9
    torch.manual_seed(1)
    twin = names["network"](200)
    assert trained(twin, (x, y)).hidden_hash == frozen
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in twin.state_dict().items())


def test_own_loop_is_twenty_lines():
    lines = (EXAMPLES / "own_loop.py").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def main"))
    body = [
        line for line in lines[start + 2 : lines.index("    return model, frozen.hash")] if line
    ]
    assert 10 < len(body) <= 20 and all(line.startswith("    ") for line in body)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers
def test_lightning_callback():
    pytest.importorskip("lightning")
    names = example("lightning_callback")
    module, callback = names["main"](n=200, epochs=30, tau=20, cache=True)
    assert (callback.verdict.status, callback.verdict.claim) == ("proved", "at w")
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels[:200] / 16, dtype=torch.float32), torch.tensor(labels[:200])
    torch.manual_seed(1)
    twin = names["Classifier"](200).net
    assert trained(twin, (x, y)).hidden_hash == callback.hidden_hash
    state = module.net.state_dict()
    assert all(torch.equal(state[name], value) for name, value in twin.state_dict().items())
    plain, _ = names["main"](n=200, epochs=30, tau=20)
    for name, value in plain.net.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_lightning_callback_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit, match=r"pip install .lightning>="):
        example("lightning_callback")


def test_callback(capsys):
    result = example("callback")["main"]()
    rates = [row["learning_rate"] for row in result.history]
    assert rates == [0.01] * 10 + [0.005] * 10
    assert "epoch 9: loss" in capsys.readouterr().out
