"""Optimizers of every kind: branches, frozen layers, schedule-free averages, rates, refusals."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optimizer_kinds as kinds
import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_data, toy_mlp
from twophase_ext.core.seeds import epoch_order, global_stream, stream_seed
from twophase_ext.training.optimizer.groups import Alone, averaging

O = torch.optim  # noqa: E741
DATA = toy_data(20)  # 3 steps an epoch


def several(ps):
    """The documented object of two, from the page itself."""
    page = (Path(__file__).parent.parent / "docs" / "torch.md").read_text(encoding="utf-8")
    block = re.search(r"^class Several.*?(?=^print)", page, re.MULTILINE | re.DOTALL)
    names = {"torch": torch}
    exec(block.group(), names)
    return names["muon_and_adamw"](ps)


class Both:
    """Two optimizers in an object that is no torch.optim.Optimizer."""

    def __init__(self, ps) -> None:
        self.held = {"strict": kinds.Strict([ps[0], ps[2]]), "rest": O.Adam(ps[1:2] + ps[3:])}
        self.state: dict = {}
        self.param_groups = [g for o in self.held.values() for g in o.param_groups]

    def zero_grad(self, set_to_none=True):
        for o in self.held.values():
            o.zero_grad(set_to_none)

    def step(self):
        for o in self.held.values():
            o.step()

    def state_dict(self):
        return {name: o.state_dict() for name, o in self.held.items()}

    def load_state_dict(self, state):
        for name, o in self.held.items():
            o.load_state_dict(state[name])
        self.param_groups = [g for o in self.held.values() for g in o.param_groups]


class Muonlike(kinds.Strict):
    """Matrices without the vectors."""

    def __init__(self, ps) -> None:
        super().__init__([{"params": [p for p in ps if p.ndim == 2]}])


KINDS = {
    "groups": kinds.Grouped,
    "attributes": kinds.Counting,
    "a counter": kinds.Stepping,
    "addresses": kinds.Keyed,
    "random": kinds.Drawing,
    "averages": kinds.Averaging,
    "averages in another": lambda ps: kinds.Slow(kinds.Averaging(ps)),
    "slow": lambda ps: kinds.Slow(O.SGD(ps, lr=0.05, momentum=0.9)),
    "slow in a list": lambda ps: kinds.Slow(O.Adam(ps, lr=1e-2), "list"),
    "slow in lists": lambda ps: kinds.Slow(
        O.SGD([{"params": ps[1::2]}, {"params": ps[::2]}], lr=0.05), "lists"
    ),
    "no rate": kinds.Rateless,
    "rate of None": lambda ps: kinds.Rateless(ps, none=False),
    "NumPy": kinds.Numeric,
    "wide": kinds.Wide,
    "several": several,
    "both": Both,
}
TORCH = {
    name: getattr(O, name)
    for name in sorted(vars(O))
    if isinstance(getattr(O, name), type)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")  # several has Muon
}


def loop(model, optimizer, epochs: int = 4) -> None:
    """The base algorithm as a user writes it."""
    averages = list(averaging(optimizer))
    for part in averages:
        part.train()
    for epoch in range(epochs):
        with global_stream(torch.device("cpu"), stream_seed(1, "model", epoch)):
            for index in epoch_order(1, epoch, len(DATA[0])).split(8):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(DATA[0][index]), DATA[1][index]).backward()
                optimizer.step()
    for part in averages:
        part.eval()


class Whole:
    """Groups are whole wherever a callback looks; hidden layers stay from tau on."""

    def on_fit_start(self, run) -> None:
        self.sizes = [len(g["params"]) for g in run.optimizer.param_groups]
        self.frozen = None

    def on_perturb(self, run) -> None:
        self.on_epoch_end(run, None)
        self.frozen = bits(run.network.model)

    def on_epoch_end(self, run, record) -> None:
        assert [len(g["params"]) for g in run.optimizer.param_groups] == self.sizes
        moved = bits(run.network.model)
        if self.frozen is not None:
            names = [n for n in moved if not torch.equal(moved[n], self.frozen[n])]
            assert set(names) <= {"4.weight", "4.bias"}


@pytest.mark.parametrize("name", [*KINDS, *TORCH])
def test_every_kind(name):
    """The first phase is the plain loop's, frozen layers stay, a branch is the run of its own."""
    factory, by_hand, model = {**KINDS, **TORCH}[name], toy_mlp(), toy_mlp()
    loop(by_hand, factory(list(by_hand.parameters())))
    quiet(model, optimizer=factory, second_phase="none").fit(DATA)
    assert same_bits(bits(by_hand), bits(model))
    model = toy_mlp()
    result = quiet(model, optimizer=factory, callbacks=[Whole()]).fit(DATA)
    assert result.status == "completed" and result.hidden_hash
    np.random.random()  # what the caller draws changes no run
    results = quiet(toy_mlp(), optimizer=factory).branch(
        {"b": {}, "on": {"second_phase": "none"}}, DATA
    )
    assert same_bits(bits(results["b"].model), bits(model))
    assert same_bits(bits(results["on"].model), bits(by_hand))
    assert [r["learning_rate"] for r in results["b"].history] == [
        r["learning_rate"] for r in result.history
    ]


