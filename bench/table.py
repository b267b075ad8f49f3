"""Print what a benchmark run measured: ours, the best baseline and the limit, side by side.

    python bench/table.py RUN.json [--markdown]
    python bench/table.py --update PAGE.md RUN.json     rewrite the table between its markers

RUN.json comes from pytest --benchmark-json; bench/conftest.py states the convention for rows.
Several files may be given: the groups of all of them, one machine line each.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
HEADER = ("operation", "ours", "best baseline", "", "limit", "", "baseline / ours", "ours / limit")


@dataclass
class Row:
    """One benchmark: what it is and its median in seconds."""

    name: str
    median: float


@dataclass
class Group:
    """The rows of one operation and size; of several rows of a role the fastest counts."""

    name: str
    best: dict[str, Row] = field(default_factory=dict)

    def add(self, role: str, row: Row) -> None:
        """Keep `row` if it is the fastest of its role."""
        if role not in self.best or row.median < self.best[role].median:
            self.best[role] = row

    def cells(self) -> list[str]:
        """The table's columns."""
        ours, baseline, limit = (self.best.get(r) for r in ("ours", "baseline", "limit"))
        return [
            self.name,
            duration(ours),
            baseline.name if baseline else "-",
            duration(baseline),
            limit.name if limit else "-",
            duration(limit),
            ratio(baseline, ours),
            ratio(ours, limit),
        ]


def duration(row: Row | None) -> str:
    """A median with a unit that suits it."""
    if row is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if row.median >= size:
            return f"{row.median / size:.3g} {unit}"
    return f"{row.median / 1e-6:.3g} us"


def ratio(a: Row | None, b: Row | None) -> str:
    """a / b."""
    return f"{a.median / b.median:.2f} x" if a and b else "-"


def groups(run: dict) -> list[Group]:
    """The groups of a run, in the order in which they ran."""
    found: dict[str, Group] = {}
    for entry in run["benchmarks"]:
        info = entry["extra_info"]
        if "role" not in info:
            print(f"{entry['name']}: no role, left out", file=sys.stderr)
            continue
        group = found.setdefault(entry["group"], Group(entry["group"]))
        group.add(info["role"], Row(info.get("name", entry["name"]), entry["stats"]["median"]))
    return list(found.values())


def machine(run: dict) -> str:
    """One line: processor, threads, versions, date."""
    info = run["machine_info"]
    brand = info.get("cpu", {}).get("brand_raw") or info.get("processor") or info["machine"]
    parts = [f"{brand}, {info.get('cores', '?')} cores, {info.get('threads', '?')} threads"]
    if "gpu" in info:
        parts.append(f"{info['gpu']}, CUDA {info.get('cuda')}")
    parts.append(f"{info.get('isa', '?')} kernels, {info.get('compiler', '?')}")
    parts.append(f"torch {info.get('torch', '?')}, Python {info['python_version']}")
    parts.append(f"commit {run.get('commit_info', {}).get('id', '?')[:10]}, {run['datetime'][:10]}")
    return "; ".join(parts)


def aligned(rows: list[list[str]]) -> Iterable[str]:
    """Plain text, columns padded."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()


def markdown(rows: list[list[str]]) -> Iterable[str]:
    """A Markdown table."""
    yield "| " + " | ".join(rows[0]) + " |"
    yield "|" + "---|" * len(rows[0])
    for row in rows[1:]:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def render(runs: list[dict], as_markdown: bool) -> str:
    """The whole text for one or more runs."""
    lines: list[str] = []
    for run in runs:
        rows = [list(HEADER), *(group.cells() for group in groups(run))]
        lines += [f"Medians on {machine(run)}", ""]
        lines += [*(markdown(rows) if as_markdown else aligned(rows)), ""]
    return "\n".join(lines).rstrip() + "\n"


def update(path: Path, text: str) -> None:
    """Replace what stands between the markers in the file."""
    content = path.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(content)) != 1:
        sys.exit(f"{path}: expected exactly one pair of markers, {BEGIN} and {END}")
    block = f"{BEGIN}\n{text}{END}"
    path.write_text(pattern.sub(lambda _: block, content), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--update", type=Path, metavar="PAGE.md", help="rewrite its table")
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.runs]
    if arguments.update:
        update(arguments.update, render(runs, as_markdown=True))
    else:
        print(render(runs, arguments.markdown), end="")


if __name__ == "__main__":
    main()
