"""Result tables: four forms of the same cells."""

import csv
import dataclasses
import io
import json
import math
import os
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from twophase.statistics import Paired, Summary, paired_test
from twophase.tables import Column, ResultTable

SPECIALS = r"""aZ0 |\_^~*`<>&%$#{}[]()!-"'=+:.""" + "\n—−"
labels = st.text(st.sampled_from(SPECIALS), max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
samples = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4)
cells = (
    labels
    | finite
    | st.integers()
    | st.none()
    | samples.map(Summary.of)
    | samples.map(lambda a: paired_test(a, a[::-1]))
)


@st.composite
def tables(draw) -> ResultTable:
    columns = [
        Column(f"c{i}", draw(labels), draw(st.sampled_from(["", ".2f", "+.1e", ",", "p"])))
        for i in range(draw(st.integers(1, 3)))
    ]
    rows = draw(st.lists(st.fixed_dictionaries({}, optional={c.key: cells for c in columns})))
    return ResultTable(draw(labels), columns, rows, draw(st.lists(labels)))


# each would be read as a link, as emphasis, as a dash, as an escape, as a list
AWKWARD = [
    "[a](b)",
    "[a][b]",
    "__a__",
    "a -- b --- c",
    "a\\|b",
    "`a|b`",
    "- a",
    "1. a",
    "a\nb",
    "* [a]",
]
awkward = ResultTable("__t__", [Column("a", "a|b")], [{"a": text} for text in AWKWARD], AWKWARD)


def small_table() -> ResultTable:
    a, b = [0.1, 0.2, 0.1 + 0.2], [0.15, 0.15, 0.25]
    columns = [
        Column("set", "data | set"),
        Column("n", "images", ","),
        Column("error", "test error", ".2f", "%"),
        Column("change", "change", ".2f"),
        Column("p", "p", "p"),
        Column("rate", "rate", "+.1e"),
    ]
    rows = [
        {"set": "a|b_c", "n": 60_000, "error": Summary.of(a), "change": paired_test(a, b)},
        {"set": "x & y", "error": Summary.of([1 / 3]), "p": 0.0004, "rate": -1 / 3},
        {"n": 7, "error": 2 / 3, "change": paired_test([1.0], [2.0]), "p": 0.0456},
    ]
    return ResultTable("50 % of {all}", columns, rows, ["scale: 1/10", "cut | short"])


def table_lines(markdown: str) -> list[str]:
    return [line for line in markdown.splitlines() if line.startswith("|")]


def rendered(markdown: str) -> tuple[str, list[list[str]], list[str]]:
    """Title, rows of the table and notes as a Markdown parser shows them to a reader."""
    title, rows, notes = "", [], []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "list_item_open":
            notes.append("")
        elif token.type == "inline":
            kinds = {child.type for child in token.children}
            text = "".join(child.content for child in token.children)
            if rows:
                assert kinds <= {"text", "text_special"}
            if notes:
                notes[-1] += text
            elif rows:
                rows[-1].append(text)
            else:
                assert kinds <= {"text", "text_special", "strong_open", "strong_close"}
                title += text
    return title, rows, notes


def test_markdown_by_hand():
    assert small_table().markdown().splitlines() == [
        "**50 % of {all}**",
        "",
        r"| data \| set | images | test error (%) | change | p | rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        r"| a\|b_c | 60,000 | 0.20 (0.10) | +0.02 [−0.13, +0.16] | — | — |",
        r"| x \& y | — | 0.33 (—) | — | <0.001 | −3.3e−01 |",
        r"| — | 7 | 0.67 | −1.00 [—] | 0.046 | — |",
        "",
        "- scale: 1/10",
        r"- cut \| short",
    ]


@example(awkward)
@given(tables())
def test_markdown_shows_the_cells_and_nothing_else(table):
    unescaped = [re.findall(r"(?<!\\)(?:\\\\)*\|", line) for line in table_lines(table.markdown())]
    assert {len(pipes) for pipes in unescaped} == {len(table.columns) + 1}
    expected = [[column.title() for column in table.columns]]
    expected += [[c.text(row[c.key]) for c in table.columns] for row in table.rows]
    title, rows, notes = rendered(table.markdown())
    assert title == " ".join(table.title.split())
    assert rows == [[" ".join(text.split()) for text in row] for row in expected]
    assert notes == [" ".join(note.split()) for note in table.notes]


