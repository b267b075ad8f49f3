"""The paper's printed numbers: consistent with what its text says of them."""

import dataclasses
import re

import pytest
import scipy.stats

from twophase import data
from twophase.paper import PAPER_SETTING, PAPER_TABLE_1, PAPER_TABLE_2
from twophase.statistics import holm, paired_test


def test_the_papers_tables_agree_with_its_text():
    rows = PAPER_TABLE_1.values()
    assert [row.row for row in rows] == list(range(1, 9))
    assert {name for name, _ in PAPER_TABLE_1} < set(data.NAMES)
    assert [augmentation for _, augmentation in PAPER_TABLE_1] == [False, True] * 4
    # section 7.2: "improved the test errors consistently over the four datasets"
    signs = paired_test([row.two_phase.mean for row in rows], [row.base.mean for row in rows])
    assert signs.mean < 0 and signs.p_sign_flip == 2 / 2**8
    assert {s.n for row in rows for s in (row.base, row.two_phase)} == {PAPER_SETTING.trials}
    # yet no row by itself is significant
    welch = [
        scipy.stats.ttest_ind_from_stats(
            *(row.base.mean, row.base.std, 5, row.two_phase.mean, row.two_phase.std, 5), False
        ).pvalue
        for row in rows
    ]
    assert min(holm(welch)) > 0.05
    # section 7.2: "Based on the results in Table 2, we fixed tau_0 = 0.6 and delta_0 = 0.001"
    chosen = PAPER_SETTING.delta_0, PAPER_SETTING.tau_0
    assert min(PAPER_TABLE_2, key=lambda place: PAPER_TABLE_2[place].mean) == chosen
    places = [(d, t) for d in PAPER_SETTING.delta_0_grid for t in PAPER_SETTING.tau_0_grid]
    assert list(PAPER_TABLE_2) == places
    assert {summary.n for summary in PAPER_TABLE_2.values()} == {PAPER_SETTING.trials_grid}


def test_every_setting_of_the_paper_has_its_place():
    for field in dataclasses.fields(PAPER_SETTING):
        assert re.search("section|Table|caption", PAPER_SETTING.where(field.name)), field.name
    with pytest.raises(ValueError, match=r"name: expected one of architecture, .*, got 'speed'"):
        PAPER_SETTING.where("speed")
