"""The paper's Figures 2 and 3, and two of our own, each with its data as CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twophase_ext.core.files import write_csv
from twophase_ext.ops import softplus

from ..figures import BASE as GREEN
from ..figures import BOUND, GREY, MEASURED, STYLE, draw_bound, save
from ..paper import PAPER_SETTING
from .cells import SPECTRUM_ROWS
from .experiments import BASE, THEOREM, TITLES, TWO_PHASE, Cells, groups

COLOURS = {BASE: (GREEN, "--"), TWO_PHASE: (MEASURED, "-")}


def figure2(folder: Path) -> list[Path]:
    """ReLU against softplus, their difference, and what torch's threshold leaves out (float64)."""
    beta = PAPER_SETTING.beta
    near = torch.linspace(-0.1, 0.1, 801, dtype=torch.float64)
    far = torch.linspace(0.15, 0.3, 1201, dtype=torch.float64)
    rows = []
    for z in torch.cat([near, far]):
        exact, relu = float(softplus(z[None], beta)), max(float(z), 0.0)
        torchs = float(torch.nn.functional.softplus(z, beta))
        rows.append(
            {
                "z": float(z),
                "relu": relu,
                "softplus": exact,
                # log1p(e^-|beta z|) / beta: softplus - relu without the cancellation
                "difference": float(np.log1p(np.exp(-beta * abs(float(z)))) / beta),
                "torch_softplus_minus_relu": torchs - relu,
            }
        )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        small, large = rows[: len(near)], rows[len(near) :]
        left.plot(*_columns(small, "z", "relu"), color=GREEN, ls="--", label="ReLU")
        left.plot(
            *_columns(small, "z", "softplus"), color=MEASURED, label=f"softplus, ς = {beta:g}"
        )
        left.set(xlabel="z", ylabel="activation")
        left.legend(frameon=False)
        middle.plot(*_columns(small, "z", "difference"), color=MEASURED)
        middle.set(xlabel="z", ylabel="softplus − ReLU", yscale="log")
        right.plot(*_columns(large, "z", "difference"), color=MEASURED, label="exact")
        kept = [row for row in large if row["torch_softplus_minus_relu"] > 0]
        right.plot(
            *_columns(kept, "z", "torch_softplus_minus_relu"),
            color=BOUND,
            ls="--",
            label="torch: 0 beyond ςz = 20",
        )
        right.axvline(20 / beta, color=GREY, lw=0.8, ls=":")
        right.set(xlabel="z", ylabel="softplus − z", yscale="log")
        right.legend(frameon=False)
        return [*save(figure, folder / "figure2"), _table(folder / "figure2.csv", rows)]


def figure3(cells: Cells, folder: Path, stem: str) -> list[Path]:
    """Training loss of base and two-phase training by epoch: mean over trials, range, tau."""
    kinds = groups(cells)
    rows: list[dict[str, Any]] = []
    with mpl.rc_context(STYLE):
        figure, panels = _panels(len(kinds))
        for axes, ((data_set, augmented), parts) in zip(panels, kinds.items(), strict=True):
            title = TITLES[data_set] + (", augmented" if augmented else "")
            for name, (colour, dashes) in COLOURS.items():
                runs = [cell["branches"][name]["history"] for _, cell in parts]
                length = min(map(len, runs))  # a run that diverged is shorter
                losses = np.array([[row["train_loss"] for row in run[:length]] for run in runs])
                mean, epochs = losses.mean(0), np.arange(1, length + 1)
                axes.plot(epochs, mean, color=colour, ls=dashes, label=name)
                axes.fill_between(
                    epochs, losses.min(0), losses.max(0), color=colour, alpha=0.2, lw=0
                )
                spread = losses.std(0, ddof=1) if len(runs) > 1 else np.full(length, np.nan)
                rows += [
                    {
                        "data_set": data_set,
                        "augmentation": augmented,
                        "run": name,
                        "epoch": int(epoch),
                        "trials": len(runs),
                        "mean": float(mean[i]),
                        "std": "" if np.isnan(spread[i]) else float(spread[i]),
                        "min": float(losses[:, i].min()),
                        "max": float(losses[:, i].max()),
                    }
                    for i, epoch in enumerate(epochs)
                ]
            phases = [row["phase"] for row in parts[0][1]["branches"][TWO_PHASE]["history"]]
            if 2 in phases:
                _mark_tau(axes, phases.index(2) + 0.5)
            axes.set(title=title, xlabel="epoch", ylabel="training loss", yscale="log")
        _legend(figure, panels[0])
        return [*save(figure, folder / stem), _table(folder / f"{stem}.csv", rows)]


