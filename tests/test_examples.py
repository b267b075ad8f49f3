"""Every example runs with a small setting, and what it shows is so."""

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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


def test_plain_loop_has_the_trainers_bits():
    names = example("plain_loop")
    model, verdict, at_tau = names["main"](n=200, epochs=30, tau=20)
    assert (verdict.status, verdict.claim) == ("proved", "at w")
    parameters = dict(model.named_parameters())
    assert len(at_tau) == 4
    assert all(torch.equal(parameters[name], value) for name, value in at_tau.items())
    x, y = names["digits"](200)
    assert (model(x).argmax(1) == y).float().mean() > 0.9

    torch.manual_seed(1)
    twin = nn.Sequential(*names["network"](200))
    tp.Trainer(
        twin,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-5),
        epochs=30,
        tau=20,
        verify=False,
        run_dir=False,
        progress=False,
    ).fit((x, y))
    assert all(torch.equal(parameters[name], p) for name, p in twin.named_parameters())


def test_lightning_callback(tmp_path):
    lightning = pytest.importorskip("lightning")
    names = example("lightning_callback")
    seen: dict[str, dict[str, torch.Tensor]] = {}

    class Record(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen[f"end {trainer.current_epoch}"] = copy.deepcopy(module.state_dict())

        def on_train_epoch_start(self, trainer, module):
            seen[f"start {trainer.current_epoch}"] = copy.deepcopy(module.state_dict())

    trainer = names["main"](n=200, epochs=30, tau=20, callbacks=[Record()])
    module, callback = trainer.lightning_module, trainer.callbacks[0]
    assert (callback.verdict.status, callback.verdict.claim) == ("proved", "at w")
    hidden = module.hidden().keys()
    last = seen["start 20"].keys() - hidden
    assert len(hidden) == 4 and len(last) == 2
    # the noise, and nothing else, at tau
    noisy = {name: seen["end 19"][name].clone() for name in hidden}
    tp.perturb_(noisy, 1e-3, seed=tp.stream_seed(1, "noise"))
    assert all(torch.equal(noisy[name], seen["start 20"][name]) for name in hidden)
    assert all(torch.equal(seen["end 19"][name], seen["start 20"][name]) for name in last)
    # then the last layer moves alone
    assert all(torch.equal(seen["end 29"][name], noisy[name]) for name in hidden)
    assert not any(torch.equal(seen["end 29"][name], seen["start 20"][name]) for name in last)
    x, y = trainer.train_dataloader.dataset.tensors
    loss = [F.cross_entropy(module(x), y)]
    assert (module(x).argmax(1) == y).float().mean() > 0.9

    # a run resumed after tau adds no second noise and still moves the last layer alone
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = names["Classifier"](200)
    more = lightning.Trainer(
        max_epochs=32,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[names["TwoPhase"](20, x)],
    )
    more.fit(again, trainer.train_dataloader, ckpt_path=tmp_path / "run.ckpt")
    state = again.state_dict()
    assert all(torch.equal(state[name], noisy[name]) for name in hidden)
    assert F.cross_entropy(again(x), y) < loss[0]


def test_lightning_callback_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit, match=r"pip install .lightning>="):
        example("lightning_callback")
