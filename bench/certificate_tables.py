"""The results of bench/certificate_scale.py as Markdown: every number and every "met" computed."""

from collections.abc import Iterable
from typing import Any

from table import markdown

from twophase_ext.linalg.bounds import bound_text

RATE = 0.75  # of a large DGEMM's
GROWTH = {"gram": (2.7, 3.1), "separation": (1.0, 1.2)}  # exponents of n
SPEEDUP = 8.0  # over numpy.linalg.matrix_rank


def met(good: bool) -> str:
    return "met" if good else "**missed**"


def machine_line(entry: dict[str, Any]) -> str:
    m = entry["machine"]
    return (
        f"{entry['data']}; {m['processor']}, {m['cores']} cores, {m['threads']} threads, {m['isa']}"
        f" kernels; torch {m['torch']}, NumPy {m['numpy']}, Python {m['python']}; commit "
        f"{(m['commit'] or '?')[:10]}, {m['started'][:10]}"
    )


def rates(result: dict[str, Any]) -> Iterable[str]:
    before, after = result["dgemm"]["before"], result["dgemm"]["after"]
    best = max(*before.values(), *after.values())
    rows = [["what", "operations", "seconds", "GFLOP/s", "of the best DGEMM", f">= {RATE:.0%}"]]
    for name, stage in result["stages"].items():
        rate = stage["flops"] / stage["seconds"]
        share = rate / best
        numbers = [f"{stage['flops']:.3g}", f"{stage['seconds']:.1f}", f"{rate / 1e9:.1f}"]
        rows.append([name, *numbers, f"{share:.1%}", met(share >= RATE)])
    for size in before:
        for when, found in (("before", before), ("after", after)):
            rate = f"{found[size] / 1e9:.1f}"
            rows.append([f"DGEMM {size}, {when}", "", "", rate, f"{found[size] / best:.1%}", ""])
    yield f"### Rates: n = {result['n']:,}, {result['columns']:,} columns"
    yield ""
    yield (
        f"{result['status']}, attempts: {result['attempts']}, passes over the columns: "
        f"{result['passes']}, sigma_min >= {bound_text(result['sigma_min_lower'])}. A stage's time "
        "holds all that it does; operations are those of its products alone."
    )
    yield ""
    yield from markdown(rows)


def growth(result: dict[str, Any]) -> Iterable[str]:
    yield "### Growth"
    yield ""
    yield (
        "Best of up to five runs, the stages' seconds of the last of them; the exponent by least "
        "squares on logarithms. Memory: the peak beyond what lay in memory before, and what the "
        "plan's inequality says (Gram)."
    )
    for kind, part in result.items():
        gram = kind == "gram"
        head = ["n", "seconds", *(["Gram", "Cholesky"] if gram else []), "proved", "MiB"]
        rows = [[*head, *(["MiB by the plan", "inequality"] if gram else [])]]
        for p in part["points"]:
            used = p["peak"] - p["before"]
            row = [f"{p['n']:,}", f"{p['seconds']:.3g}"]
            if gram:
                row += [f"{stage['seconds']:.3g}" for stage in p["stages"].values()]
            row += ["yes" if p["proved"] else "**no**", f"{used / 2**20:,.0f}"]
            if gram:
                row += [f"{p['planned'] / 2**20:,.0f}", met(used <= p["planned"])]
            rows.append(row)
        fitted = "-" if part["exponent"] is None else f"n^{part['exponent']:.2f}"
        goal = ""
        if kind in GROWTH and part["exponent"] is not None:
            low, high = GROWTH[kind]
            goal = f" (n^{low} to n^{high}: {met(low <= part['exponent'] <= high)})"
        yield ""
        yield f"{kind}: time grows as {fitted}{goal}"
        yield ""
        yield from markdown(rows)


def against_numpy(result: dict[str, Any]) -> Iterable[str]:
    theirs = result["numpy"]
    rows = [["what", "seconds", "answer", "faster", f">= {SPEEDUP:g} x, certified"]]
    rows.append(["numpy.linalg.matrix_rank", f"{theirs['seconds']:.3g}", str(theirs["rank"])])
    rows[-1] += ["", ""]
    for kind in ("triangular", "gram"):
        ours = result[kind]
        quotient = theirs["seconds"] / ours["seconds"]
        good = quotient >= SPEEDUP and ours["status"] == "proved"
        answer = f"{ours['status']}, sigma_min >= {bound_text(ours['sigma_min_lower'], 3)}"
        row = [f"{kind} certificate", f"{ours['seconds']:.3g}", answer, f"{quotient:.1f} x"]
        rows.append([*row, met(good)])
    n, columns = result["n"], result["columns"]
    yield f"### Against numpy.linalg.matrix_rank: n = {n:,}, {columns:,} columns"
    yield ""
    yield (
        "Ours from the backbone's features: whitening, witness, certificate, promotion to the "
        "exact function. NumPy's from [h, 1] in float64, which it is given."
    )
    yield ""
    yield from markdown(rows)


def kill(result: dict[str, Any]) -> Iterable[str]:
    column, kills = result["column_work"], result["kills"]
    worst = max(k["lost"] for k in kills) / column
    excess = (result["work_spent"] - result["work"]) / column
    once = result["written_twice"] == 0 and result["tiles_written"] == result["tiles"]
    yield (
        f"### Killed {len(kills)} times: n = {result['n']:,}, tiles of {result['tile']}, "
        f"{result['tile_columns']} tile columns"
    )
    yield ""
    rows = [["what", "found", ""]]
    bits = (
        f"{result['last']['status']}, sigma_min_lower {result['last']['bits']['sigma_min_lower']}"
    )
    rows += [
        ["same bits as the whole run", bits, met(result["same"])],
        ["tiles written, of tiles", f"{result['tiles_written']} of {result['tiles']}", met(once)],
        ["work lost by one kill, at most", f"{worst:.2f} tile columns", met(worst <= 1)],
        ["work done beyond one run's", f"{excess:.2f} tile columns", met(excess <= len(kills))],
        ["eigenvalue estimates made", str(result["estimates"]), met(result["estimates"] == 1)],
    ]
    yield from markdown(rows)
    yield ""
    yield from markdown(
        [
            ["killed at, of the work", "tiles recorded by then", "tile columns of work lost"],
            *([f"{k['at']:.0%}", str(k["tiles"]), f"{k['lost'] / column:.2f}"] for k in kills),
        ]
    )


PARTS = {"rates": rates, "growth": growth, "numpy": against_numpy, "kill": kill}


def render(results: dict[str, Any]) -> str:
    """Markdown of the parts that were measured."""
    lines: list[str] = []
    for name, table in PARTS.items():
        if name in results:
            lines += [*table(results[name]["result"]), "", machine_line(results[name]), ""]
    return "\n".join(lines).rstrip() + "\n"