LATEX_TEXT = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
    r"\textemdash{}": "—",
    "$-$": "−",
    "{[}": "[",
    "{*}": "*",
    "-{}": "-",
    **{"\\" + c: c for c in "{}$&#_%"},
}
LATEX_TOKEN = re.compile("|".join(map(re.escape, LATEX_TEXT)) + r"|[^\\{}$&#_%~^<>|*\[]")


def typeset(latex: str) -> str:
    """What LaTeX prints for escaped text; fails for a special character that stands alone."""
    tokens, position = [], 0
    while position < len(latex):
        token = LATEX_TOKEN.match(latex, position)
        assert token, f"special character alone: {latex[position:]!r}"
        tokens.append(LATEX_TEXT.get(token[0], token[0]))
        position = token.end()
    return "".join(tokens)


@example(awkward)
@given(tables())
def test_latex_is_balanced_and_prints_the_cells(table):
    latex = table.latex()
    bare = re.sub(r"\\[{}]", "", latex)
    assert bare.count("{") == bare.count("}")
    assert "--" not in latex  # would become a dash
    head, body = latex.split("\\toprule\n")
    body, tail = body.split("\\bottomrule\n")
    header, rows = body.split("\\midrule\n")
    expected = [[column.title() for column in table.columns]]
    expected += [[c.text(row[c.key]) for c in table.columns] for row in table.rows]
    lines = (header + rows).splitlines()
    assert all(line.endswith(r" \\") for line in lines)
    split = [re.split(r"(?<!\\)&", line.removesuffix(r"\\")) for line in lines]
    assert [[typeset(cell.strip()) for cell in line] for line in split] == [
        [" ".join(text.split()) for text in line] for line in expected
    ]
    assert typeset(head.split("\\caption{")[1].split("}\n")[0]) == " ".join(table.title.split())
    notes = [line for line in tail.splitlines() if line.endswith(r"\par")]
    assert [typeset(line.removesuffix(r"\par")) for line in notes] == [
        " ".join(note.split()) for note in table.notes
    ]


def test_latex_by_hand():
    lines = small_table().latex().splitlines()
    assert lines[:7] == [
        r"\begin{table}",
        r"\centering",
        r"\caption{50 \% of \{all\}}",
        r"\begin{tabular}{lrrrrr}",
        r"\toprule",
        r"data \textbar{} set & images & test error (\%) & change & p & rate \\",
        r"\midrule",
    ]
    assert lines[7] == (
        r"a\textbar{}b\_c & 60,000 & 0.20 (0.10) & +0.02 {[}$-$0.13, +0.16] & "
        r"\textemdash{} & \textemdash{} \\"
    )
    assert r"& \textless{}0.001 & $-$3.3e$-$01 \\" in lines[8]
    assert lines[-1] == r"\end{table}"


def test_csv_holds_every_number_in_full():
    table = small_table()
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    first, second, third = table.rows
    assert [row["set"] for row in rows] == ["a|b_c", "x & y", ""]
    assert [row["n"] for row in rows] == ["60000", "", "7"]
    for name in ("n", "mean", "std"):
        assert float(rows[0][f"error.{name}"]) == getattr(first["error"], name)
    for name in ("mean", "std", "t", "p", "p_sign_flip"):
        assert float(rows[0][f"change.{name}"]) == getattr(first["change"], name)
    for cell in ("error", "change"):
        interval = float(rows[0][f"{cell}.ci95_low"]), float(rows[0][f"{cell}.ci95_high"])
        assert interval == first[cell].ci95
    assert tuple(map(float, rows[0]["error.values"].split())) == first["error"].values
    assert rows[1]["error.std"] == rows[1]["error.ci95_low"] == rows[1]["change.mean"] == ""
    assert (float(rows[1]["rate"]), float(rows[1]["p"])) == (second["rate"], second["p"])
    assert float(rows[2]["error"]) == third["error"] and rows[2]["error.mean"] == ""


@given(tables())
def test_csv_has_a_value_for_every_name_and_one_line_for_every_row(table):
    header, *rows = csv.reader(io.StringIO(table.csv()))
    assert len(set(header)) == len(header)
    assert len(rows) == len(table.rows) and {len(row) for row in rows} <= {len(header)}
    for read, row in zip(rows, table.rows, strict=True):
        line = dict(zip(header, read, strict=True))
        for key, cell in row.items():
            if isinstance(cell, str):
                assert line[key] == cell
            elif isinstance(cell, float | int):
                assert type(cell)(line[key]) == cell
            elif isinstance(cell, Summary | Paired):
                assert float(line[f"{key}.mean"]) == cell.mean


