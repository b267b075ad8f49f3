"""An optimizer's state in checkpoints: by name, with all its bits, or refused."""

import numpy as np
import pytest
import torch
from torch import nn

import optimizer_kinds as kinds
import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_data, toy_mlp
from interrupts import End, Killed
from test_optimizer_kinds import KINDS, several
from twophase_ext.core.hashing import tensors_hash
from twophase_ext.training.optimizer.groups import plain
from twophase_ext.training.persistence import checkpoint

O = torch.optim  # noqa: E741
DATA = toy_data(20)


def kill(epoch, batch=None):
    """After the checkpoint of a step, or at the end of an epoch."""
    return End(epoch, batch, after_step=True, by=Killed)


def cut(folder, end, factory, build=toy_mlp, **settings) -> None:
    with pytest.raises(Killed):
        quiet(build(), folder, optimizer=factory, callbacks=[end], **settings).fit(DATA)


@pytest.mark.parametrize("name", [n for n in KINDS if n not in ("attributes", "addresses")])
@pytest.mark.parametrize("at", [(1, None), (3, None), (1, 2), (3, 2)])
def test_resumed_with_the_same_bits(tmp_path, name, at):
    """checkpoint_every within epochs changes no bit of a run, of averages neither."""
    whole, again, factory = toy_mlp(), toy_mlp(seed=4), KINDS[name]
    reference = quiet(whole, optimizer=factory).fit(DATA)
    settings = {} if at[1] is None else {"checkpoint_every": "1 step"}
    cut(tmp_path, kill(*at), factory, **settings)
    result = quiet(again, tmp_path, optimizer=factory, **settings).fit(DATA, resume=True)
    assert same_bits(bits(whole), bits(again))
    losses = [[row["train_loss"] for row in r.history] for r in (reference, result)]
    assert losses[0] == losses[1] and result.final == reference.final


@pytest.mark.parametrize("factory", [O.NAdam, O.ASGD, kinds.Wide], ids=lambda f: f.__name__)
def test_what_torch_would_round_comes_back(tmp_path, factory):
    """In float64 NAdam keeps a product, ASGD its rates in float32; load_state_dict converts."""
    settings = {"optimizer": factory, "precision": "float64"}
    whole, again = (toy_mlp(dtype=torch.float64, seed=s) for s in (0, 4))
    quiet(whole, **settings).fit(DATA)
    cut(tmp_path, kill(2), factory, lambda: toy_mlp(dtype=torch.float64), precision="float64")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["state_dict"]
    dtypes = {t.dtype for t in state["state"]["0.weight"].values() if isinstance(t, torch.Tensor)}
    assert len(dtypes) > 1
    quiet(again, tmp_path, **settings).fit(DATA, resume=True)
    assert same_bits(bits(whole), bits(again))


def test_the_checkpoint_s_model_is_the_average(tmp_path):
    opts = []

    def factory(ps):
        opts.append(kinds.Averaging(ps))
        return opts[-1]

    cut(tmp_path, kill(1, 2), factory, checkpoint_every="1 step")
    # what ends the run within steps leaves the average, too
    assert not opts[0].param_groups[0]["train_mode"]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert not any(g["train_mode"] for g in state["optimizer"]["state_dict"]["param_groups"])
    weight, z = state["averaged"]["0.weight"], state["optimizer"]["state_dict"]["state"]
    x = weight.lerp(z["0.weight"]["z"], 1 - 1 / 0.9)
    torch.testing.assert_close(state["model"]["0.weight"], x, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weight, state["model"]["0.weight"])
    quiet(toy_mlp(), tmp_path, optimizer=kinds.Averaging).fit(DATA, resume=True)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(state["averaged"]) == {"4.weight", "4.bias"}


# --- names -----------------------------------------------------------------------------------


