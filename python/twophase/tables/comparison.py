"""The paper's two tables: base against two-phase training, and a grid of hyper-parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..statistics import Paired, Summary, holm, paired_test
from .table import Cell, Column, ResultTable


@dataclass(frozen=True)
class Comparison:
    """One row of `compare`: what base and two-phase training reached, by seed.

    labels: header to label, such as {"data set": "MNIST", "augmentation": "No"}. base, two_phase:
    seed to value, empty where nothing was run; the test pairs the seeds that both have. paper: the
    printed results of both, if any. expressivity: the verdict on Assumption 1.
    """

    labels: Mapping[str, str | int]
    base: Mapping[int, float]
    two_phase: Mapping[int, float]
    paper: tuple[Summary, Summary] | None = None
    expressivity: str | None = None


def compare(
    rows: Sequence[Comparison],
    *,
    title: str,
    notes: Sequence[str] = (),
    unit: str = "%",
    digits: int = 2,
) -> ResultTable:
    """Base against two-phase training over paired seeds, beside what the paper prints.

    Columns: the labels, then base and two_phase (Summary), pairs (how many seeds both have),
    difference (Paired, two-phase - base), p, p_sign_flip, p_holm (over the rows that have a p),
    paper_base, paper_two_phase, base_minus_paper, two_phase_minus_paper (of the means) and
    expressivity. Notes on the tests, the seeds and what is missing follow those given. Raises
    ValueError for no rows, rows with different labels and what `Summary.of` refuses.
    """
    if not rows or any(list(row.labels) != list(rows[0].labels) for row in rows):
        raise ValueError(
            f"rows: expected at least one, all with the same labels, got "
            f"{[list(row.labels) for row in rows]}"
        )
    lines = [_line(row) for row in rows]
    pairs = [_pair(row) for row in rows]
    p_values = [pair.p if pair else None for pair in pairs]
    for line, pair, p_holm in zip(lines, pairs, holm(p_values), strict=True):
        line |= {"difference": pair, "pairs": pair.n if pair else 0, "p_holm": p_holm}
        line |= {"p": pair and pair.p, "p_sign_flip": pair and pair.p_sign_flip}
    number, signed = f".{digits}f", f"+.{digits}f"
    columns = [
        *(Column(label, label) for label in rows[0].labels),
        Column("base", "base", number, unit),
        Column("two_phase", "two-phase", number, unit),
        Column("pairs", "pairs"),
        Column("difference", "two-phase − base, 95 % interval", number, unit),
        Column("p", "p", "p"),
        Column("p_sign_flip", "p (sign flip)", "p"),
        Column("p_holm", "p (Holm)", "p"),
        Column("paper_base", "paper: base", number, unit),
        Column("paper_two_phase", "paper: two-phase", number, unit),
        Column("base_minus_paper", "base − paper", signed, unit),
        Column("two_phase_minus_paper", "two-phase − paper", signed, unit),
        Column("expressivity", "expressivity"),
    ]
    tested = sum(p is not None for p in p_values)
    arms = [
        (f"{_name(row)}, {arm}", values)
        for row in rows
        for arm, values in (("base", row.base), ("two-phase", row.two_phase))
    ]
    return ResultTable(
        title,
        columns,
        lines,
        [
            *notes,
            "base, two-phase: mean (standard deviation, n − 1) over seeds. Difference: mean and "
            "95 % t interval over the paired seeds, negative where two-phase has the lower value.",
            "p: two-sided paired t-test. p (sign flip): exact permutation test, never below "
            f"2^(1 − pairs). p (Holm): p adjusted for the t-tests of this table, {tested} in all.",
            *_printed_note([printed for row in rows for printed in row.paper or ()]),
            *_seed_notes(arms),
            *(
                f"{_name(row)}: all differences are equal, no t-test."
                for row, pair in zip(rows, pairs, strict=True)
                if pair and pair.n > 1 and pair.p is None
            ),
        ],
    )


def grid(
    runs: Mapping[tuple[float, float], Mapping[int, float]],
    *,
    title: str,
    paper: Mapping[tuple[float, float], Summary] | None = None,
    names: tuple[str, str] = ("delta_0", "tau_0"),
    notes: Sequence[str] = (),
    unit: str = "%",
    digits: int = 2,
) -> ResultTable:
    """Results over two hyper-parameters, the paper's grid beside them.

    runs: (row value, column value) to the values by seed; a cell that is missing or empty was not
    run. Keys of the columns: names[0], then "tau_0=0.4" and so on, then "paper tau_0=0.4" and so
    on where `paper` is given. Rows and columns ascend and cover both grids. Notes on the seeds and
    on what was not run follow those given. Raises ValueError for an empty grid and what
    `Summary.of` refuses.
    """
    printed = paper or {}
    places = sorted({*runs, *printed})
    if not places:
        raise ValueError("runs: expected at least one cell, got none")
    across = sorted({column for _, column in places})
    columns = [Column(names[0], names[0])]
    for prefix, header in [("", ""), ("paper ", "paper: ")][: 2 if printed else 1]:
        columns += [
            Column(f"{prefix}{names[1]}={v}", f"{header}{names[1]} = {v}", f".{digits}f", unit)
            for v in across
        ]
    rows: dict[float, dict[str, Cell]] = {}
    for place in places:
        line = rows.setdefault(place[0], {names[0]: place[0]})
        line[f"{names[1]}={place[1]}"] = _summary(runs.get(place, {}), f"runs at {place}")
        if place in printed:
            line[f"paper {names[1]}={place[1]}"] = printed[place]
    named = [(f"{names[0]} = {a}, {names[1]} = {b}", runs.get((a, b), {})) for a, b in places]
    return ResultTable(
        title,
        columns,
        list(rows.values()),
        [
            *notes,
            "Mean (standard deviation, n − 1) over seeds.",
            *_printed_note(list(printed.values())),
            *_seed_notes(named),
        ],
    )


def _name(row: Comparison) -> str:
    return ", ".join(map(str, row.labels.values()))


def _summary(values: Mapping[int, float], name: str) -> Summary | None:
    """The summary of a sample in the order of its seeds; None where nothing was run."""
    return Summary.of([v for _, v in sorted(values.items())], name) if values else None


def _pair(row: Comparison) -> Paired | None:
    """Two-phase minus base over the seeds that both have; None where there are none."""
    seeds = sorted(row.base.keys() & row.two_phase.keys())
    if not seeds:
        return None
    return paired_test([row.two_phase[s] for s in seeds], [row.base[s] for s in seeds])


def _line(row: Comparison) -> dict[str, Cell]:
    """The row's cells but for the tests."""
    base = _summary(row.base, f"base of {_name(row)}")
    two_phase = _summary(row.two_phase, f"two_phase of {_name(row)}")
    paper_base, paper_two_phase = row.paper or (None, None)
    return {
        **row.labels,
        "base": base,
        "two_phase": two_phase,
        "paper_base": paper_base,
        "paper_two_phase": paper_two_phase,
        "base_minus_paper": base.mean - paper_base.mean if base and paper_base else None,
        "two_phase_minus_paper": (
            two_phase.mean - paper_two_phase.mean if two_phase and paper_two_phase else None
        ),
        "expressivity": row.expressivity,
    }


def _printed_note(printed: Sequence[Summary]) -> list[str]:
    """Over how many trials the paper's numbers are."""
    trials = sorted({summary.n for summary in printed})
    return [f"paper: as printed, over {' or '.join(map(str, trials))} trials."] if trials else []


def _seed_notes(runs: Sequence[tuple[str, Mapping[int, float]]]) -> list[str]:
    """Which seeds the named samples have, and which samples have none."""
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for name, values in runs:
        by_seeds.setdefault(tuple(sorted(values)), []).append(name)
    missing = by_seeds.pop((), [])
    notes = []
    for seeds, names in by_seeds.items():
        whose = f": {'; '.join(names)}" if len(by_seeds) > 1 else ""
        notes.append(f"Seeds {', '.join(map(str, seeds))}{whose}.")
    return notes + ([f"Not run: {'; '.join(missing)}."] if missing else [])
