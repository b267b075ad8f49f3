"""Base against two-phase training, same epochs, and the guaranteed loss beside the measured one.

    python bench/two_phase.py OUT [--width 16] [--epochs 20] [--n 2048]

PreActResNet18 with the wide softplus layer on MNIST (TWOPHASE_DATA). Each algorithm is a run of its
own from the same initialisation, timed whole, checks and verification included: the base algorithm
to the end (second_phase="none"), and the paper's two phases. From the two-phase run's own tau,
second_phase="gd" shows Theorem 1's bound. The floor, L_floor, is what no weights of any network go
below: 0 lies under a logarithmic axis. Writes OUT.json (every figure of the picture), OUT.svg,
OUT.png, and prints the times.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

import twophase_ext as tp
from twophase import data, figures
from twophase.assembly import build_model
from twophase_ext.core.environment import environment_of_run
from twophase_ext.core.files import write_json

GD_STEPS = 250  # an epoch: a gradient of 2,048 cached rows is cheap
STAGES = ("perturbation", "batch_norm", "verification", "features")


def train(images: torch.Tensor, labels: torch.Tensor, width: int, **settings: Any) -> dict:
    """One timed run: seconds, the loss after each epoch with the time it took so far, stages."""
    wide = tp.nn.wide_units(len(images))
    model = build_model("preactresnet18", images, 10, width=width, wide=wide, seed=1)
    began = time.perf_counter()
    result = tp.Trainer(model, run_dir=False, progress=False, **settings).fit((images, labels))
    seconds = time.perf_counter() - began
    elapsed, curve, at_tau = 0.0, [], sum(result.timings.get(stage, 0.0) for stage in STAGES)
    for record in result.history:
        if record["phase"] == 2 and at_tau:
            elapsed, at_tau = elapsed + at_tau, 0.0
        elapsed += record["seconds"]
        curve.append({"seconds": elapsed, "loss": record["train_loss"], "phase": record["phase"]})
    return {
        "seconds": seconds,
        "curve": curve,
        "timings": result.timings,
        "final": result.final,
        "verdict": None if result.verdict is None else result.verdict.status,
        "floor": result.minimum.floor.lower,
        "bound": result.guarantee.curve,
        "premises": result.guarantee.premises,
    }


def draw(runs: dict[str, dict], stem: Path) -> None:
    """Left: training loss by time. Right: measured and guaranteed loss by steps since tau."""
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(7.6, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        base, two = runs["base"], runs["two-phase"]
        for run, name, colour in (
            (base, "base", figures.BASE),
            (two, "two-phase", figures.MEASURED),
        ):
            points = [(p["seconds"], p["loss"]) for p in run["curve"]]
            left.plot(*zip(*points, strict=True), color=colour)
            left.plot(*points[-1], "o", color=colour, label=f"{name}: {run['seconds']:.0f} s")
        tau = next(p["seconds"] for p in two["curve"] if p["phase"] == 2)
        left.axvline(tau, color=figures.GREY, lw=0.8, ls=":")
        left.annotate(" tau", (tau, 0.93), xycoords=("data", "axes fraction"), fontsize=8)
        left.set(xlabel="seconds", ylabel="training loss", yscale="log", title="the same epochs")
        floor = two["floor"]
        said = f"floor {floor:g}: no weights are below"
        if floor > 0:
            left.axhline(floor, color="black", lw=0.8)
        else:
            left.spines["bottom"].set_linewidth(1.6)
            said = f"{said}, none reach it"
        left.annotate(said, (0.02, 0.03), xycoords="axes fraction", fontsize=7)
        left.set_ylim(bottom=0.3 * min(p["loss"] for run in (base, two) for p in run["curve"]))
        left.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.9))
        figures.draw_bound(right, runs["gd"]["bound"])
        right.set(title='second_phase="gd"')
        figures.save(figure, stem)


def main() -> int:
    """Run, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, value in (("width", 16), ("epochs", 20), ("n", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    images, labels = data.load("mnist", "train", download=False)
    images, labels = images[: options.n], labels[: options.n]
    common = {"epochs": options.epochs, "tau": 0.6}
    runs = {
        "base": train(images, labels, options.width, second_phase="none", **common),
        "two-phase": train(images, labels, options.width, **common),
    }
    gd = {"second_phase": "gd", "gd": {"steps": GD_STEPS}, "verify": False}
    runs["gd"] = train(images, labels, options.width, **gd, **common)
    ratio = runs["two-phase"]["seconds"] / runs["base"]["seconds"]
    write_json(
        options.out.with_suffix(".json"),
        {
            "options": {k: v for k, v in vars(options).items() if k != "out"},
            "environment": environment_of_run(torch.device("cpu"), 1),
            "ratio": ratio,
            "runs": runs,
        },
    )
    draw(runs, options.out)
    print(json.dumps({name: round(run["seconds"], 1) for name, run in runs.items()}))
    print(f"two-phase / base: {ratio:.3f}")
    print({name: run["timings"] for name, run in runs.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
