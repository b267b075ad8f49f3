"""What the damping of second_phase="agd" does: passes to a training loss, and the test loss there.

    python bench/damping.py OUT [--n 2000] [--width 2200] [--most 1500]

Softplus features (beta = 100, torch's default weights, seed 0) of the first n MNIST images
(TWOPHASE_DATA), cross-entropy, the last layer from 0; every row is the method of "agd" to a loss of
1e-3 or for so many steps, measured on the 10,000 test images. Then the same with other widths, to
the same training loss: where m_H is near n, the test loss without damping has its peak, the double
descent of Belkin, Hsu, Ma & Mandal (2019). Writes OUT.json and OUT.svg, prints two tables.
"""

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import twophase_ext as tp
from twophase import data, figures
from twophase_ext.core.environment import environment_of_run
from twophase_ext.core.files import write_json
from twophase_ext.model.losses import CROSS_ENTROPY
from twophase_ext.theory.guarantee import smoothness
from twophase_ext.training.steps.accelerated import Iterate
from twophase_ext.training.steps.metric import Problem, Side
from twophase_ext.training.steps.sides import made

DAMPINGS = (0.0, 1e-3, 1e-2, 0.1, 1.0, 10.0, None)
WIDTHS, WITH, ENOUGH = (250, 500, 1000, 1500, 2000, 2500, 3500, 5000, 8000), (0.0, 0.1), 150
TARGET = 1e-3
MEASURED = sorted({round(1.12**k) for k in range(80)})  # steps at which the test loss is measured


class Rows:
    """Features and labels as the metric reads them."""

    def __init__(self, h: Tensor, y: Tensor) -> None:
        """h [n, m], y [n]."""
        self.h, self.y, self.n = h, y, len(h)

    def in_order(self, size: int):
        """Batches of rows."""
        return zip(self.h.split(size), self.y.split(size), strict=True)


def problem(n: int, width: int) -> tuple[Rows, Rows]:
    """Softplus features of MNIST images: training and test."""
    torch.manual_seed(0)
    wide, found = nn.Linear(784, width), []
    for split in ("train", "test"):
        images, labels = data.load("mnist", split, download=False)
        x, y = data.as_float(images).flatten(1), labels.long()
        x, y = (x[:n], y[:n]) if split == "train" else (x, y)
        with torch.no_grad():
            found.append(Rows(tp.softplus(wide(x), 100.0), y))
    return found[0], found[1]


def metric_of(train: Rows, damping: float | None, layer: nn.Linear | None = None) -> Side:
    """The side of M that "agd" steps on, from the last layer given or one of zeros."""
    if layer is None:
        layer = nn.Linear(train.h.shape[1], 10)
        for p in layer.parameters():
            nn.init.zeros_(p)
    norms = (train.h.double().square().sum(1) + 1).sqrt()
    largest = 1.0
    if damping is None:
        largest = smoothness(lambda: train.in_order(256), loss=CROSS_ENTROPY)
    start = [layer.weight, layer.bias]
    return made(Problem(train, start, layer, CROSS_ENTROPY, norms, largest, damping))


@torch.no_grad()
def run(train: Rows, test: Rows, damping: float | None, most: int) -> dict:
    """Steps to the target: training loss, test loss and accuracy on the way."""
    side, curve = metric_of(train, damping), []
    place = Iterate(side.zeros(), side.zeros())
    held_out = test.h.double()
    while place.steps < most:
        loss = place.advance(side)
        if place.steps in MEASURED or loss <= TARGET or place.steps == most:
            moved, _ = side.displacement(place.x)
            outputs = F.linear(held_out, moved[:, :-1], moved[:, -1])
            own = F.linear(train.h.double(), moved[:, :-1], moved[:, -1])
            curve.append(
                {
                    "steps": place.steps,
                    "train_loss": float(F.cross_entropy(own, train.y)),
                    "test_loss": float(F.cross_entropy(outputs, test.y)),
                    "test_accuracy": float((outputs.argmax(1) == test.y).double().mean()),
                }
            )
            if curve[-1]["train_loss"] <= TARGET:
                break
    return {"damping": damping, "curve": curve}


