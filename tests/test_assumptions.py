"""The table of premises on networks where the answers are known."""

import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import bits, same_bits, toy_convnet, toy_data, toy_images, toy_mlp


def statuses(table) -> dict[str, str]:
    return {row.name: row.status for row in table.rows}


def test_a_network_that_satisfies_everything():
    x, _ = toy_images(20)
    model = toy_convnet()
    before = bits(model)
    table = tp.check_assumptions(model, x)
    assert table.hold and set(statuses(table).values()) == {"held"}, str(table)
    assert same_bits(before, bits(model)) and table.verdict.status == "full rank"
    assert "L_ell = 0.5" in str(table)


def test_every_failure_is_named_with_advice():
    x, _ = toy_data(40)
    x[3] = x[8]
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    table = tp.check_assumptions(model, x, loss="squared_error")
    assert not table.hold
    found = statuses(table)
    for name in ("analytic modules", "H >= 2", "m_H >= n - 1", "distinct inputs", "expressivity"):
        assert found[name] == "failed", name
    text = str(table)
    for part in ("1 (ReLU)", "tp.nn.analytic", "tp.nn.widen", "[3, 8]", "L_ell = 2"):
        assert part in text


def test_functional_relu_is_found():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = toy_mlp()

        def forward(self, x):
            return self.body(torch.relu(x))

    table = tp.check_assumptions(Functional(), toy_data(20)[0])
    assert statuses(table)["analytic calls"] == "failed"


def test_softmax_behind_the_last_layer_stops_the_table():
    table = tp.check_assumptions(nn.Sequential(nn.Linear(5, 3), nn.Softmax(1)), toy_data(9)[0])
    assert not table.hold and len(table.rows) == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="the data set is empty"):
        tp.check_assumptions(toy_mlp(), torch.zeros(0, 5))
    with pytest.raises(ValueError, match="loss: expected one of"):
        tp.check_assumptions(toy_mlp(), toy_data(9)[0], loss="hinge")
