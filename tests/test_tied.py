"""Weights that two layers share: tied hidden layers train, the last layer must be on its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import Given, bits, quiet, same_bits, toy_data, toy_mlp
from twophase_ext.model.network import Network

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
READS_LAST_LAYER = {
    "by a function": lambda m, h: F.linear(h, m.out.weight),
    "the bias alone": lambda m, h: h + m.out.bias.sum(),
    "detached": lambda m, h: F.linear(h, m.out.weight.detach()),
    "held beside the modules": lambda m, h: h @ m.held[0],
}


@pytest.mark.parametrize("way", READS_LAST_LAYER)
def test_hidden_layers_that_read_the_last_layers_weights_are_refused(way):
    def run(m, x):
        return m.out(m.act(READS_LAST_LAYER[way](m, m.stem(x))))

    model = Given(run, stem=nn.Linear(4, 6), act=tp.nn.Softplus(), out=nn.Linear(6, 6))
    model.held = [model.out.weight]  # a list: not registered twice
    before = bits(model)
    with pytest.raises(ValueError, match="the hidden layers read the weights of 'out' too"):
        Network(model, X)
    with pytest.raises(ValueError, match="the hidden layers read the weights of 'out' too"):
        quiet(model).fit((X, torch.tensor([0, 1, 2, 3, 4])))
    assert same_bits(before, bits(model))


def test_hidden_layers_that_draw_numbers_do_not_read_the_last_layer():
    model = Given(
        lambda m, x: m.out(F.dropout(m.act(m.stem(x)), 0.5, training=True)),
        **{"stem": nn.Linear(4, 6), "act": tp.nn.Softplus(), "out": nn.Linear(6, 3)},
    )
    assert Network(model, X).last.name == "out"


def test_a_last_layer_in_another_ones_memory_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), tp.nn.Softplus(), nn.Linear(8, 3))
    flat = torch.zeros(60)
    model[0].weight = nn.Parameter(flat[:32].view(8, 4))
    model[2].weight = nn.Parameter(flat[32:56].view(3, 8))  # beside it: one buffer holds both
    assert Network(model, X).last.name == "2"
    model[2].weight = nn.Parameter(flat[31:55].view(3, 8))
    with pytest.raises(ValueError, match=r"last_layer: '2' shares its weights with '0\.weight'"):
        Network(model, X)


class AtTau:
    """The weights before and after the noise."""

    def on_epoch_end(self, run, record) -> None:
        if record["epoch"] == 1:
            self.before = bits(run.network.model)

    def on_perturb(self, run) -> None:
        self.after = bits(run.network.model)


def test_two_hidden_layers_of_one_parameter_train_and_get_the_noise_once(tmp_path):
    """As one layer that runs twice does."""

    def tied():
        model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), *toy_mlp())
        model[2].load_state_dict(model[0].state_dict())
        model[2].weight, model[2].bias = model[0].weight, model[0].bias
        return model

    torch.manual_seed(0)
    model = tied()
    twice = Given(
        lambda m, x: m.rest(m.first(torch.tanh(m.first(x)))), first=nn.Linear(5, 5), rest=toy_mlp()
    )
    twice.first.load_state_dict(model[0].state_dict())
    states, watch = [], AtTau()
    std = {"first.weight": 0.1, "first.bias": 0.1}
    rest = [f"{i}.{n}" for i in (0, 2) for n in ("weight", "bias")]
    for m, names in (
        (
            model,
            {"0.weight": 0.1, "0.bias": 0.1, **{f"{int(n[0]) + 3}{n[1:]}": 1e-3 for n in rest}},
        ),
        (twice, {**std, **{f"rest.{n}": 1e-3 for n in rest}}),
    ):
        result = quiet(m, noise_std=names, second_phase="none").fit(toy_data())
        assert result.status == "completed"
        states.append(bits(m))
    assert torch.equal(states[0]["0.weight"], states[1]["first.weight"])
    assert torch.equal(states[0]["2.weight"], states[0]["0.weight"])

    model = tied()
    quiet(model, tmp_path, noise_std=0.1, callbacks=[watch]).fit(toy_data())
    moved = watch.after["0.weight"] - watch.before["0.weight"]
    noise = torch.zeros(5, 5)
    tp.perturb_({"0.weight": noise}, 0.1, seed=tp.stream_seed(1, "noise"))
    torch.testing.assert_close(moved, noise, rtol=0, atol=1e-7)
    again = tied()
    assert quiet(again, tmp_path, noise_std=0.1).fit(toy_data(), resume=True).final
    assert same_bits(bits(model), bits(again))
    assert again[2].weight is again[0].weight


def test_hidden_layers_in_one_memory_by_two_parameters_are_refused():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), *toy_mlp())
    model[2].weight = nn.Parameter(model[0].weight.detach())
    message = "2.weight: expected memory of its own, got that of '0.weight'"
    with pytest.raises(ValueError, match=message):
        quiet(model).fit(toy_data())
