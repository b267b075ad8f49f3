"""freeze, FeatureCache and fit_last_layer: the Trainer's second phase, piece by piece."""

import copy
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "ours": lambda p: tp.optim.SGD(p, lr=0.05),
    "adam": lambda p: torch.optim.AdamW(p, lr=1e-3),
}


class AtTau:
    """Model and optimizer as they are right before and right after the Trainer's switch."""

    def __init__(self, tau: int) -> None:
        self.tau = tau

    def on_epoch_end(self, run, record) -> None:
        if record["epoch"] == self.tau - 1:
            self.model, self.optimizer = copy.deepcopy((run.network.model, run.optimizer))


def second_phase(at_tau, data, *, epochs, tau, seed=1, batch_size=8, mode="auto", **settings):
    """What the Trainer does from tau on, by the pieces."""
    model, optimizer = at_tau.model, at_tau.optimizer
    network = {"last_layer": "head.out"} if hasattr(model, "head") else {}
    own = {id(p) for p in (model.head["out"] if network else model[-1]).parameters()}
    hidden = {name: p for name, p in model.named_parameters() if id(p) not in own}
    tp.perturb_(hidden, 1e-3, seed=tp.stream_seed(seed, "noise"))
    with tp.freeze(model, train=data) as frozen:
        cache = tp.FeatureCache(model, data, mode=mode, **settings)
        for epoch in range(tau, epochs):
            model.train()  # as a framework would
            tp.fit_last_layer(
                model,
                cache,
                epochs=1,
                first_epoch=epoch,
                batch_size=batch_size,
                seed=seed,
                optimizer=optimizer,
            )
    return model, frozen, cache


@pytest.mark.parametrize(
    ("optimizer", "mode"),
    [("sgd", "hidden"), ("ours", "backbone"), ("sgd", "disk"), ("sgd", "none"), ("adam", "hidden")],
)
def test_the_trainers_bits(optimizer, mode):
    data, model = toy_images(33), toy_convnet()  # BatchNorm, dropout, a last batch of one
    at_tau = AtTau(3)
    result = quiet(
        model,
        epochs=6,
        tau=3,
        seed=4,
        optimizer=OPTIMIZERS[optimizer],
        feature_cache=mode,
        callbacks=[at_tau],
    ).fit(data)
    mine, frozen, cache = second_phase(at_tau, data, epochs=6, tau=3, seed=4, mode=mode)
    assert frozen.hash == result.hidden_hash
    assert same_bits(bits(mine), bits(model))
    assert cache.mode == mode and (cache.bytes > 0) == (mode != "none")


def test_the_trainers_bits_with_a_squared_loss_and_a_loader():
    x, y = toy_data(40)
    y = F.one_hot(y, 3).float()
    model, at_tau = toy_mlp(), AtTau(2)
    quiet(model, loss="squared_error", callbacks=[at_tau]).fit((x, y))
    data = DataLoader(TensorDataset(x, y), batch_size=5)
    mine, _, _ = second_phase(at_tau, data, epochs=4, tau=2, loss="squared_error")
    assert same_bits(bits(mine), bits(model))


def test_a_head_of_ones_own_and_the_default_optimizer():
    x, y = toy_data(40)
    model = toy_mlp().eval()
    cache = tp.FeatureCache(model, (x, y))
    head, twin = nn.Linear(80, 3), nn.Linear(80, 3)
    twin.load_state_dict(head.state_dict())
    losses = tp.fit_last_layer(head, cache, epochs=3, first_epoch=2, batch_size=16, lr=0.1, seed=7)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-5)
    h, sampler, expected = model[:4](x).detach(), tp.EpochSampler(40, seed=7), []
    for epoch in (2, 3, 4):
        sampler.set_epoch(epoch)
        total = 0.0
        for index in torch.tensor(list(sampler)).split(16):
            optimizer.zero_grad()
            loss = F.cross_entropy(twin(h[index]), y[index])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index) / 40
        expected.append(total)
    assert losses == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(head.weight, twin.weight, rtol=1e-5, atol=1e-7)
    assert losses[-1] < losses[0]
    # the cache's rows are the features, and a copy of the model can be trained on them too
    assert torch.equal(cache.batch(torch.tensor([3, 1]))[0], model[:4](x)[[3, 1]])
    before = bits(model)
    tp.fit_last_layer(copy.deepcopy(model), cache, epochs=1)
    assert same_bits(bits(model), before)


