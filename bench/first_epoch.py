"""An epoch of the first phase: tp.Trainer beside loops that a user of PyTorch would write.

    python bench/first_epoch.py [N WIDTH BATCH]

N of MNIST's training images (TWOPHASE_DATA names their folder), PreActResNet18 of WIDTH channels,
batches of BATCH (64), momentum SGD with weight decay. The loops hold the data in one tensor and
step with torch's fused SGD: with torch.nn.Softplus(100) and with ReLU in place (another network,
the cheapest activation there is), as they are and in channels_last. Each in a process of its own,
in turns; seconds of the second epoch, median of three; MiB that the process grew by beyond the
data. Part of these are pieces of freed memory that the C library keeps: with
MALLOC_MMAP_THRESHOLD_=65536 in the environment it keeps none, everything is slower, and the MiB
are what was in use.
"""

import json
import resource
import subprocess
import sys
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from twophase.data import as_float, load
from twophase.models import PreActResNet18

EPOCHS, ROUNDS = 2, 3
RULE = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5}
LOOPS = {
    "torch.nn.Softplus": (lambda: nn.Softplus(100.0), False),
    "torch.nn.Softplus, channels_last": (lambda: nn.Softplus(100.0), True),
    "ReLU in place": (lambda: nn.ReLU(inplace=True), False),
    "ReLU in place, channels_last": (lambda: nn.ReLU(inplace=True), True),
}
OURS = "tp.Trainer"


def loop(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int) -> list[float]:
    """Seconds of each epoch."""
    optimizer, took = torch.optim.SGD(model.parameters(), fused=True, **RULE), []
    for _ in range(EPOCHS):
        began = time.perf_counter()
        for i in torch.randperm(len(x)).split(batch):
            loss = F.cross_entropy(model(x[i]), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        took.append(time.perf_counter() - began)
    return took


def one(name: str, n: int, width: int, batch: int) -> dict[str, float]:
    """Seconds of the last epoch and the growth of the process's peak, in MiB."""
    images, labels = load("mnist", "train", download=False)
    x, y = as_float(images[:n]), labels[:n].long()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    wide = {"width": width, "wide": tp.nn.wide_units(1000)}
    if name == OURS:
        trainer = tp.Trainer(
            PreActResNet18(1, 10, **wide),
            optimizer=lambda parameters: tp.optim.SGD(parameters, **RULE),
            epochs=EPOCHS,
            batch_size=batch,
            second_phase="none",
            verify=False,
            run_dir=False,
            progress=False,
        )
        took = [row["seconds"] for row in trainer.fit((x, y)).history]
    else:
        activation, last = LOOPS[name]
        model = PreActResNet18(1, 10, activation=activation, **wide)
        if last:
            model, x = model.to(memory_format=torch.channels_last), channels_last(x)
        took = loop(model, x, y, batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": took[-1], "MiB": (peak - before) / 1024}


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """A copy with these strides, of one channel too."""
    return torch.empty(x.shape, memory_format=torch.channels_last).copy_(x)


def main() -> None:
    """See the module."""
    given = sys.argv[1:4]
    n, width, batch = (int(word) for word in given + ["6000", "16", "64"][len(given) :])
    if len(sys.argv) > 4:
        print(json.dumps(one(sys.argv[4], n, width, batch)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (OURS, *LOOPS)}
    for _ in range(ROUNDS):
        for name, runs in found.items():
            words = [sys.executable, __file__, str(n), str(width), str(batch), name]
            told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            runs.append(json.loads(told))
    middle = {
        name: {k: median(r[k] for r in runs) for k in runs[0]} for name, runs in found.items()
    }
    print(f"{n:,} images, width {width}, batch {batch}, {torch.get_num_threads()} threads")
    print("x: over tp.Trainer's")
    for name, row in middle.items():
        times = {key: row[key] / middle[OURS][key] for key in row}
        print(
            f"{name}: {row['seconds']:.2f} s, {row['MiB']:.0f} MiB; "
            f"{times['seconds']:.2f} x the time, {times['MiB']:.2f} x the memory"
        )


if __name__ == "__main__":
    main()