def test_csv_refuses_one_name_for_two_columns():
    columns = [Column("a", "a"), Column("a.mean", "b")]
    with pytest.raises(ValueError, match=r"columns: .* got \['a.mean'\] twice"):
        ResultTable("t", columns, [{"a": Summary.of([1.0]), "a.mean": 2.0}]).csv()


@given(tables())
def test_json_gives_the_table_back(table):
    read = ResultTable.from_json(table.json())
    assert read == table
    for row, again in zip(table.rows, read.rows, strict=True):
        assert [type(cell) for cell in row.values()] == [type(cell) for cell in again.values()]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "not json",
        '{"title": "t", "columns": [{"name": "a"}], "rows": [], "notes": []}',
        '{"title": "t", "columns": [{"key": "a", "header": "a"}], "rows": [1], "notes": []}',
        '{"title": "t", "columns": [{"key": "a", "header": "a"}], "rows": [{"a": '
        '{"type": "Other", "n": 1, "mean": 0.1, "std": null, "ci95": null}}], "notes": []}',
    ],
)
def test_from_json_refuses_what_is_no_table(text):
    with pytest.raises(ValueError):
        ResultTable.from_json(text)


def test_a_column_of_p_values_takes_the_p_of_a_test():
    column = Column("p", "p", "p")
    assert column.text(paired_test([1.0, 2.0, 4.0], [0.0, 3.0, 1.0])) == "0.478"
    assert column.text(paired_test([1.0], [2.0])) == "—"
    assert [column.text(p) for p in (0.0, 0.00099, 0.001, 1.0)] == [
        "<0.001",
        "<0.001",
        "0.001",
        "1.000",
    ]


def test_numpy_numbers_are_plain_numbers():
    row = {"a": np.float64(0.1), "b": np.int64(3)}
    table = ResultTable("t", [Column("a", "a"), Column("b", "b")], [row])
    assert table.csv() == "a,b\n0.1,3\n"
    assert json.loads(table.json())["rows"] == [{"a": 0.1, "b": 3}]


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (math.nan, ValueError, "rows: expected finite numbers or None, got nan in row 0, 'a'"),
        (math.inf, ValueError, "got inf in row 0, 'a'"),
        (True, TypeError, "got bool in row 0, 'a'"),
        ([1.0], TypeError, "got list in row 0, 'a'"),
    ],
)
def test_cells_that_are_refused(cell, error, message):
    with pytest.raises(error, match=message):
        ResultTable("t", [Column("a", "a")], [{"a": cell}])


def test_tables_that_are_refused():
    column = Column("a", "a")
    with pytest.raises(
        ValueError, match=r"rows: expected keys among \['a'\], got \['b'\] in row 1"
    ):
        ResultTable("t", [column], [{}, {"b": 1}])
    for columns in ([], [column, column]):
        with pytest.raises(ValueError, match="columns: expected different keys"):
            ResultTable("t", columns, [])
    with pytest.raises(TypeError, match="notes: expected a sequence of strings"):
        ResultTable("t", [column], [], "one note")
    for wrong in ("d", ".2", ">8.2f", "%", "{"):
        with pytest.raises(ValueError, match="format: expected 'p' or a specification"):
            Column("a", "a", wrong)


def test_write_makes_four_files_or_keeps_the_old_ones(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    table = small_table()
    paths = table.write(folder, "table.1")
    assert [path.name for path in paths] == [
        f"table.1.{kind}" for kind in ("md", "csv", "json", "tex")
    ]
    forms = [table.markdown(), table.csv(), table.json(), table.latex()]
    assert [path.read_bytes().decode() for path in paths] == forms
    assert sorted(folder.iterdir()) == sorted(paths)

    for stem in ("", "a/b", "../a"):
        with pytest.raises(ValueError, match="stem: expected a file name"):
            table.write(tmp_path, stem)

    other = dataclasses.replace(table, title="other")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        other.write(folder, "table.1")
    assert [path.read_bytes().decode() for path in paths] == forms
    monkeypatch.undo()
    monkeypatch.setattr(ResultTable, "latex", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.write(folder, "table.1")
    assert [path.read_bytes().decode() for path in paths] == forms