def train_steps(model, data, optimizer, steps=3):
    """A framework's epoch: train mode, backward through everything, one optimizer of everything."""
    x, y = data
    for _ in range(steps):
        model.train()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_layers_do_not_move_in_a_loop_that_calls_train(optimizer):
    data, model = toy_images(33), toy_convnet()
    step = OPTIMIZERS[optimizer](model.parameters())
    train_steps(model, data, step)  # momentum, and gradients that are stale from now on
    frozen = tp.freeze(model, train=data)
    at_tau = bits(model)
    train_steps(model, data, step)
    frozen.verify()
    now = bits(model)
    moved = {name for name in now if not torch.equal(now[name], at_tau[name])}
    assert moved == {"head.out.weight", "head.out.bias"}
    assert torch.equal(model(data[0]), model(data[0]))  # no dropout
    # the same loop moves them once it may
    frozen.unfreeze()
    train_steps(model, data, step, steps=1)
    assert not torch.equal(model(data[0]), model(data[0]))
    now = bits(model)
    assert all(not torch.equal(now[n], at_tau[n]) for n in ("stem.weight", "bn.running_mean"))


def test_unfreezing_leaves_everything_as_it_was():
    model = toy_convnet()
    model.conv.weight.requires_grad_(False)
    model.drop.eval()
    before = bits(model)
    modes = {name: m.training for name, m in model.named_modules()}
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    with tp.freeze(model, last_layer="head.out") as frozen:
        assert not any(m.training for m in model.train().modules())
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"head.out.weight", "head.out.bias"}
        with pytest.raises(ValueError, match="frozen already"):
            tp.freeze(model, last_layer="head.out")
    assert frozen.last_layer is model.head["out"]
    assert same_bits(bits(model), before)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needs
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes
    assert all(m.training for m in model.train().modules())
    frozen.unfreeze()  # a second time
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_frozen_model_are_frozen_themselves(twin):
    model = toy_convnet()
    frozen = tp.freeze(model, last_layer="head.out")
    other = twin(model)
    frozen.unfreeze()
    assert not any(m.training for m in other.train().modules())
    assert all(m.training for m in model.train().modules())


def test_a_compiled_model_stays_frozen():
    model = toy_convnet()
    compiled = torch.compile(model, backend="eager")
    with tp.freeze(compiled, last_layer=model.head["out"]):
        compiled.train()
        assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.modules())


def test_what_moves_all_the_same_is_found():
    data = toy_images(33)
    model = toy_convnet()
    with pytest.raises(RuntimeError, match="hidden layers changed"), tp.freeze(model, train=data):
        model.bn.running_mean.add_(1e-6)
    assert model.training and model.conv.weight.requires_grad  # unfrozen all the same
    frozen = tp.freeze(model, train=data)
    model.bn.training = True
    with pytest.raises(RuntimeError, match=r"bn is in training mode \(1 such"):
        frozen.verify()
    frozen.unfreeze()
    with pytest.raises(KeyError), tp.freeze(model, train=data):
        model.bn.running_mean.add_(1.0)
        raise KeyError("the block's own error is not hidden")


def test_a_frozen_model_is_verified_as_before():
    x, y = toy_data(60)
    model = toy_mlp(width=66)
    before = tp.verify_expressivity(model, x, method="separation")
    assert (before.status, before.claim) == ("proved", "exists")
    with tp.freeze(model, train=(x, y)):
        now = tp.verify_expressivity(model, x, method="separation")
    assert (now.status, now.margin, now.hashes) == (before.status, before.margin, before.hashes)
    model[2].weight.requires_grad_(False)  # not by freeze: its weights cannot be chosen
    with tp.freeze(model, train=(x, y)):
        now = tp.verify_expressivity(model, x, method="separation")
    assert now.status == "undecided"


