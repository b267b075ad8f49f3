"""Finding the last and the wide layer by running a model once."""

import pytest
import torch
from helpers import bits, same_bits, toy_convnet, toy_images, toy_mlp
from torch import nn

import twophase_ext as tp
from twophase_ext.layers import canonical_name, find_last_layer, find_wide_layer, input_of


def test_nested_last_and_wide_layer_of_a_network_with_skips():
    x, _ = toy_images(4)
    model = toy_convnet()
    last = find_last_layer(model, x)
    assert last.name == "head.out" and last.module is model.head["out"]
    wide = find_wide_layer(model, x, last)
    assert wide is not None and wide.linear is model.head["wide"] and wide.beta == 10.0


def test_probing_changes_nothing():
    x, _ = toy_images(4)
    model = toy_convnet().train()
    model.stem.eval()
    before, state = bits(model), torch.get_rng_state()
    last = find_last_layer(model, x)
    find_wide_layer(model, x, last)
    assert same_bits(before, bits(model)) and torch.equal(state, torch.get_rng_state())
    assert model.training and not model.stem.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_wide_layer_where_the_activation_is_another():
    x = torch.randn(3, 5)
    for activation in (nn.Tanh(), nn.Softplus(100)):
        model = nn.Sequential(nn.Linear(5, 9), activation, nn.Linear(9, 2))
        assert find_wide_layer(model, x, find_last_layer(model, x)) is None
    model = nn.Sequential(nn.Linear(5, 9), tp.nn.Softplus(), nn.BatchNorm1d(9), nn.Linear(9, 2))
    assert find_wide_layer(model, x, find_last_layer(model, x)) is None


def test_in_place_activation_is_recognised():
    x = torch.randn(3, 5)
    model = nn.Sequential(nn.Linear(5, 9), tp.nn.Softplus(5.0, inplace=True), nn.Linear(9, 2))
    wide = find_wide_layer(model, x, find_last_layer(model, x))
    assert wide is not None and wide.beta == 5.0


def test_output_that_is_not_affine():
    x = torch.randn(3, 5)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softmax(1))
    with pytest.raises(ValueError, match=r"softmax behind it.*path: 0, 2"):
        find_last_layer(model, x)
    with pytest.raises(ValueError, match="output is not the output of 2"):
        find_last_layer(model, x, "2")


class TwoHeads(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if self.mode == "sum":
            return self.a(x) + self.b(x)
        if self.mode == "tuple":
            return self.a(x), self.b(x)
        if self.mode == "twice":
            return self.a(torch.tanh(self.a(x)))
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize(
    ("mode", "message"),
    [("sum", "path: a, b"), ("tuple", "expected one tensor"), ("twice", "a runs 2 times")],
)
def test_ambiguous_models(mode, message):
    with pytest.raises(ValueError, match=message):
        find_last_layer(TwoHeads(mode), torch.randn(3, 4))


def test_tied_weights():
    model = TwoHeads("chain")
    model.b.weight = model.a.weight
    with pytest.raises(ValueError, match=r"b shares its weights with a\.weight"):
        find_last_layer(model, torch.randn(3, 4))


def test_named_last_layer():
    x = torch.randn(3, 5)
    model = toy_mlp()
    assert find_last_layer(model, x, "4").module is find_last_layer(model, x, model[4]).module
    with pytest.raises(ValueError, match=r"'head' is not in the model; affine layers on the path"):
        find_last_layer(model, x, "head")
    with pytest.raises(ValueError, match="is not in the model"):
        find_last_layer(model, x, nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected an affine layer \(nn.Linear\), got Softplus"):
        find_last_layer(model, x, "3")
    with pytest.raises(ValueError, match=r"has no nn\.Linear on its path"):
        find_last_layer(nn.Sequential(nn.Conv1d(1, 1, 1)), torch.randn(1, 1, 5))


def test_input_of_stops_early():
    model = toy_mlp()
    seen = []
    model[4].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(3, 5)
    assert torch.equal(input_of(model, model[2], x), model[1](model[0](x)))
    assert not seen and not model[2]._forward_pre_hooks
    with pytest.raises(ValueError, match="does not reach"):
        input_of(model, nn.Linear(1, 1), x)


def test_canonical_names_and_compiled_models():
    assert canonical_name("module._orig_mod.conv.weight") == "conv.weight"
    model = torch.compile(toy_mlp(), backend="eager")
    assert find_last_layer(model, torch.randn(3, 5)).name == "4"
