"""Figures of runs: the loss curve with tau, and the guaranteed loss beside the measured one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twophase_ext.core.files import write_atomically
from twophase_ext.training.persistence.runfolder import RunFolder

# Okabe and Ito's colours, told apart by colour-blind readers and, with the dashes, in print
MEASURED, BOUND, BASE, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"}


def read_run(folder: Path) -> tuple[list[dict[str, float]], list[dict[str, float]], dict[str, Any]]:
    """(rows of metrics.csv, rows of guarantee.csv or [], result.json) of a run folder.

    Numbers as floats, what is not measured or not a number left out. Raises FileNotFoundError, and
    ValueError where the name of a file leads out of the folder.
    """
    kept = RunFolder(folder)
    result = kept.result()[0]
    try:
        curve = kept.curve()
    except FileNotFoundError:
        curve = []
    return kept.history(), curve, result


def run_figure(folder: str | Path) -> list[Path]:
    """Write loss.svg and loss.png into a run folder and return their paths.

    Left: training and validation loss by epoch, tau marked. Right, where the run claims a bound:
    measured and guaranteed loss by the steps since tau. Raises FileNotFoundError where `folder`
    holds no finished run.
    """
    folder = Path(folder)
    history, curve, result = read_run(folder)
    refuted = bool((result.get("guarantee") or {}).get("refuted"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2 if curve else 3.8, 2.8), layout="constrained")
        axes = figure.subplots(1, 2 if curve else 1, squeeze=False)[0]
        draw_history(axes[0], {"training": history})
        if curve:
            draw_bound(axes[1], curve, "refuted bound" if refuted else "guaranteed")
        return save(figure, folder / "loss")


def draw_history(axes: Axes, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Training loss by epoch of each run, the first one's validation loss dashed, tau marked."""
    colours = (MEASURED, BASE, BOUND)
    for (name, rows), colour in zip(runs.items(), colours, strict=False):
        axes.plot([r["epoch"] for r in rows], [r["train_loss"] for r in rows], colour, label=name)
    rows = next(iter(runs.values()))
    held_out = [(r["epoch"], r["val_loss"]) for r in rows if "val_loss" in r]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=GREY, ls="--", label="validation")
    second = [row["epoch"] for row in rows if row["phase"] == 2]
    if second:
        axes.axvline(second[0] - 0.5, color=GREY, lw=0.8, ls=":")
        axes.annotate(
            " tau", (second[0] - 0.5, 0.93), xycoords=("data", "axes fraction"), fontsize=8
        )
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.legend(frameon=False)


def draw_bound(axes: Axes, curve: Sequence[Mapping[str, float]], name: str = "guaranteed") -> None:
    """Measured and guaranteed loss by the steps since tau; name: what the bound is."""
    known = [(p["steps"], p["loss"]) for p in curve if "loss" in p]
    finite = [(p["steps"], p["bound"]) for p in curve if "bound" in p]
    axes.plot(*zip(*finite, strict=True), color=BOUND, ls="--", label=f"{name} (Theorem 1)")
    axes.plot(*zip(*known, strict=True), color=MEASURED, label="measured")
    axes.set(xlabel="steps since tau", ylabel="training loss", yscale="log")
    axes.legend(frameon=False)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write the figure as `stem`.svg and `stem`.png, atomically; the paths."""
    paths = []
    for kind in ("svg", "png"):
        path = stem.with_suffix(f".{kind}")
        metadata = {"Date": None} if kind == "svg" else None
        write_atomically(
            path,
            lambda file, k=kind, m=metadata: figure.savefig(file, format=k, dpi=150, metadata=m),
        )
        paths.append(path)
    return paths
