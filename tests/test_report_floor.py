"""The floor of the loss in a report's charts, and the gap that is left to it."""

from helpers import quiet, toy_data, toy_mlp
from twophase.report import page
from twophase.report.gather import read_folder
from twophase_ext.linalg.bounds import bound_text


def test_the_floor_and_the_gap_are_drawn(tmp_path):
    x, y = toy_data()
    x[1], y[1] = x[0], (y[0] + 1) % 3  # equal inputs with labels that disagree
    given = {"second_phase": "gd", "epochs": 4, "tau": 2}
    result = quiet(toy_mlp(), tmp_path / "floor", **given).fit((x, y))
    floor, gap = result.minimum.floor.lower, result.minimum.gap
    loss, _, bound = page.describe([read_folder(tmp_path / "floor")])["runs"][0]["charts"]
    drawn = {line.label: line.points for line in loss.lines}
    assert drawn["floor"] == [(0, floor), (3, floor)] and floor > 0.02
    above = drawn[f"gap, at most {bound_text(gap, 3, upper=True)}"]
    assert above == [(3, floor), (3, result.final["train_loss"])]
    assert [line.label for line in bound.lines][-1] == "floor"
    x, y = toy_data()  # no equal inputs
    quiet(toy_mlp(), tmp_path / "none", **given).fit((x, y))
    other = page.describe([read_folder(tmp_path / "none")])["runs"][0]
    assert [line.label for line in other["charts"][0].lines][:1] == ["training"]
    assert not any("floor" in line.label for line in other["charts"][0].lines)
    assert any("The floor of the loss is 0" in said for said in other["missing_charts"])
