"""The paper's two tables: seeds paired, p-values corrected, nothing that is missing hidden."""

import dataclasses
import math

import pytest

from twophase.paper import PAPER_TABLE_1, PAPER_TABLE_2
from twophase.statistics import Summary, holm, paired_test
from twophase.tables import Comparison, ResultTable, compare, grid


def comparisons() -> list[Comparison]:
    printed = PAPER_TABLE_1["mnist", False]
    return [
        Comparison(
            {"data set": "MNIST", "augmentation": "No"},
            {1: 0.41, 2: 0.44, 3: 0.40},
            {3: 0.39, 2: 0.38, 1: 0.35},
            (printed.base, printed.two_phase),
            "proved",
        ),
        Comparison(
            {"data set": "SVHN", "augmentation": "No"},
            {1: 4.5, 2: 4.9, 4: 4.0},
            {1: 4.6, 2: 4.7, 5: 3.0},
        ),
        Comparison({"data set": "SVHN", "augmentation": "Yes"}, {1: 4.3, 2: 4.2}, {1: 4.2, 2: 4.1}),
        Comparison({"data set": "CIFAR-10", "augmentation": "No"}, {1: 14.0}, {}),
    ]


def test_compare_pairs_by_seed_and_corrects_over_rows():
    table = compare(comparisons(), title="Table 1", notes=["scale: 1/10"])
    mnist, svhn, equal, missing = table.rows
    assert mnist["base"] == Summary.of([0.41, 0.44, 0.40])
    assert mnist["two_phase"] == Summary.of([0.35, 0.38, 0.39])
    assert mnist["difference"] == paired_test([0.35, 0.38, 0.39], [0.41, 0.44, 0.40])
    assert mnist["difference"].mean < 0
    assert (mnist["p"], mnist["pairs"]) == (mnist["difference"].p, 3)
    assert mnist["p_sign_flip"] == 0.25
    assert (mnist["paper_base"].mean, mnist["paper_two_phase"].std) == (0.41, 0.04)
    assert mnist["base_minus_paper"] == pytest.approx((0.41 + 0.44 + 0.40) / 3 - 0.41)
    assert mnist["two_phase_minus_paper"] == pytest.approx((0.35 + 0.38 + 0.39) / 3 - 0.38)
    assert mnist["expressivity"] == "proved" and svhn["expressivity"] is None
    assert svhn["base"].n == svhn["two_phase"].n == 3 and svhn["pairs"] == 2
    assert svhn["difference"] == paired_test([4.6, 4.7], [4.5, 4.9])
    assert svhn["paper_base"] is svhn["base_minus_paper"] is None
    assert equal["p"] is equal["p_holm"] is None and equal["p_sign_flip"] == 0.5
    assert missing["two_phase"] is missing["difference"] is missing["p"] is None
    assert (missing["pairs"], missing["base"].n) == (0, 1)
    assert [mnist["p_holm"], svhn["p_holm"]] == holm([mnist["p"], svhn["p"]])
    assert table.notes[0] == "scale: 1/10"
    notes = "\n".join(table.notes)
    assert "t-tests of this table, 2 in all" in notes
    assert "paper: as printed, over 5 trials." in notes
    assert "Seeds 1, 2, 3: MNIST, No, base; MNIST, No, two-phase." in notes
    assert "Seeds 1, 2, 5: SVHN, No, two-phase." in notes
    assert "SVHN, Yes: all differences are equal, no t-test." in notes
    assert "Not run: CIFAR-10, No, two-phase." in notes
    lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 6 and {line.count("|") for line in lines} == {len(table.columns) + 1}
    assert ResultTable.from_json(table.json()) == table


def test_compare_names_what_it_refuses():
    rows = comparisons()
    with pytest.raises(ValueError, match="rows: expected at least one"):
        compare([], title="t")
    with pytest.raises(ValueError, match="rows: expected at least one, all with the same labels"):
        compare([*rows, Comparison({"data set": "x"}, {}, {})], title="t")
    diverged = dataclasses.replace(rows[0], two_phase={1: 0.4, 2: math.nan})
    with pytest.raises(ValueError, match=r"two_phase of MNIST, No: .* got nan at index 1"):
        compare([diverged], title="t")


def test_grid_stands_beside_the_papers():
    runs = {(0.001, 0.6): {2: 1.9, 1: 2.0}, (0.01, 0.9): {1: 3.0}, (0.01, 0.6): {}}
    table = grid(runs, title="Table 2", paper=PAPER_TABLE_2, notes=["scale: 1/10"])
    taus = (0.4, 0.5, 0.6, 0.8, 0.9)
    keys = ["delta_0", *(f"tau_0={t}" for t in taus), *(f"paper tau_0={t}" for t in taus)]
    assert [column.key for column in table.columns] == keys
    assert [row["delta_0"] for row in table.rows] == [0.0001, 0.001, 0.01]
    assert table.rows[1]["tau_0=0.6"] == Summary.of([2.0, 1.9])
    assert table.rows[2]["tau_0=0.9"] == Summary.of([3.0])
    found = {
        (row["delta_0"], tau): row[f"paper tau_0={tau}"]
        for row in table.rows
        for tau in taus
        if row[f"paper tau_0={tau}"] is not None
    }
    assert found == PAPER_TABLE_2
    ours = [row[f"tau_0={tau}"] for row in table.rows for tau in taus]
    assert sum(cell is not None for cell in ours) == 2
    assert "Seeds 1, 2: delta_0 = 0.001, tau_0 = 0.6." in table.notes
    assert "delta_0 = 0.01, tau_0 = 0.6" in table.notes[-1].removeprefix("Not run: ")
    alone = grid(runs, title="Table 2", names=("noise", "time"))
    assert [column.key for column in alone.columns] == ["noise", "time=0.6", "time=0.9"]
    with pytest.raises(ValueError, match="runs: expected at least one cell"):
        grid({}, title="t")
    with pytest.raises(ValueError, match=r"runs at \(1, 2\): .* got inf"):
        grid({(1, 2): {1: math.inf}}, title="t")