@pytest.mark.parametrize("name", ["groups", "averages", "slow", "both"])
@pytest.mark.parametrize("mode", ["gd", "sgd"])
def test_phases_with_steps_of_their_own(name, mode):
    model = toy_mlp()
    settings = {"optimizer": KINDS[name], "second_phase": mode}
    assert quiet(model, callbacks=[Whole()], **settings).fit(DATA).guarantee.curve
    other = quiet(toy_mlp(), **settings).branch({"b": {}}, DATA)["b"]
    assert same_bits(bits(model), bits(other.model))


@pytest.mark.parametrize("cache", ["hidden", "none"])
def test_without_a_cache_too(cache):
    for name in ("several", "slow", "averages"):
        settings = {"optimizer": KINDS[name], "feature_cache": cache, "callbacks": [Whole()]}
        assert quiet(toy_mlp(), **settings).fit(DATA).feature_cache == cache


class Rate:
    """A rate for every epoch, set by a callback."""

    def on_epoch_end(self, run, record) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = 0.05 / (record["epoch"] + 2)


def test_a_branch_keeps_the_rate_that_a_callback_has_set():
    model, rate = toy_mlp(), {"callbacks": [Rate()]}
    sgd = lambda ps: O.SGD(ps, lr=0.05, momentum=0.9)  # noqa: E731
    alone = quiet(model, optimizer=sgd, **rate).fit(DATA)
    changes = {
        "same": {},
        "again": {"optimizer": lambda ps: O.SGD(ps, lr=0.05, momentum=0.9)},
        "decay": {"optimizer": lambda ps: O.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1)},
        "rate": {"optimizer": lambda ps: O.SGD(ps, lr=0.001, momentum=0.9)},
    }
    results = quiet(toy_mlp(), optimizer=sgd, **rate).branch(changes, DATA)
    rates = {n: [r["learning_rate"] for r in result.history] for n, result in results.items()}
    assert rates["same"] == rates["again"] == rates["decay"] == [r["learning_rate"] for r in
                                                                alone.history]  # fmt: skip
    assert rates["rate"][2] == 0.001  # its own, until the callback sets the next
    for name in ("same", "again"):
        assert same_bits(bits(results[name].model), bits(model))
    assert not same_bits(bits(results["decay"].model), bits(model))


def test_groups_are_cut_and_whole_again():
    a, b, c = (nn.Parameter(torch.zeros(k)) for k in (1, 2, 3))
    outer = kinds.Slow(O.SGD([{"params": [("a", a), ("b", b)]}, {"params": [("c", c)]}]), "lists")
    lists = outer.slow, outer.slow[0]
    with Alone(outer, [b]):
        assert [g["params"] for g in outer.base.param_groups] == [[b]]
        assert outer.param_groups is outer.base.param_groups
        assert outer.param_groups[0]["param_names"] == ["b"]
        assert [[len(t) for t in ts] for ts in outer.slow] == [[2]]
        outer.slow[0][0] = torch.ones(2)
    assert [[len(t) for t in ts] for ts in outer.slow] == [[1, 2], [3]]
    assert outer.slow[0][1].sum() == 2 and (outer.slow, outer.slow[0]) == lists
    assert [g["params"] for g in outer.param_groups] == [[a, b], [c]]
    assert outer.param_groups[0]["param_names"] == ["a", "b"]


# --- schedule-free ---------------------------------------------------------------------------


class Looks:
    """eval mode at every look, and the model where eval() puts it."""

    def on_fit_start(self, run) -> None:
        self.seen = []

    def _look(self, run) -> None:
        assert not any(g["train_mode"] for g in run.optimizer.param_groups)
        self.seen.append(bits(run.network.model))

    def on_perturb(self, run) -> None:
        self._look(run)

    def on_epoch_end(self, run, record) -> None:
        self._look(run)
        if record["phase"] == 2:
            measured = nn.functional.cross_entropy(run.network.model(DATA[0]), DATA[1])
            assert record["val_loss"] == pytest.approx(float(measured.detach()), rel=1e-5)


