"""optim.SGD as one of torch's optimizers: its arguments, state, devices, what autograd sees."""

import importlib

import pytest
import torch

from twophase_ext import optim


def test_ordinary_parameters_are_not_asked_for_shards(monkeypatch):
    importlib.import_module("torch.distributed.tensor")  # as any torch.optim.Optimizer does
    monkeypatch.setattr(optim, "_shards", lambda lists: pytest.fail("asked each tensor"))
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = optim.SGD([p], lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.step()


def test_parameters_on_several_devices():
    """Of the devices that every machine has; the operator takes one at a time."""
    own, other = (torch.nn.Parameter(torch.ones(3, device=d)) for d in ("cpu", "meta"))
    for order in ([own, other], [other, own]):
        for p in order:
            p.grad = torch.ones_like(p)
        optimizer, before = optim.SGD(order, lr=0.5, momentum=0.9), own.detach().clone()
        optimizer.step()
        assert torch.equal(own, before - 0.5)
        assert {str(optimizer.state[p]["momentum_buffer"].device) for p in order} == {"cpu", "meta"}


def test_constructor_is_torchs():
    p = [torch.nn.Parameter(torch.ones(2))]
    ours, theirs = optim.SGD(p), torch.optim.SGD(p)
    assert isinstance(ours, torch.optim.Optimizer)
    assert {**theirs.param_groups[0], "nu": 1} == ours.param_groups[0]
    for bad in (
        {"lr": -1.0},
        {"momentum": -0.1},
        {"weight_decay": -1.0},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    ):
        with pytest.raises(ValueError):
            optim.SGD(p, **bad)
    with pytest.raises(ValueError):
        optim.SGD([])


def test_a_state_without_nu_keeps_the_mask():
    p = [torch.nn.Parameter(torch.ones(2))]
    ours = optim.SGD([{"params": p, "nu": 0}], lr=0.1)
    ours.load_state_dict(torch.optim.SGD(p, lr=0.2).state_dict())
    assert ours.param_groups[0]["nu"] == 0
    assert ours.param_groups[0]["lr"] == 0.2
    ours.load_state_dict(optim.SGD(p, lr=0.3).state_dict())
    assert ours.param_groups[0]["nu"] == 1


def test_autograd_knows_of_the_change():
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optim.SGD([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
