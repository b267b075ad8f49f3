"""The Trainer over compiled models: eager's bits, names without wrappers, checkpoints for both."""

import json

import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from interrupts import End, Killed

AOT = {"backend": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, **AOT)


WRAPPED = {
    "torch.compile": compiled,
    "DataParallel": nn.DataParallel,
    "compiled inside": lambda m: (m.add_module("conv", compiled(m.conv)), m)[1],
}


@pytest.mark.parametrize("way", WRAPPED)
def test_a_wrapped_model_trains_as_the_model_itself(tmp_path, way):
    data = toy_images(16)
    model, plain = toy_convnet(), toy_convnet()
    result = quiet(WRAPPED[way](model), tmp_path, verify="auto").fit(data)
    expected = quiet(plain, verify="auto").fit(data)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert list(state) == list(plain.state_dict())
    assert same_bits(state, bits(plain))
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "ToyConvNet"
    assert (result.feature_cache, result.hidden_hash) == ("hidden", expected.hidden_hash)
    known = {"proved"} if way != "compiled inside" else {"proved", "full rank"}
    assert expected.verdict.status == "proved" and result.verdict.status in known
    other = toy_convnet(seed=3)
    other.load_state_dict(state)  # by torch alone
    assert result.final["train_loss"] == pytest.approx(expected.final["train_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "killed"),
    [
        ("plain", "torch.compile", 0),
        ("torch.compile", "plain", 2),
        ("compile=True", "plain", 0),
    ],
)
def test_checkpoints_go_from_compiled_to_plain_and_back(tmp_path, first, second, killed):
    """Killed under one of them, in either phase, and continued under the other."""
    data = toy_images(16)
    whole = toy_convnet()
    quiet(whole).fit(data)

    def trainer(kind, seed, **settings):
        model = toy_convnet(seed=seed)
        given = compiled(model) if kind == "torch.compile" else model
        options = AOT if kind == "compile=True" else False
        return model, quiet(given, tmp_path, compile=options, **settings)

    with pytest.raises(Killed):
        trainer(first, 0, callbacks=[End(killed + 1, by=Killed)])[1].fit(data)
    model, continued = trainer(second, 7)
    result = continued.fit(data, resume=True)
    assert result.status == "completed" and same_bits(bits(model), bits(whole))


@pytest.mark.parametrize("second_phase", ["gd", "lazy"])
def test_second_phases_take_a_compiled_model(second_phase):
    settings = {"second_phase": second_phase, "verify": "auto"}
    if second_phase == "lazy":
        settings["lazy"] = {"smoothness": 1e4}
    data, states = toy_data(16), []
    for wrap in (lambda m: m, compiled):
        model = toy_mlp()
        assert quiet(wrap(model), **settings).fit(data).status == "completed"
        states.append(bits(model))
    assert same_bits(*states)


def test_branches_of_a_compiled_model():
    data, kept = toy_data(16), []
    for given in (toy_mlp(), compiled(toy_mlp())):
        results = quiet(given, epochs=2, tau=1).branch(
            {"base": {}, "none": {"second_phase": "none"}}, data
        )
        kept.append({name: r.final for name, r in results.items()})
        assert [r.status for r in results.values()] == ["completed"] * 2
    assert kept[0] == kept[1]


class Watch:
    """Calls of the compiled graphs by batch size, and the weights at tau."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def backend(self, graph, inputs):
        def run(*arguments):
            sizes = {t.shape[0] for t in arguments if t.dim() == 4 and t.shape[1:] == (1, 6, 6)}
            self.sizes += sizes
            return graph(*arguments)

        return run

    def on_perturb(self, run) -> None:
        self.at_tau = bits(run.network.model)


def test_the_compiled_graph_is_what_trains_and_frozen_batch_norm_stays():
    x, y = toy_images(20)
    watch, model = Watch(), toy_convnet()
    settings = {"compile": {"backend": watch.backend, "fullgraph": True}, "accumulate": 2}
    result = quiet(model, callbacks=[watch], **settings).fit((x, y))
    assert watch.sizes == [4, 4, 4, 4, 2, 2] * 2  # first phase alone
    hidden = {n: t for n, t in bits(model).items() if not n.startswith("head.out.")}
    assert same_bits(hidden, {n: watch.at_tau[n] for n in hidden}) and result.hidden_hash
    other = toy_convnet(dropout=0.0)
    other.load_state_dict(watch.at_tau)
    torch.optim.swa_utils.update_bn(x.split(256), other)
    assert torch.equal(other.bn.running_mean, model.bn.running_mean)
    assert torch.equal(other.bn.running_var, model.bn.running_var)


def test_inductor_trains_to_the_same_network():
    data, models = toy_data(8), [toy_mlp(width=20), toy_mlp(width=20)]
    for model, compile_it in zip(models, (False, True), strict=True):
        result = quiet(model, epochs=2, tau=1, compile=compile_it, noise_std=1e-6).fit(data)
        assert result.status == "completed" and result.hidden_hash
    torch.testing.assert_close(bits(models[1]), bits(models[0]), rtol=1e-4, atol=1e-6)
    assert not torch.equal(models[1][0].weight, toy_mlp(width=20)[0].weight)


def test_refusals():
    with pytest.raises(TypeError, match="compile: expected a bool or a dict of options, got 'no'"):
        quiet(toy_mlp(), compile="no")
    with pytest.raises(ValueError, match="compile: the model is compiled already; expected False"):
        quiet(compiled(toy_mlp()), compile=True)
    assert tp.Trainer(toy_mlp(), compile=True, run_dir=False).compile == {}
