"""Second phases of one trunk side by side: test error, loss, gap to the floor, seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from twophase_ext.core.files import write_csv
from twophase_ext.linalg.bounds import bound_text

from ..figures import BASE as GREEN
from ..figures import BOUND, GREY, MEASURED, STYLE, save
from ..statistics import Summary
from ..tables import Column, ResultTable
from .experiments import ACCELERATED, BASE, TITLES, TWO_PHASE, Cells, expressivity, groups
from .scales import Scale

COLOURS = {BASE: (GREEN, "--"), TWO_PHASE: (MEASURED, "-"), ACCELERATED: (BOUND, "-")}
# What a second phase waits for before its first step, beside its own epochs.
BEFORE = ("perturbation", "batch_norm", "features", "smoothness", "factorization")


def second_phases(cells: Cells, scale: Scale, notes: Sequence[str]) -> ResultTable:
    """What each branch reached, mean and deviation over the seeds, and in how many seconds."""
    rows = []
    for (data_set, augmented), parts in groups(cells).items():
        for name in parts[0][0].branches:
            runs = [cell["branches"][name] for _, cell in parts]
            paid = [cell["branches"] for _, cell in parts]
            times = [_seconds(run, branches) for run, branches in zip(runs, paid, strict=True)]
            least = [run["minimum"] for run in runs if run["minimum"]]
            gaps = [found["gap"] for found in least if found["gap"] is not None]
            conditions = sorted({found["condition"] for found in least})
            rows.append(
                {
                    "data_set": TITLES[data_set],
                    "augmentation": "yes" if augmented else "no",
                    "branch": name,
                    "test_error": _summary([run["test_error"] for run in runs]),
                    "test_loss": _summary([_last(run, "val_loss") for run in runs]),
                    "loss": _summary([found["loss"] for found in least]),
                    "gap": bound_text(max(gaps), 3, upper=True) if gaps else None,
                    "condition": "; ".join(conditions) or None,
                    "first": _summary([first for first, _ in times]),
                    "second": _summary([second for _, second in times]),
                    "expressivity": expressivity(runs) if any(r["verdict"] for r in runs) else None,
                }
            )
    return ResultTable(
        "Second phases from one first phase",
        [
            Column("data_set", "data set"),
            Column("augmentation", "augmentation"),
            Column("branch", "after tau"),
            Column("test_error", "test error", ".2f", "%"),
            Column("test_loss", "test loss", ".4f"),
            Column("loss", "training loss", ".3g"),
            Column("gap", "above the floor, at most"),
            Column("condition", "the floor is the minimum"),
            Column("first", "first phase", ".0f", "s"),
            Column("second", "second phase", ".0f", "s"),
            Column("expressivity", "expressivity"),
        ],
        rows,
        [
            scale.note(),
            *notes,
            "Mean (standard deviation, n − 1) over the seeds; the gap is the largest one. Training "
            "loss: over all images without noise or augmentation, in evaluation mode.",
            "Seconds of the second phase: features, constants and factorization included, not the "
            "verification, the bound and losses. Branches share the features: each is charged for "
            "them.",
        ],
    )


def equal_time(cells: Cells, folder: Path, stem: str) -> list[Path]:
    """Test error and training loss by seconds, every seed a line; the floor drawn."""
    kinds = groups(cells)
    rows: list[dict[str, Any]] = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.8 * len(kinds)), layout="constrained")
        panels = figure.subplots(len(kinds), 2, squeeze=False)
        for pair, ((data_set, augmented), parts) in zip(panels, kinds.items(), strict=True):
            title = TITLES[data_set] + (", augmented" if augmented else "")
            for i, (trunk, cell) in enumerate(parts):
                runs = cell["branches"]
                curves = {name: _curve(runs[name], runs) for name in COLOURS if name in runs}
                _draw(pair, curves, named=not i)
                kind = {"data_set": data_set, "augmentation": augmented, "seed": trunk.seed}
                rows += [
                    {**kind, "run": name, **point}
                    for name, points in curves.items()
                    for point in points
                ]
            _finish(pair, title, _floor([cell for _, cell in parts]))
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        path = folder / f"{stem}.csv"
        write_csv(path, list(rows[0]), rows)
        return [*save(figure, folder / stem), path]


def _draw(pair: Any, curves: Mapping[str, list[dict[str, Any]]], *, named: bool) -> None:
    """One seed: what the branches share until tau, and each of them from there on."""
    first = next(iter(curves.values()))
    tau = min(max(p["seconds"] for p in points if p["phase"] == 1) for points in curves.values())
    lines = {"first phase": [point for point in first if point["seconds"] <= tau]}
    lines |= {name: [p for p in points if p["seconds"] >= tau] for name, points in curves.items()}
    for axes, key in zip(pair, ("test_error", "train_loss"), strict=True):
        for name, points in lines.items():
            colour, dashes = COLOURS.get(name, (GREY, "-"))
            x, y = [point["seconds"] for point in points], [point[key] for point in points]
            axes.plot(x, y, dashes, color=colour, lw=1, label=name if named else None)
        axes.axvline(tau, color=GREY, lw=0.6, ls=":")
        if named:
            axes.annotate(" tau", (tau, 0.93), xycoords=("data", "axes fraction"), fontsize=8)


def _finish(pair: Any, title: str, floor: float | None) -> None:
    """Titles, scales and the floor of the loss."""
    left, right = pair
    left.set(title=title, xlabel="seconds", ylabel="test error, %", yscale="log")
    for set_formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    right.set(xlabel="seconds", ylabel="training loss", yscale="log")
    right.set_ylim(bottom=right.get_ylim()[0] / 2)  # room for what is said below
    if floor is not None:
        said = f"floor {floor:g}: no weights of any network are below"
        right.annotate(said, (0.02, 0.03), xycoords="axes fraction", fontsize=7)
        if floor > 0:
            right.axhline(floor, color="black", lw=0.8)


def _floor(cells: Sequence[Mapping[str, Any]]) -> float | None:
    """The floor of the training loss, where a run knows it."""
    runs = [run for cell in cells for run in cell["branches"].values()]
    known = [
        run["minimum"]["floor"]["lower"] for run in runs if (run["minimum"] or {}).get("floor")
    ]
    return max(known, default=None)


def _seconds(run: Mapping[str, Any], branches: Mapping[str, Any]) -> tuple[float, float]:
    """Until tau, and after it."""
    first, second = (
        sum(row["seconds"] for row in run["history"] if row["phase"] == phase) for phase in (1, 2)
    )
    return first, second + (_before(run, branches) if second else 0.0)


def _before(run: Mapping[str, Any], branches: Mapping[str, Any]) -> float:
    """What the run's second phase waited for; features are filled once for all branches."""
    own = sum(run["timings"].get(stage, 0.0) for stage in BEFORE if stage != "features")
    return own + max(branch["timings"].get("features", 0.0) for branch in branches.values())


def _curve(run: Mapping[str, Any], branches: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Test error and losses after each epoch, with the seconds spent until then."""
    elapsed, waited, points = 0.0, False, []
    for row in run["history"]:
        if row["phase"] == 2 and not waited:
            elapsed, waited = elapsed + _before(run, branches), True
        elapsed += row["seconds"]
        points.append(
            {
                "phase": row["phase"],
                "epoch": row["epoch"],
                "seconds": elapsed,
                "test_error": 100 * (1 - row["val_accuracy"]),
                "test_loss": row["val_loss"],
                "train_loss": row["train_loss"],
            }
        )
    return points


def _last(run: Mapping[str, Any], key: str) -> float | None:
    return run["history"][-1].get(key)


def _summary(values: Sequence[float | None]) -> Summary | None:
    known = [value for value in values if value is not None]
    return Summary.of(known, "values") if known else None