class Twins(nn.Module):
    """Two layers of one shape, registered in either order."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = {name: nn.Linear(5, 5) for name in ("a", "b")}
        for name in ("b", "a") if swapped else ("a", "b"):
            setattr(self, name, made[name])
        self.wide, self.act, self.out = nn.Linear(5, 30), tp.nn.Softplus(), nn.Linear(30, 3)

    def forward(self, x):
        return self.out(self.act(self.wide(torch.tanh(self.b(torch.tanh(self.a(x)))))))


SETS = {  # as made from a set, whose order is another in each process
    "plain": lambda ps, turn: O.SGD(ps, lr=0.1, momentum=0.9),
    "one group": lambda ps, turn: O.Adam(ps[::-1] if turn else ps, lr=0.01),
    "two groups": lambda ps, turn: O.AdamW(
        [
            {"params": [p for p in (ps[::-1] if turn else ps) if p.ndim == 2]},
            {"params": [p for p in ps if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
    ),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("swapped", [True, False])
def test_each_parameter_gets_its_own_state(tmp_path, name, swapped):
    whole, again = Twins(False), Twins(swapped)
    quiet(whole, optimizer=lambda ps: SETS[name](ps, False)).fit(DATA)
    cut(tmp_path, kill(1), lambda ps: SETS[name](ps, False), lambda: Twins(False))
    quiet(again, tmp_path, optimizer=lambda ps: SETS[name](ps, True)).fit(DATA, resume=True)
    assert same_bits(dict(sorted(bits(whole).items())), dict(sorted(bits(again).items())))


def test_another_grouping_is_refused_by_name(tmp_path):
    def split(at):
        return lambda ps: O.SGD([{"params": ps[:at]}, {"params": ps[at:]}], lr=0.1, momentum=0.9)

    cut(tmp_path, kill(1), split(2))
    before = bits(model := toy_mlp(seed=3))
    message = r"resume: .*2.weight lies in this optimizer's group 0, but not in the other's"
    with pytest.raises(ValueError, match=message):
        quiet(model, tmp_path, optimizer=split(3)).fit(DATA, resume=True)
    assert same_bits(before, bits(model))


def test_a_state_dict_of_one_s_own_wants_the_order_as_it_was(tmp_path):
    cut(tmp_path, kill(1), several)
    turned = lambda ps: several([*ps[:4][::-1], *ps[4:]])  # noqa: E731
    with pytest.raises(ValueError, match=r"groups have 0.weight where this one's have 2.weight"):
        quiet(toy_mlp(seed=3), tmp_path, optimizer=turned).fit(DATA, resume=True)


def write_as(number, state, folder):
    """The checkpoint under the names that an older format has."""
    old = {new: then for then, new in checkpoint.RENAMED[number].items()}
    state = {old.get(name, name): v for name, v in state.items()}
    del state["format"], state["checksum"]
    digest = checkpoint.digest(state)
    torch.save({"format": number, "checksum": digest, **state}, folder / "checkpoint.pt")


def test_a_checkpoint_of_format_4_is_read(tmp_path):
    whole, again = toy_mlp(), toy_mlp(seed=4)
    settings = {"second_phase": "gd", "epochs": 7, "tau": 3}
    reference = quiet(whole, **settings).fit(DATA)
    with pytest.raises(Killed):
        quiet(toy_mlp(), tmp_path, callbacks=[End(4, by=Killed)], **settings).fit(DATA)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["second"]["smoothness"] and "hidden_unchanged" in state
    write_as(4, state, tmp_path)
    result = quiet(again, tmp_path, **settings).fit(DATA, resume=True)
    assert same_bits(bits(whole), bits(again))
    assert result.guarantee.curve == reference.guarantee.curve


def test_a_checkpoint_of_format_3_is_read_by_position(tmp_path):
    factory = lambda ps: O.SGD(ps, lr=0.1, momentum=0.9)  # noqa: E731
    whole, again = toy_mlp(), toy_mlp(seed=4)
    quiet(whole, optimizer=factory).fit(DATA)
    cut(tmp_path, kill(1), factory)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    packed = state.pop("optimizer")["state_dict"]
    names = [n for g in packed["param_groups"] for n in g["params"]]
    groups = [{**g, "params": [names.index(n) for n in g["params"]]} for g in
              packed["param_groups"]]  # fmt: skip
    positions = {names.index(n): s for n, s in packed["state"].items()}
    old = {"state": positions, "param_groups": groups}
    del state["averaged"]
    write_as(3, {**state, "optimizer": old}, tmp_path)
    quiet(again, tmp_path, optimizer=factory).fit(DATA, resume=True)
    assert same_bits(bits(whole), bits(again))


class Out:
    """What had to be done before: the frozen parameters leave the optimizer at tau."""

    def on_perturb(self, run) -> None:
        last = [id(p) for p in run.network.last.module.parameters()]
        for group in run.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in last]


def test_a_callback_may_take_the_frozen_parameters_out(tmp_path):
    model, other = toy_mlp(), toy_mlp()
    quiet(model, optimizer=O.Adam).fit(DATA)
    quiet(other, tmp_path, optimizer=O.Adam, callbacks=[Out()]).fit(DATA)
    assert same_bits(bits(model), bits(other))
    with pytest.raises(ValueError, match=r"resume: .*0.weight lies in this optimizer's group 0"):
        quiet(toy_mlp(), tmp_path, optimizer=O.Adam).fit(DATA, resume=True)


# --- what a checkpoint holds -----------------------------------------------------------------


class Cosine:
    """Rates that NumPy made."""

    def on_epoch_end(self, run, record) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = 0.1 * (1 + np.cos(np.pi * run.epoch / 6)) / 2


SOURCES = {
    "optimizer": {"optimizer": lambda ps: O.SGD(ps, lr=np.logspace(-3, -1, 5)[3], momentum=0.9)},
    "callback": {"callbacks": [Cosine()]},
    "schedule": {"scheduler": lambda o: O.lr_scheduler.LambdaLR(o, lambda e: np.float32(0.9) ** e)},
    "plateau": {"scheduler": lambda o: O.lr_scheduler.CosineAnnealingLR(o, np.int64(6), 1e-3)},
    "gd": {"second_phase": "gd", "gd": {"l2": np.float64(0.01), "smoothness": np.str_("tight")}},
    "sgd": {"second_phase": "sgd", "sgd": {"eps": np.float64(0.5), "c": np.float32(0.01)}},
    "lazy": {"second_phase": "lazy", "verify": "svd", "lazy": {"smoothness": np.float64(500)}},
}


@pytest.mark.parametrize("name", SOURCES)
def test_numpy_s_numbers_are_read_back(tmp_path, name):
    settings = SOURCES[name]
    own = tuple(settings.get("callbacks", ()))
    whole, again = toy_mlp(), toy_mlp(seed=4)
    quiet(whole, **settings).fit(DATA)
    with pytest.raises(Killed):
        changed = {**settings, "callbacks": [*own, kill(2)]}
        quiet(toy_mlp(), tmp_path, **changed).fit(DATA)
    quiet(again, tmp_path, **settings).fit(DATA, resume=True)
    assert same_bits(bits(whole), bits(again))


def test_plain_numbers():
    kept = {"a": [1.0, (2, "b")], "t": torch.ones(2)}
    assert plain(kept) is kept
    found = plain({np.int64(3): [np.float32(0.5), (np.bool_(True), np.array(2.0))]})
    assert found == {3: [0.5, (True, 2.0)]}
    assert [type(v) for v in (*found, found[3][0], *found[3][1])] == [int, float, bool, float]
    assert type(plain(np.longdouble(0.5))) is float
    array = np.ones(2)
    assert plain([array])[0] is array


def test_a_state_that_comes_later_is_refused_where_it_comes(tmp_path):
    """The checkpoint before it is whole; without a folder nothing is refused."""
    factory = lambda ps: kinds.Queued(ps, late=True)  # noqa: E731
    with pytest.raises(ValueError, match=r"optimizer: Queued keeps a collections.deque"):
        quiet(toy_mlp(), tmp_path, optimizer=factory).fit(DATA)
    assert checkpoint.load(tmp_path)[0]["epoch"] == 3
    assert quiet(toy_mlp(), optimizer=factory).fit(DATA).status == "completed"


class Projector:
    """Plain data in an object of a class of one's own."""

    def __init__(self) -> None:
        self.scale = 2.0


