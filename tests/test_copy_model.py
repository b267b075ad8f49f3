"""Copies of models that keep what deepcopy refuses, or share what it tears apart."""

import copy

import pytest
import torch
from torch import nn

from helpers import quiet, same_bits, toy_data
from twophase_ext.model import probing
from twophase_ext.model.probing import copy_model


class Store:
    """An object of the user's own."""

    __slots__ = ("value",)


class Keeping(nn.Module):
    """Keeps activations of its last training step, in attributes and in whatever they hold."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 16), nn.Linear(16, 70), nn.Linear(70, 3)
        self.kind, self.kept = kind, None

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.training:
            self.kept = {
                "tensor": lambda: h,
                "list": lambda: [h, h[:1]],
                "dict": lambda: {"maps": {"layer": (h,)}},
                "object": lambda: self._store(h),
            }[self.kind]()
        return self.c(torch.tanh(self.b(h)))

    def _store(self, h):
        store = Store()
        store.value = h
        return store


KINDS = ["tensor", "list", "dict", "object"]


@pytest.mark.parametrize("kind", KINDS)
def test_kept_activations_are_copied_without_their_graph(kind):
    model = Keeping(kind)
    model(toy_data(8)[0])
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    twin = copy_model(model)
    assert same_bits(twin.state_dict(), model.state_dict())
    kept = {"tensor": lambda k: k, "list": lambda k: k[0], "dict": lambda k: k["maps"]["layer"][0]}
    get = kept.get(kind, lambda k: k.value)
    assert torch.equal(get(twin.kept), get(model.kept)) and not get(twin.kept).requires_grad
    assert get(twin.kept) is not get(model.kept) and get(model.kept).grad_fn is not None
    with torch.no_grad():
        twin.a.weight.zero_()
    assert model.a.weight.abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_branches_of_a_model_that_keeps_activations(kind):
    trainer = quiet(Keeping(kind), noise_std=1e-3)
    found = trainer.branch({"base": {}, "gd": {"second_phase": "gd"}}, toy_data())
    assert [r.status for r in found.values()] == ["completed"] * 2


def test_what_shares_memory_shares_it_in_the_copy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())  # another object, the same memory
    model.view = model[0].weight[:2]
    model.constant = model[2].weight.detach()
    model.register_buffer("bias", model[2].bias.detach()[1:])
    twin = copy_model(model)
    with torch.no_grad():
        twin[0].weight.copy_(torch.arange(16.0).view(4, 4))
        twin[2].weight.fill_(7)
        twin[2].bias.fill_(8)
    assert torch.equal(twin[1].weight, twin[0].weight.t()) and twin[1].weight.requires_grad
    assert torch.equal(twin.view, twin[0].weight[:2])
    assert twin.constant.eq(7).all() and twin.bias.eq(8).all()
    assert not model[2].weight.eq(7).any() and not model.bias.eq(8).any()
    assert isinstance(twin[1].weight, nn.Parameter)


def test_tied_and_held_and_odd_tensors():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LazyLinear(2))
    model[1].weight = model[0].weight
    model.sparse = torch.eye(3).to_sparse()
    with torch.inference_mode():
        model.inference = torch.ones(3)
    model.itself = [model]
    twin = copy_model(model)
    assert twin[1].weight is twin[0].weight is not model[0].weight
    assert twin.itself[0] is twin and torch.equal(twin.inference, torch.ones(3))
    assert torch.equal(twin.sparse.to_dense(), torch.eye(3))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex128,
    ],
)
def test_same_bits_tells_zeros_and_nans_apart(dtype):
    a = torch.tensor([0.0, 1.0, 0.0]).to(dtype)[1:]  # a view with an offset
    assert probing.same_bits(a, a.clone()) and not probing.same_bits(a, torch.ones_like(a))
    assert not probing.same_bits(a, torch.zeros_like(a, dtype=torch.int64))
    if dtype.is_floating_point:
        assert not probing.same_bits(a, torch.where(a == 0, -a, a))  # -0.0
        nan = torch.full_like(a, float("nan"))
        assert probing.same_bits(nan, nan.clone())
    assert probing.same_bits(a[:0], a[:0].clone())
