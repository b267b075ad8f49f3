"""Tables of results: cells hold values, columns format them, one table renders in four forms."""

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from operator import methodcaller
from pathlib import Path
from typing import Any, Self

from twophase_ext.core.files import write_atomically

from ..statistics import Paired, Summary

Cell = Summary | Paired | str | int | float | None

MISSING = "—"  # how None is shown in Markdown and LaTeX; CSV leaves it empty, JSON has null
_FORMAT = re.compile(r"p|\+?,?((\.\d+)?[efg])?")
# tau_0, <0.001 and [low, high] need no backslash
_MARKDOWN = re.compile(r"[\\|*`&~$]|<(?=[A-Za-z/!?])|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[])")
# where a backslash keeps the start of a note from opening a list, a heading or a quotation
_BLOCK = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[-+#>]))")
_LATEX = str.maketrans(
    {
        **{special: "\\" + special for special in "{}$&#_%"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "[": "{[}",  # at the start of a row the \\ before it would take [ or * for its own
        "*": "{*}",
        "−": "$-$",
        MISSING: r"\textemdash{}",
    }
)


@dataclass(frozen=True)
class Column:
    """A column: key in the rows, header, format of its numbers, unit.

    format: how Markdown and LaTeX show numbers: a format specification such as ".2f", "+.2f" or
    ",", "p" for p-values (three decimals, never 0.000), or "" for Python's own. It is applied to
    each number of a Summary, "mean (std)", and of a Paired, "mean [low, high]" with signs, or its
    p where the format is "p". Text is shown as it is. CSV and JSON hold every number in full.
    Raises ValueError for another format.
    """

    key: str
    header: str
    format: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no format of numbers."""
        if not _FORMAT.fullmatch(self.format):
            raise ValueError(
                f"format: expected 'p' or a specification such as '.2f', got {self.format!r}"
            )

    def title(self) -> str:
        """The header with the unit."""
        return f"{self.header} ({self.unit})" if self.unit else self.header

    def text(self, cell: Cell) -> str:
        """The cell as Markdown and LaTeX show it, before escaping."""
        if isinstance(cell, Summary):
            return f"{self.text(cell.mean)} ({self.text(cell.std)})"
        if isinstance(cell, Paired):
            if self.format == "p":
                return self.text(cell.p)
            signed = dataclasses.replace(self, format="+" + self.format.lstrip("+"))
            interval = ", ".join(map(signed.text, cell.ci95)) if cell.ci95 else MISSING
            return f"{signed.text(cell.mean)} [{interval}]"
        if cell is None:
            return MISSING
        if isinstance(cell, str):
            return cell
        if self.format == "p":
            return "<0.001" if cell < 0.001 else f"{cell:.3f}"
        return format(cell, self.format).replace("-", "−")


@dataclass(frozen=True)
class ResultTable:
    """A table of results.

    rows: one dict for each row, from column keys to cells: Summary, Paired, text, a number, or
    None for what is not known; a missing key is None. notes: what a reader must know: scale,
    machine, what was skipped. Sequences are kept as tuples, numbers as int and float.

    Raises ValueError for no or repeated columns, unknown keys and numbers that are not finite,
    TypeError for other cells and for notes that are one string.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check and normalise."""
        keys = [column.key for column in self.columns]
        if not keys or len(set(keys)) < len(keys):
            raise ValueError(f"columns: expected different keys, at least one, got {keys}")
        if isinstance(self.notes, str):
            raise TypeError("notes: expected a sequence of strings, got str")
        rows = []
        for i, row in enumerate(self.rows):
            if unknown := [key for key in row if key not in keys]:
                raise ValueError(f"rows: expected keys among {keys}, got {unknown} in row {i}")
            rows.append({key: _checked(row.get(key), i, key) for key in keys})
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(rows))
        object.__setattr__(self, "notes", tuple(self.notes))

    def markdown(self) -> str:
        """The title in bold, a GitHub table, the notes as a list."""
        header, *rows = self._texts(_escape_markdown)
        rule = ["---:" if number else "---" for number in self._numeric()]
        lines = ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]
        notes = ["- " + _BLOCK.sub(r"\1\\", _escape_markdown(note)) for note in self.notes]
        lines = [
            f"**{_escape_markdown(self.title)}**",
            "",
            *lines,
            *([""] if notes else []),
            *notes,
        ]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A table environment for the package booktabs, every string escaped, the notes below."""
        header, *rows = (" & ".join(row) + r" \\" for row in self._texts(_escape_latex))
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escape_latex(self.title)}}}",
            rf"\begin{{tabular}}{{{''.join('r' if n else 'l' for n in self._numeric())}}}",
            r"\toprule",
            header,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\medskip\raggedright\footnotesize",
            *(rf"{_escape_latex(note)}\par" for note in self.notes),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """A header line of keys, then the rows: numbers in full, None empty.

        A Summary or Paired fills one column for each of its numbers: "base.mean", "base.std", ...,
        and "base.values", the sample, separated by spaces. Title, headers, units and notes are not
        in it. Raises ValueError where such a name is also the key of another column.
        """
        lines: list[dict[str, str]] = [{} for _ in self.rows]
        names: list[str] = []
        for column in self.columns:
            parts = [_flat(column.key, row[column.key]) for row in self.rows]
            names += dict.fromkeys(chain.from_iterable(parts)) or [column.key]
            for line, part in zip(lines, parts, strict=True):
                line.update(part)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"columns: expected names of their own in CSV, got {twice} twice")
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue()

    def json(self) -> str:
        """Everything, numbers in full; `from_json` reads it back."""
        content = {
            "title": self.title,
            "columns": [dataclasses.asdict(column) for column in self.columns],
            "rows": [{key: _to_json(cell) for key, cell in row.items()} for row in self.rows],
            "notes": self.notes,
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The table that `json` wrote, equal to it. Raises ValueError where it is not one."""
        try:
            content = json.loads(text)
            return cls(
                content["title"],
                [Column(**column) for column in content["columns"]],
                [{k: _from_json(v) for k, v in row.items()} for row in content["rows"]],
                content["notes"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"text: expected the JSON of a ResultTable ({error!r})") from None

    def write(self, folder: str | Path, stem: str) -> list[Path]:
        """Write stem.md, .csv, .json and .tex into the folder, made where missing; their paths.

        Each file is replaced at once, and none before all four are rendered. Raises ValueError for
        a stem that is no plain file name.
        """
        if not stem or Path(stem).name != stem:
            raise ValueError(f"stem: expected a file name without a folder, got {stem!r}")
        forms = {"md": self.markdown, "csv": self.csv, "json": self.json, "tex": self.latex}
        rendered = {Path(folder) / f"{stem}.{kind}": form() for kind, form in forms.items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path, text in rendered.items():
            write_atomically(path, methodcaller("write", text.encode()))
        return list(rendered)

    def _numeric(self) -> list[bool]:
        """Which columns are of numbers; they are aligned to the right."""
        return [
            bool(column.format)
            or any(not isinstance(row[column.key], str | None) for row in self.rows)
            for column in self.columns
        ]

    def _texts(self, escape: Callable[[str], str]) -> list[list[str]]:
        """Titles of the columns, then the cells of each row, as escaped text."""
        cells = [[column.text(row[column.key]) for column in self.columns] for row in self.rows]
        titles = [column.title() for column in self.columns]
        return [[escape(text) for text in line] for line in (titles, *cells)]


def _checked(cell: Any, row: int, key: str) -> Cell:
    """A cell with its number as int or float."""
    if cell is None or isinstance(cell, str | Summary | Paired):
        return cell
    if not isinstance(cell, Real) or isinstance(cell, bool):
        raise TypeError(
            f"rows: expected Summary, Paired, text, a number or None, got {type(cell).__name__} "
            f"in row {row}, {key!r}"
        )
    if not math.isfinite(cell):
        raise ValueError(f"rows: expected finite numbers or None, got {cell} in row {row}, {key!r}")
    return int(cell) if isinstance(cell, Integral) else float(cell)


def _flat(key: str, cell: Cell) -> dict[str, str]:
    """A cell's columns in CSV."""
    if isinstance(cell, Summary | Paired):
        parts = dataclasses.asdict(cell)
        low, high = parts.pop("ci95") or (None, None)
        values = {"values": " ".join(map(str, parts.pop("values")))} if "values" in parts else {}
        parts |= {"ci95_low": low, "ci95_high": high} | values
        return {f"{key}.{k}": "" if v is None else str(v) for k, v in parts.items()}
    return {} if cell is None else {key: str(cell)}


def _to_json(cell: Cell) -> Any:
    if isinstance(cell, Summary | Paired):
        return {"type": type(cell).__name__, **dataclasses.asdict(cell)}
    return cell


def _from_json(value: Any) -> Cell:
    if not isinstance(value, dict):
        return value
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return {"Summary": Summary, "Paired": Paired}[fields.pop("type")](**fields)


def _escape_markdown(text: str) -> str:
    """Text without line breaks whose characters stand for themselves, pipes above all."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))


def _escape_latex(text: str) -> str:
    """Text without line breaks whose characters stand for themselves; "--" stays two hyphens."""
    return re.sub("-(?=-)", "-{}", " ".join(text.split()).translate(_LATEX))
