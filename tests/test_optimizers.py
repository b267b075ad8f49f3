"""Any optimizer: a plain loop's bits in the first phase, frozen hidden layers in the second."""

import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_data, toy_mlp
from twophase_ext.core.seeds import epoch_order


class Orthogonal(torch.optim.Optimizer):
    """As Muon: matrices step along the orthogonal factor of their momentum."""

    def __init__(self, params, lr=0.02, momentum=0.9, weight_decay=0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                buffer = state.setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = buffer
                if p.dim() == 2:
                    u, _, v = torch.linalg.svd(buffer, full_matrices=False)
                    update = u @ v
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


class Careless(Orthogonal):
    """Decays every weight that it has ever seen."""

    def __init__(self, params) -> None:
        params = list(params)
        super().__init__(params)
        self.seen = {f"weight {i}": p for i, p in enumerate(params)}

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for p in self.seen.values():
            p.mul_(0.99)


class Searching(Orthogonal):
    def step(self, closure):
        closure()


O = torch.optim  # noqa: E741
FACTORIES = {
    "SGD": lambda ps: O.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "tp.optim.SGD": lambda ps: tp.optim.SGD(ps, lr=0.05, momentum=0.9),
    "Adam": lambda ps: O.Adam(ps, lr=1e-2, amsgrad=True),
    "AdamW": lambda ps: O.AdamW(ps, lr=1e-2, weight_decay=0.5),
    "NAdam": lambda ps: O.NAdam(ps, lr=1e-2),
    "Adagrad": lambda ps: O.Adagrad(ps, lr=1e-2),
    "Adafactor": lambda ps: O.Adafactor(ps),
    "RMSprop": lambda ps: O.RMSprop(ps, lr=1e-3, momentum=0.9),
    "Rprop": lambda ps: O.Rprop(ps, lr=1e-3),
    "Orthogonal": Orthogonal,
}


class AtTau:
    def on_perturb(self, run) -> None:
        self.bits = bits(run.network.model)


def loop(model, optimizer, data, epochs: int, size: int = 8) -> None:
    """The base algorithm as a user writes it."""
    x, y = data
    for epoch in range(epochs):
        for index in epoch_order(1, epoch, len(x)).split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


@pytest.mark.parametrize("name", FACTORIES)
def test_both_phases(tmp_path, name):
    data, factory = toy_data(20), FACTORIES[name]
    by_hand, alone = toy_mlp(), toy_mlp()
    loop(by_hand, factory(list(by_hand.parameters())), data, epochs=4)
    quiet(alone, optimizer=factory, second_phase="none").fit(data)
    assert same_bits(bits(alone), bits(by_hand))
    model, watch = toy_mlp(), AtTau()
    result = quiet(model, tmp_path, optimizer=factory, callbacks=[watch]).fit(data)
    assert result.status == "completed" and result.hidden_hash
    moved = {n for n, t in bits(model).items() if not torch.equal(t, watch.bits[n])}
    assert moved == {"4.weight", "4.bias"}
    # the state of the optimizer was saved with each epoch
    (tmp_path / "checkpoint.pt").unlink()
    again = toy_mlp(seed=5)
    quiet(again, tmp_path, optimizer=factory).fit(data, resume=tmp_path / "checkpoint.previous.pt")
    assert same_bits(bits(again), bits(model))


def test_parameter_groups_and_frozen_parameters():
    """Different rates and decays, a group that is not trained: a plain loop's bits, both phases."""
    data, states = toy_data(20), []

    def groups(ps, every):
        frozen = [p for p in every if not p.requires_grad]
        matrices, vectors = ([p for p in ps if p.dim() == d] for d in (2, 1))
        return O.AdamW(
            [
                {"params": matrices, "weight_decay": 0.3},
                {"params": vectors, "lr": 3e-3, "weight_decay": 0.0},
                {"params": frozen, "lr": 1.0},
            ],
            lr=1e-2,
        )

    def build():
        model = toy_mlp()
        model[0].weight.requires_grad_(False)
        return model

    model = build()
    optimizer = groups([p for p in model.parameters() if p.requires_grad], model.parameters())
    loop(model, optimizer, data, epochs=4)
    states.append(bits(model))
    model = build()
    settings = {"optimizer": lambda ps, m=model: groups(ps, m.parameters())}
    result = quiet(model, second_phase="none", **settings).fit(data)
    assert result.history[0]["learning_rate"] == 1e-2
    assert same_bits(states[0], bits(model))
    assert torch.equal(model[0].weight, toy_mlp()[0].weight)
    model, watch = build(), AtTau()
    settings = {"optimizer": lambda ps, m=model: groups(ps, m.parameters())}
    assert quiet(model, callbacks=[watch], **settings).fit(data).hidden_hash
    moved = {n for n, t in bits(model).items() if not torch.equal(t, watch.bits[n])}
    assert moved == {"4.weight", "4.bias"}


def test_an_optimizer_that_moves_frozen_weights_voids_the_run():
    with pytest.raises(RuntimeError, match=r"hidden layers changed .* the optimizer"):
        quiet(toy_mlp(), optimizer=Careless).fit(toy_data(20))


@pytest.mark.parametrize("factory", [O.LBFGS, Searching])
def test_optimizers_that_need_a_closure_are_refused(factory):
    before = bits(model := toy_mlp())
    message = f"optimizer: {factory.__name__} needs a closure and is not a mini-batch algorithm"
    with pytest.raises(ValueError, match=message):
        quiet(model, optimizer=factory).fit(toy_data(20))
    assert same_bits(before, bits(model))


def test_other_things_than_optimizers_are_refused():
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got list"):
        quiet(toy_mlp(), optimizer=lambda ps: ps).fit(toy_data(20))
    with pytest.raises(ValueError, match=r"optimizer: lacks 4.bias \(1 such parameters\)"):
        quiet(toy_mlp(), optimizer=lambda ps: O.SGD(ps[:-1])).fit(toy_data(20))