class Projecting(kinds.Rateless):
    def step(self, closure=None):
        super().step()
        for state in self.state.values():
            state["projector"] = Projector()


def test_a_class_that_is_allowed_is_held(tmp_path):
    with pytest.raises(ValueError, match=r"keeps a .*checkpoints\.Projector"):
        quiet(toy_mlp(), tmp_path / "a", optimizer=Projecting).fit(DATA)
    with torch.serialization.safe_globals([Projector]):
        cut(tmp_path / "b", kill(1), Projecting)
        result = quiet(toy_mlp(), tmp_path / "b", optimizer=Projecting).fit(DATA, resume=True)
    assert result.status == "completed"


def test_tensors_of_any_layout_have_a_checksum():
    one = torch.zeros(10)[::11].clone()
    assert one.stride() == (11,)
    plain_one = torch.zeros(1)
    for given, same in (
        (one, plain_one),
        (torch.arange(6.0).view(2, 3).T, torch.arange(6.0).view(2, 3).T.contiguous()),
        (torch.ones(1).expand(3), torch.ones(3)),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
    ):
        assert checkpoint.digest({"t": given}) == checkpoint.digest({"t": same})
        assert tensors_hash({"t": given}) == tensors_hash({"t": same})
    conjugate = torch.tensor([1 + 2j]).conj()
    assert checkpoint.digest(conjugate) == checkpoint.digest(torch.tensor([1 - 2j]))


class Packed(torch.Tensor):
    """As torchao's states: a tensor made of others, without clone()."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes) -> None:
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size=None, stride=None):
        return cls(inner["codes"])

    def __reduce_ex__(self, protocol):
        return Packed, (self.codes,)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default):
            return cls(args[0].codes)
        raise NotImplementedError(f"Packed has no {function}")


class Quantized(kinds.Rateless):
    """A momentum of 8 bits in a subclass."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "m" not in state:
                    state["m"] = Packed(torch.zeros_like(p, dtype=torch.int8))
                mean = 0.5 * state["m"].codes.float() / 100 + p.grad
                state["m"] = Packed((mean * 100).clamp(-127, 127).to(torch.int8))
                p.sub_(state["m"].codes.float(), alpha=1e-3)


def test_tensor_subclasses(tmp_path):
    whole, again = toy_mlp(), toy_mlp(seed=4)
    with torch.serialization.safe_globals([Packed]):
        quiet(whole, optimizer=Quantized).fit(DATA)
        cut(tmp_path, kill(2), Quantized)
        quiet(again, tmp_path, optimizer=Quantized).fit(DATA, resume=True)
        results = quiet(toy_mlp(), optimizer=Quantized).branch({"b": {}}, DATA)
    assert same_bits(bits(whole), bits(again))
    assert same_bits(bits(whole), bits(results["b"].model))
    a, b = (checkpoint.digest(Packed(torch.tensor([k]))) for k in (1, 2))
    assert a != b
