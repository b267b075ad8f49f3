"""The whole second phase in two processes of one thread against one process of two threads.

    python bench/several_processes.py [--out OUT.json] [--samples 4096] [--width 8] [--rounds 3]

PreActResNet18 with the wide softplus layer of ceil(1.1 n) units on MNIST (TWOPHASE_DATA), one epoch
of the first phase, then ten of the second: BatchNorm's statistics, features, epochs, evaluation.
The runs alternate; printed are medians of the seconds from tau to the end, as the Trainer's own
timings of rank 0 have them. bench_ranks.py has the bare epoch over features that are there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import twophase_ext as tp
from twophase import data
from twophase.assembly import build_model
from twophase_ext.core.environment import environment_of_run
from twophase_ext.core.files import write_json

STAGES = ("perturbation", "batch_norm", "features", "second_phase", "evaluation")


def run(n: int, width: int) -> None:
    """In a child: the stages' seconds as JSON, by rank 0."""
    images, labels = (part[:n] for part in data.load("mnist", "train"))
    model = build_model("preactresnet18", images, 10, width=width, wide=tp.nn.wide_units(n), seed=1)
    trainer = tp.Trainer(model, epochs=11, tau=1, verify=False, run_dir=False, progress=False)
    result = trainer.fit((images, labels))
    if int(os.environ.get("RANK", 0)) == 0:
        loss = result.final["train_loss"]
        print(json.dumps({"loss": loss} | {s: result.timings.get(s, 0.0) for s in STAGES}))


def timed(processes: int, threads: int, n: int, width: int) -> dict[str, float]:
    """One run in that many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start = torchrun if processes > 1 else []
    own = [__file__, "--samples", str(n), "--width", str(width), "--child"]
    found = subprocess.run(
        [sys.executable, *start, *own],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run(options.samples, options.width)
    kinds = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for _ in range(options.rounds):
        for name, (processes, threads) in kinds.items():
            runs[name].append(timed(processes, threads, options.samples, options.width))
    totals = {
        name: statistics.median(sum(r[s] for s in STAGES) for r in found)
        for name, found in runs.items()
    }
    for name, found in runs.items():
        stages = ", ".join(f"{s} {statistics.median(r[s] for r in found):.2f}" for s in STAGES)
        print(f"{name}: {totals[name]:.2f} s ({stages}), loss {found[0]['loss']:.6f}")
    one, two = totals.values()
    print(f"2 processes / 1 process: {two / one:.3f}")
    if options.out is not None:
        setting = {
            "n": options.samples,
            "width": options.width,
            "wide": tp.nn.wide_units(options.samples),
        }
        machine = environment_of_run(torch.device("cpu"), 1)
        write_json(options.out, {"setting": setting, "runs": runs, "environment": machine})


if __name__ == "__main__":
    main()
