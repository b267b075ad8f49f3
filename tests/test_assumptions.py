"""The table of premises on networks where the answers are known."""

from fractions import Fraction
from itertools import permutations

import pytest
import torch
from torch import nn

import twophase_ext as tp
import twophase_ext.theory.assumptions as module
from helpers import bits, same_bits, toy_convnet, toy_data, toy_images, toy_mlp


def statuses(table) -> dict[str, str]:
    return {row.name: row.status for row in table.rows}


def test_a_network_that_satisfies_everything():
    x, _ = toy_images(20)
    model = toy_convnet()
    before = bits(model)
    table = tp.check_assumptions(model, x)
    found = statuses(table)
    assert found.pop("Assumption 3") in ("held", "not met")  # sufficient only
    assert table.hold and set(found.values()) == {"held"}, str(table)
    assert same_bits(before, bits(model)) and table.verdict.status in ("proved", "full rank")
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
    for part in ("1 (ReLU)", "tp.nn.analytic", "tp.nn.widen(model, 40)", "[3, 8]", "L_ell = 2"):
        assert part in text
    for row in table.rows:
        assert row.status == "held" or row.advice, row.name


def test_functional_relu_is_found():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = toy_mlp()

        def forward(self, x):
            return self.body[1:](torch.relu(self.body[0](x)))

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


def gap(points) -> float:
    """The least ||x_i||^2 - x_i.x_j, in rational arithmetic."""
    exact = [[Fraction(v) for v in point] for point in points]
    return min(
        sum(a * (a - b) for a, b in zip(x, other, strict=True))
        for x, other in permutations(exact, 2)
    )


def test_assumption_3_against_rational_arithmetic():
    g = torch.Generator().manual_seed(1)
    seen = set()
    for trial in range(3000):
        n, d = (2 + trial % 6, 1 + trial % 4) if trial % 3 else (2, 8)
        points = torch.randint(-3, 4, (n, d), generator=g).double()
        if trial % 3 == 0:  # single roundings apart: float64 may have the wrong sign
            points = torch.rand(1, d, generator=g).double().exp() * (1 + 2.0**-52 * points)
        elif trial % 3 == 1:  # squares that are subnormal or 0
            points *= 2.0**-539
        row = module._assumption_3(points)
        assert row.status == ("held" if gap(points.tolist()) > 0 else "not met")
        seen.add(row.status)
    assert seen == {"held", "not met"}


@pytest.mark.parametrize(
    ("points", "status"),
    [
        ([[1.0, 0.0], [1.0, 1.0]], "not met"),  # exactly 0
        ([[1.0, 0.0], [1.0 - 2**-53, 1.0]], "held"),  # 2^-53
        ([[1.0, 0.0], [1.0 + 2**-52, 1.0]], "not met"),
        ([[3.0, 4.0], [5.0, 0.0], [0.0, -5.0]], "held"),  # equal norms
        ([[1e-170, 0.0], [0.0, 1e-170]], "held"),  # squares that underflow
        ([[1e200, 0.0], [0.0, 1e200]], "not checked"),  # and overflow
        ([[0.0, 0.0], [1.0, 0.0]], "not met"),
        ([[2.0]], "held"),
    ],
)
def test_assumption_3_at_its_edges(points, status):
    assert module._assumption_3(torch.tensor(points, dtype=torch.float64)).status == status


def test_assumption_3_names_the_pair_and_its_limits(monkeypatch):
    x = nn.functional.normalize(toy_data(30)[0].double())
    assert module._assumption_3(x).status == "held"
    x[11] = 2 * x[4]
    row = module._assumption_3(x)
    assert (row.status, row.evidence[:38]) == ("not met", "||x_4||^2 - x_4.x_11 = -1, Theorem 2 a")
    table = tp.check_assumptions(toy_mlp(), x)
    assert statuses(table)["Assumption 3"] == "not met" and table.hold
    images = (255 * torch.eye(6)).to(torch.uint8)
    assert module._assumption_3(images).status == "held"
    assert module._assumption_3(torch.arange(6)).status == "not checked"  # tokens
    monkeypatch.setattr(module, "EXACT_PAIRS", 3)
    same = torch.eye(6, dtype=torch.float64) + 1e-17  # held, within rounding of 0 for no pair
    assert module._assumption_3(same).status == "held"
    near = torch.cat([torch.ones(6, 1), 1e-9 * torch.eye(6)], 1)
    assert module._assumption_3(near).status == "not checked"
    monkeypatch.setattr(module, "PRODUCTS", -1)
    assert "0 inputs" in module._assumption_3(images).evidence