def test_ctrl_c_lets_the_epoch_end_and_is_not_swallowed():
    data = toy_data(40)
    whole, cut = toy_mlp().eval(), toy_mlp().eval()
    tp.fit_last_layer(whole, tp.FeatureCache(whole, data), epochs=1)

    def interrupted(outputs, y):
        os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(outputs, y)

    loss = tp.ConvexLoss(interrupted, 0.5)
    cache = tp.FeatureCache(cut, data, loss=loss)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # the second step's signal
        tp.fit_last_layer(cut, cache, epochs=3, batch_size=8)
    cut = toy_mlp().eval()
    cache = tp.FeatureCache(cut, data, loss=loss)
    with pytest.raises(KeyboardInterrupt):  # one step an epoch
        tp.fit_last_layer(cut, cache, epochs=3)
    assert signal.getsignal(signal.SIGINT) is handler
    for a, b in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_sampler_has_the_trainers_order():
    sampler = tp.EpochSampler(10, seed=3)
    loader = DataLoader(range(10), batch_size=4, sampler=sampler)
    for epoch in (0, 5):
        sampler.set_epoch(epoch)
        generator = torch.Generator().manual_seed(tp.stream_seed(3, "shuffle", epoch))
        assert torch.cat(list(loader)).tolist() == torch.randperm(10, generator=generator).tolist()
    assert len(loader) == 3


def test_bad_arguments():
    x, y = toy_data(40)
    model = toy_mlp()
    with pytest.raises(ValueError, match="last_layer: expected a module or a name"):
        tp.freeze(model)
    with pytest.raises(TypeError, match="last_layer: expected an affine layer"):
        tp.freeze(model, last_layer="3")
    with pytest.raises(
        ValueError, match=r"train: the model does not run on inputs of shape \[n, 4"
    ):
        tp.freeze(model, train=(x[:, :4], y))
    bare = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), model[-1])
    with pytest.raises(ValueError, match="1 was made with track_running_stats=False"):
        tp.freeze(bare, last_layer="2")
    assert model.training and all(p.requires_grad for p in model.parameters())

    with pytest.raises(ValueError, match=r"model: expected evaluation mode .* but the model is in"):
        tp.FeatureCache(model, (x, y))
    model.eval()
    with pytest.raises(ValueError, match=r"data: expected labels in 0\.\.2"):
        tp.FeatureCache(model, (x, y + 1))
    with pytest.raises(ValueError, match="mode: expected one of"):
        tp.FeatureCache(model, (x, y), mode="everything")
    cache = tp.FeatureCache(model, (x, y), mode="none")
    before = bits(model)
    whole, part = tp.optim.SGD(model[4].parameters()), tp.optim.SGD(model[0].parameters())
    for error, message, settings in [
        (ValueError, "epochs: expected at least 1", {"epochs": 0}),
        (TypeError, "batch_size: expected an integer", {"batch_size": 2.0}),
        (ValueError, "lr: expected None", {"lr": 0.1, "optimizer": whole}),
        (ValueError, "optimizer: lacks the last layer's weight", {"optimizer": part}),
        (RuntimeError, "the training loss is", {"lr": 1e38}),
    ]:
        with pytest.raises(error, match=message):
            tp.fit_last_layer(model, cache, **{"epochs": 2, **settings})
        assert error is RuntimeError or same_bits(bits(model), before)
    with pytest.raises(ValueError, match=r"model: expected a last layer of shape \[3, 80\]"):
        tp.fit_last_layer(nn.Linear(4, 3), cache, epochs=1)
    model.train()
    with pytest.raises(ValueError, match="model: expected evaluation mode"):
        tp.fit_last_layer(model, cache, epochs=1)


@pytest.mark.slow
def test_the_package_imports_no_other_trainer(tmp_path):
    code = (
        "import sys, twophase_ext, twophase_ext.integrations;"
        "print({'lightning', 'pytorch_lightning', 'transformers'} & set(sys.modules))"
    )
    # not from the source folder, whose package need not have been compiled
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert out.stdout == "set()\n"
