"""Second phases over features of trained small CNNs: passes, seconds, test loss.

    python bench/trained_features.py OUT.json [--n 2000] [--epochs 4]

For MNIST, Fashion-MNIST and CIFAR-10 (TWOPHASE_DATA): SmallConvNet of width 8 with 1.1 n softplus
units, trained on the first n images by SGD (rate 0.01, momentum 0.9, batches of 64) for some epochs
(tau). From there on features are fixed, and the last layer is trained on by

- plain acceleration: "agd" with `damping=None`, 1,000 passes; its training loss is the goal,
- "agd" as it comes (damping 0.1) and with damping 1, to that loss,
- "base": the same SGD on the cached features, for 200 epochs.

The test loss is measured after every pass, outside of the seconds; its least value counts, and the
seconds to the pass that had it.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from damping import Rows, metric_of
from torch import Tensor, nn

import twophase_ext as tp
from twophase import data, models
from twophase_ext.core.environment import environment_of_run
from twophase_ext.core.files import write_json
from twophase_ext.core.seeds import epoch_order
from twophase_ext.training.steps.accelerated import Iterate

PLAIN, EPOCHS, MOST = 1000, 200, 400
SGD = {"lr": 0.01, "momentum": 0.9}


def trained(name: str, n: int, epochs: int) -> tuple[Rows, Rows, nn.Linear]:
    """(features of the training images, of test images, the last layer) at tau."""
    torch.manual_seed(0)
    images, labels = (part[:n] for part in data.load(name, "train", download=False))
    test = data.load(name, "test", download=False)
    x = data.as_float(images)
    model = models.SmallConvNet(x.shape[1], 10, width=8, wide=tp.nn.wide_units(n))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    for epoch in range(epochs):
        for index in epoch_order(0, epoch, n).split(64):
            loss = F.cross_entropy(model(x[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    last = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    found: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    sides = []
    with torch.no_grad():
        for part, y in ((images, labels), (test[0][:5000], test[1][:5000])):
            found.clear()
            for some in part.split(500):
                model(data.as_float(some))
            sides.append(Rows(torch.cat(found), y.long()))
    hook.remove()
    return sides[0], sides[1], last


def accelerated(train: Rows, last: nn.Linear, damping: float | None) -> Iterator[Tensor]:
    """[weight, bias] in float64 after every pass."""
    start = torch.cat([last.weight, last.bias[:, None]], 1).detach().double()
    side = metric_of(train, damping, last)
    place = Iterate(side.zeros(), side.zeros())
    while True:
        place.advance(side)
        yield start + side.displacement(place.x)[0]


def base(train: Rows, last: nn.Linear) -> Iterator[Tensor]:
    """The same after every epoch of SGD on the features."""
    own = nn.Linear(last.in_features, last.out_features)
    own.load_state_dict(last.state_dict())
    optimizer = torch.optim.SGD(own.parameters(), **SGD)
    epoch = 0
    while True:
        for index in epoch_order(1, epoch, train.n).split(64):
            loss = F.cross_entropy(own(train.h[index]), train.y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        epoch += 1
        yield torch.cat([own.weight, own.bias[:, None]], 1).detach().double()


def measured(train: Rows, test: Rows, way: Iterator[Tensor], most: int, goal: float) -> dict:
    """Of `most` passes, or as many as reach the goal."""
    sides, seconds, best = [(s.h.double(), s.y) for s in (train, test)], 0.0, (float("inf"), 0, 0.0)
    for passes in range(1, most + 1):
        began = time.perf_counter()
        moved = next(way)
        seconds += time.perf_counter() - began
        with torch.no_grad():
            losses = [
                float(F.cross_entropy(F.linear(h, moved[:, :-1], moved[:, -1]), y))
                for h, y in sides
            ]
        best = min(best, (losses[1], passes, seconds))
        if losses[0] <= goal:
            break
    own = {"passes": passes, "seconds": seconds, "train_loss": losses[0]}
    return own | dict(zip(("least_test_loss", "at", "seconds_to_it"), best, strict=True))


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    print("| data | method | passes | training loss | s | least test loss, at pass, after s |")
    print(f"|{'---|' * 6}")
    kept = []
    for name in ("mnist", "fashion-mnist", "cifar10"):
        train, test, last = trained(name, options.n, options.epochs)
        goal = 0.0
        for method, way, most in (
            ("plain acceleration", accelerated(train, last, None), PLAIN),
            ("agd, damping 0.1", accelerated(train, last, 0.1), MOST),
            ("agd, damping 1", accelerated(train, last, 1.0), MOST),
            ("base", base(train, last), EPOCHS),
        ):
            found = measured(train, test, way, most, goal if method.startswith("agd") else 0.0)
            goal = goal or found["train_loss"]
            kept.append({"data": name, "method": method} | found)
            print(
                f"| {name} | {method} | {found['passes']} | {found['train_loss']:.3g} "
                f"| {found['seconds']:.2f} | {found['least_test_loss']:.4f}, {found['at']}, "
                f"{found['seconds_to_it']:.2f} |",
                flush=True,
            )
    environment = environment_of_run(torch.device("cpu"), 0)
    write_json(options.out, {"n": options.n, "environment": environment, "rows": kept})
    return 0


if __name__ == "__main__":
    sys.exit(main())