def guarantee_figure(cells: Cells, folder: Path, stem: str) -> list[Path]:
    """Guaranteed against measured loss of second_phase="gd" (Theorem 1 i), a panel a data set."""
    shown = [
        (trunk, cell["branches"][THEOREM]["curve"])
        for trunk, cell in _first_seeds(cells)
        if THEOREM in cell["branches"] and cell["branches"][THEOREM]["curve"]
    ]
    if not shown:
        return []
    with mpl.rc_context(STYLE):
        figure, panels = _panels(len(shown))
        rows = []
        for axes, (trunk, curve) in zip(panels, shown, strict=True):
            draw_bound(axes, curve)
            axes.legend().remove()
            axes.set(title=f"{TITLES[trunk.data_set]}, seed {trunk.seed}")
            rows += [{"data_set": trunk.data_set, "seed": trunk.seed, **point} for point in curve]
        _legend(figure, panels[0])
        return [*save(figure, folder / stem), _table(folder / f"{stem}.csv", rows)]


def spectrum_figure(cells: Cells, folder: Path, stem: str) -> list[Path]:
    """sigma_min of [h, 1] over training: the first phase, then base and two-phase."""
    shown = [(trunk, cell["spectrum"]) for trunk, cell in _first_seeds(cells) if cell["spectrum"]]
    if not shown:
        return []
    with mpl.rc_context(STYLE):
        figure, panels = _panels(len(shown))
        rows = []
        for axes, (trunk, spectrum) in zip(panels, shown, strict=True):
            head = {int(e): s for e, s in spectrum.get("trunk", {}).items()}
            for name, (colour, dashes) in COLOURS.items():
                tail = {int(e): s for e, s in spectrum.get(name, {}).items()}
                points = sorted({**head, **tail}.items())
                axes.plot(*zip(*points, strict=True), color=colour, ls=dashes, label=name)
                rows += [
                    {"data_set": trunk.data_set, "run": name, "epoch": e, "sigma_min": s}
                    for e, s in points
                ]
            if head:
                _mark_tau(axes, max(head) + 0.5)
            m = min(SPECTRUM_ROWS, trunk.n or SPECTRUM_ROWS)
            axes.set(
                title=f"{TITLES[trunk.data_set]}, first {m} samples",
                xlabel="epoch",
                ylabel="σ_min of [h, 1]",
                yscale="log",
            )
        _legend(figure, panels[0])
        return [*save(figure, folder / stem), _table(folder / f"{stem}.csv", rows)]


def _first_seeds(cells: Cells) -> list[tuple[Any, Any]]:
    return [parts[0] for (_, augmented), parts in groups(cells).items() if not augmented]


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    across = min(count, 3)
    down = -(-count // across)
    figure = Figure(figsize=(3.3 * across, 2.7 * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, axes[:count]


def _legend(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, below them: within, it would lie on curves."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _mark_tau(axes: Axes, epoch: float) -> None:
    axes.axvline(epoch, color=GREY, lw=0.8, ls=":")
    axes.annotate(" tau", (epoch, 0.93), xycoords=("data", "axes fraction"), fontsize=8)


def _columns(rows: Sequence[Mapping[str, Any]], *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]


def _table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    write_csv(path, list(rows[0]), rows)
    return path