def test_inputs_that_the_models_precision_does_not_tell_apart():
    x = toy_data(20)[0].double()
    x[7] = x[2] * (1 + 1e-12)
    assert statuses(tp.check_assumptions(toy_mlp(), x))["distinct inputs"] == "failed"
    double = toy_mlp(dtype=torch.float64)
    assert statuses(tp.check_assumptions(double, x))["distinct inputs"] == "held"


def test_the_last_layers_bias_counts():
    x = toy_data(20)[0]
    model = toy_mlp(width=19)
    row = {r.name: r for r in tp.check_assumptions(model, x).rows}["m_H >= n - 1"]
    assert row.status == "held" and "Theorem 2 itself" in row.evidence
    model[4].bias.requires_grad_(False)
    assert statuses(tp.check_assumptions(model, x))["m_H >= n"] == "failed"


def test_losses():
    x = toy_data(20)[0]
    row = {r.name: r for r in tp.check_assumptions(toy_mlp(), x, loss=nn.MSELoss()).rows}
    assert row["convex, smooth loss"].status == "held"
    row = {r.name: r for r in tp.check_assumptions(toy_mlp(), x, loss=nn.L1Loss()).rows}
    assert row["convex, smooth loss"].status == "failed"
    assert "not differentiable everywhere" in row["convex, smooth loss"].evidence
    assert "tp.ConvexLoss" in row["convex, smooth loss"].advice
    declared = tp.ConvexLoss(lambda q, y: (q - y).cosh().mean(), 3.0, "cosh")
    table = tp.check_assumptions(toy_mlp(), x, loss=declared)
    assert statuses(table)["convex, smooth loss"] == "not checked" and "L_ell = 3" in str(table)


@pytest.mark.parametrize(
    ("layer", "status"),
    [
        (nn.Hardswish(), "failed"),
        (nn.Softplus(), "failed"),  # torch's, with its threshold
        (nn.Sequential(nn.Unflatten(1, (1, 8)), nn.MaxPool1d(1), nn.Flatten()), "failed"),
        (nn.Tanh(), "held"),
    ],
)
def test_modules_by_name(layer, status):
    model = nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 30), tp.nn.Softplus())
    model.append(nn.Linear(30, 3))
    table = tp.check_assumptions(model, toy_data(20)[0])
    rows = [row for row in table.rows if row.name == "analytic modules"]
    assert [row.status for row in rows] == [status]
    assert status == "held" or (rows[0].evidence.startswith("1") and rows[0].advice)


def test_dropout_is_named():
    table = tp.check_assumptions(toy_convnet(), toy_images(20)[0])
    assert "drop (dropout) random in train mode" in str(table).replace("\n", " ").replace("  ", "")


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"status": "proved", "claim": "exists"}, "held", "proved for some weights by separation"),
        ({"status": "proved", "claim": "at w"}, "held", "proved at these weights"),
        ({"status": "full rank", "claim": "at w", "sigma_min": 0.5}, "held", "not proved"),
        ({"status": "deficient", "claim": "exists", "reason": "twins"}, "failed", "twins"),
        ({"status": "undecided", "claim": "at w", "reason": "too near"}, "not checked", "too near"),
    ],
)
def test_every_verdict_becomes_a_row(fields, status, text):
    row = module._expressivity(tp.Verdict(method="separation", n=20, width=30, **fields))
    assert row.status == status and text in row.evidence
    assert status == "held" or row.advice


def test_the_table_is_at_most_100_columns_wide():
    x = toy_data(40)[0]
    x[3] = x[8]
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    lines = str(tp.check_assumptions(model, x)).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) > 12
    words = " ".join(lines).split()
    for row in tp.check_assumptions(model, x).rows:
        for word in f"{row.evidence} {row.advice if row.status != 'held' else ''}".split():
            assert word in words  # nothing is cut