@pytest.mark.parametrize("trains_itself", [False, True])
def test_the_model_is_the_average_wherever_it_is_looked_at(trains_itself):
    opts = []

    def factory(ps):
        opts.append(kinds.Averaging(ps))
        if trains_itself:
            opts[-1].train()
        return opts[-1]

    model, looks = toy_mlp(), Looks()
    result = quiet(model, optimizer=factory, callbacks=[looks]).fit(DATA, DATA)
    before = bits(model)
    opts[-1].eval()
    assert same_bits(before, bits(model))
    loss = nn.functional.cross_entropy(model(DATA[0]), DATA[1])
    assert result.final["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    # by hand: two epochs, eval(), the noise, the last layer alone in the groups
    by_hand = toy_mlp()
    optimizer = kinds.Averaging(list(by_hand.parameters()))
    loop(by_hand, optimizer, epochs=2)
    assert same_bits(bits(by_hand), looks.seen[1])  # at the end of epoch 1
    hidden = {n: p for n, p in by_hand.named_parameters() if n[0] != "4"}
    tp.perturb_(hidden, 1e-3, seed=tp.stream_seed(1, "noise"))
    assert same_bits(bits(by_hand), looks.seen[2])  # at tau
    optimizer.param_groups[0]["params"] = list(by_hand[4].parameters())
    optimizer.train()
    for epoch in (2, 3):
        for index in epoch_order(1, epoch, 20).split(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(DATA[0][index]), DATA[1][index]).backward()
            optimizer.step()
    optimizer.eval()
    for name, value in bits(by_hand).items():
        torch.testing.assert_close(value, bits(model)[name], rtol=1e-4, atol=1e-5)


def test_the_own_loop_follows_the_rule():
    models = toy_mlp(), toy_mlp()
    settings = {"optimizer": kinds.Averaging, "second_phase": "base"}
    quiet(models[0], **settings).fit(DATA)
    model = models[1]
    optimizer = kinds.Averaging(list(model.parameters()))
    loop(model, optimizer, epochs=2)
    hidden = {n: p for n, p in model.named_parameters() if n[0] != "4"}
    tp.perturb_(hidden, 1e-3, seed=tp.stream_seed(1, "noise"))
    with tp.freeze(model, train=DATA):
        cache = tp.FeatureCache(model, DATA)
        tp.fit_last_layer(model, cache, epochs=2, first_epoch=2, batch_size=8, optimizer=optimizer)
    assert not optimizer.param_groups[0]["train_mode"]
    for name, value in bits(models[0]).items():
        torch.testing.assert_close(value, bits(model)[name], rtol=1e-4, atol=1e-5)


# --- rates, refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("none", [True, False])
def test_no_rate_is_an_empty_cell(tmp_path, none):
    factory = lambda ps: kinds.Rateless(ps, none)  # noqa: E731
    result = quiet(toy_mlp(), tmp_path, optimizer=factory).fit(DATA)
    assert [r["learning_rate"] for r in result.history] == [None] * 4
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [row["learning_rate"] for row in csv.DictReader(file)] == [""] * 4
    assert "eta" in str(result.guarantee)
    with pytest.raises(ValueError, match=r"optimizer: second_phase='lazy' .*\[None\]"):
        quiet(toy_mlp(), optimizer=factory, second_phase="lazy", verify="svd").fit(DATA)


REFUSED = {
    kinds.Closing: r"Closing failed in the first step: RuntimeError: a closure is needed\. For "
    r"every mini-batch the Trainer calls zero_grad\(\), one backward\(\) without create_graph",
    kinds.Twice: "Twice failed in the first step: RuntimeError: .* differentiates gradients",
    O.SparseAdam: "SparseAdam failed in the first step: RuntimeError: .*dense gradients",
    O.Muon: r"the callable failed on the model's 6 parameters \(1-D, 2-D\): ValueError: .*"
    "return one object that holds another",
    kinds.Queued: r"Queued keeps a collections.deque \(state_dict\(\)\['state'\]"
    r"\['0.weight'\]\['queue'\]\).*With run_dir=False",
}


@pytest.mark.parametrize("factory", REFUSED)
def test_what_cannot_be_a_base_algorithm_is_refused_at_the_first_step(tmp_path, factory):
    before = bits(model := toy_mlp())
    with pytest.raises(ValueError, match=f"optimizer: {REFUSED[factory]}"):
        quiet(model, tmp_path, optimizer=factory).fit(DATA)
    assert same_bits(before, bits(model)) and all(p.grad is None for p in model.parameters())
    # there was no run: the folder is free
    assert quiet(model, tmp_path).fit(DATA).status == "completed"


def test_a_state_that_is_never_saved_may_be_anything():
    model = toy_mlp()
    assert quiet(model, optimizer=kinds.Queued).fit(DATA).status == "completed"
    results = quiet(toy_mlp(), optimizer=kinds.Queued).branch({"b": {}}, DATA)
    assert same_bits(bits(results["b"].model), bits(model))


def test_objects_that_lack_something_are_named():
    class Half:
        param_groups = ()

        def step(self):
            pass

    message = "got Half without state, state_dict, load_state_dict, zero_grad"
    with pytest.raises(TypeError, match=message):
        quiet(toy_mlp(), optimizer=lambda ps: Half()).fit(DATA)