def by_width(n: int) -> list[dict]:
    """The end of the way to the target, for widths and dampings."""
    found = []
    for width in WIDTHS:
        train, test = problem(n, width)
        for damping in WITH:
            last = run(train, test, damping, ENOUGH)["curve"][-1]
            found.append({"width": width, "damping": damping} | last)
            print(
                f"| {width} | {damping} | {last['steps']} | {last['train_loss']:.2e} "
                f"| {last['test_loss']:.3g}, {100 * last['test_accuracy']:.1f} % |",
                flush=True,
            )
    return found


def draw(runs: list[dict], widths: list[dict], n: int, stem: Path) -> None:
    """Training and test loss by the steps made; test loss at the target by width."""
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(9.6, 3.0), layout="constrained")
        axes = figure.subplots(1, 3)
        colours = mpl.colormaps["viridis"].resampled(len(runs))
        for k, found in enumerate(runs):
            name = "none (plain)" if found["damping"] is None else f"{found['damping']:g}"
            style = {"color": figures.BOUND, "ls": "--"} if found["damping"] is None else {}
            style = style or {"color": colours(k)}
            steps = [p["steps"] for p in found["curve"]]
            for side, key in zip(axes[:2], ("train_loss", "test_loss"), strict=True):
                side.plot(steps, [p[key] for p in found["curve"]], label=name, **style)
        axes[0].set(xlabel="steps", ylabel="training loss", xscale="log", yscale="log")
        axes[1].set(xlabel="steps", ylabel="test loss", xscale="log", yscale="log")
        axes[1].legend(title="damping", frameon=False, fontsize=7, title_fontsize=7)
        for damping in WITH:
            points = [(p["width"], p["test_loss"]) for p in widths if p["damping"] == damping]
            colour = colours(DAMPINGS.index(damping))
            axes[2].plot(*zip(*points, strict=True), "o-", ms=3, color=colour, label=f"{damping:g}")
        axes[2].axvline(n, color=figures.GREY, lw=0.8, ls=":")
        axes[2].annotate(" m_H = n", (n, 0.93), xycoords=("data", "axes fraction"), fontsize=8)
        axes[2].set(xlabel="m_H", ylabel="test loss at 1e-3", xscale="log", yscale="log")
        ticks = (250, 500, 1000, 2000, 8000)
        axes[2].set_xticks(ticks, [f"{width:,}" for width in ticks])
        axes[2].minorticks_off()
        axes[2].legend(title="damping", frameon=False, fontsize=7, title_fontsize=7)
        figures.save(figure, stem)


def main() -> int:
    """Run, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, value in (("n", 2000), ("width", 2200), ("most", 1500)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    train, test = problem(options.n, options.width)
    print("| damping | steps | training loss | test loss, accuracy | least test loss, at step |")
    print("|---|---|---|---|---|")
    runs = []
    for damping in DAMPINGS:
        runs.append(run(train, test, damping, options.most))
        last = runs[-1]["curve"][-1]
        best = min(runs[-1]["curve"], key=lambda p: p["test_loss"])
        print(
            f"| {damping} | {last['steps']} | {last['train_loss']:.2e} | {last['test_loss']:.3g}, "
            f"{100 * last['test_accuracy']:.1f} % | {best['test_loss']:.3f}, {best['steps']} |",
            flush=True,
        )
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    environment = environment_of_run(torch.device("cpu"), 0)
    print(
        "\n| m_H | damping | steps | training loss | test loss, accuracy |\n|---|---|---|---|---|"
    )
    widths = by_width(options.n)
    kept = {"options": settings, "environment": environment, "runs": runs, "widths": widths}
    write_json(options.out.with_suffix(".json"), kept)
    draw(runs, widths, options.n, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
