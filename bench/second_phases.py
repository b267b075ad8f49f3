"""The second phases beside scikit-learn and LAPACK, and what their guarantees cost.

    python bench/second_phases.py OUT.json [logistic] [wide] [squares] [bounds] [guarantee]

Seconds are CPU seconds of one thread (OMP_NUM_THREADS=1, OPENBLAS_NUM_THREADS=1), which a busy
machine changes little; ours and the baseline in turn, everything included from float32 features in
memory on. Softplus features (beta = 100, torch's default weights, seed 0) of the first MNIST images
(TWOPHASE_DATA).

logistic   20,000 x 512, cross-entropy: "exact" to the loss of scikit-learn's lbfgs after 100 and
           400 iterations, without penalty
wide       4,096 x 66,000: "exact" to a loss of 1e-3, and lbfgs after 30 and 150 iterations
squares    5,000 x 2,000, squared error: "exact" beside LAPACK's gels
bounds     the bound of "agd" above every measured loss: 20 random problems, 10 real ones
guarantee  seconds of the guarantee by those of its phase, for every phase with one
"""

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn import datasets
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import twophase_ext as tp
from twophase import data
from twophase_ext.core.environment import environment_of_run
from twophase_ext.core.files import write_json
from twophase_ext.model.losses import CROSS_ENTROPY
from twophase_ext.training.steps.least_squares import least_squares
from twophase_ext.training.steps.metric import Problem
from twophase_ext.training.steps.quasi_newton import QuasiNewton
from twophase_ext.training.steps.sides import made

SHAPES = ((3000, 64), (8000, 512), (1000, 1100), (2000, 2200), (300, 4000))
MODES = ("gd", "sgd", "agd", "exact")


class Rows:
    """Features and labels as the metric reads them."""

    def __init__(self, h: Tensor, y: Tensor) -> None:
        """h [n, m], y [n]."""
        self.h, self.y, self.n = h, y, len(h)

    def in_order(self, size: int):
        """Batches of rows."""
        return zip(self.h.split(size), self.y.split(size), strict=True)


def pixels(n: int, width: int) -> Rows:
    """Softplus features of MNIST images."""
    images, labels = data.load("mnist", "train", download=False)
    torch.manual_seed(0)
    wide = nn.Linear(784, width)
    with torch.no_grad():
        h = tp.softplus(wide(data.as_float(images[:n]).flatten(1)), 100.0)
    return Rows(h, labels[:n].long())


def seconds(call):
    """(what the call returns, its CPU seconds)."""
    started = time.process_time()
    return call(), time.process_time() - started


@torch.no_grad()
def minimum(rows: Rows, target: float):
    """ "exact" from a last layer of zeros to a loss: (weights [k, p], iterations)."""
    layer = nn.Linear(rows.h.shape[1], 10)
    for p in layer.parameters():
        nn.init.zeros_(p)
    norms = (rows.h.double().square().sum(1) + 1).sqrt()
    start = [layer.weight, layer.bias]
    side = made(Problem(rows, start, layer, CROSS_ENTROPY, norms, 1.0, 0.1))
    found = QuasiNewton(side, side.zeros()).run(1000, lambda value, *_: value <= target)
    return side.displacement(found.at)[0], found.iterations


def loss_of(rows: Rows, weight: Tensor, bias: Tensor) -> float:
    """Mean cross-entropy in float64."""
    outputs = [F.linear(h.double(), weight, bias) for h in rows.h.split(256)]
    return float(F.cross_entropy(torch.cat(outputs), rows.y))


def lbfgs(rows: Rows, iterations: int):
    """scikit-learn's, without penalty: (loss, CPU seconds)."""
    model = LogisticRegression(penalty=None, max_iter=iterations, tol=1e-30)
    _, spent = seconds(lambda: model.fit(rows.h.numpy(), rows.y.numpy()))
    weight, bias = (torch.from_numpy(part).double() for part in (model.coef_, model.intercept_))
    return loss_of(rows, weight, bias), spent


def beside_lbfgs(rows: Rows, iterations: int, rounds: int) -> dict:
    """Medians of both, in turn, to the loss that lbfgs has reached."""
    theirs, ours, found = [], [], {"iterations of lbfgs": iterations}
    for _ in range(rounds):
        value, spent = lbfgs(rows, iterations)
        theirs.append(spent)
        (weight, steps), spent = seconds(partial(minimum, rows, value))
        ours.append(spent)
        own = loss_of(rows, weight[:, :-1], weight[:, -1])
        found |= {"loss of lbfgs": value, "loss of exact": own, "iterations of exact": steps}
    found |= {"lbfgs": statistics.median(theirs), "exact": statistics.median(ours)}
    return found | {"times": found["lbfgs"] / found["exact"]}


def logistic() -> list[dict]:
    """20,000 x 512."""
    rows = pixels(20000, 512)
    return [beside_lbfgs(rows, iterations, rounds) for iterations, rounds in ((100, 3), (400, 1))]


def wide() -> Iterator[dict]:
    """4,096 x 66,000."""
    rows = pixels(4096, 66000)
    h = rows.h
    _, product = seconds(lambda: h @ h[:256].T)
    (weight, steps), spent = seconds(partial(minimum, rows, 1e-3))
    own = loss_of(rows, weight[:, :-1], weight[:, -1])
    yield {"half of h h^T in float32": product * len(h) / 512}
    yield {"exact": spent, "iterations": steps, "loss": own}
    for iterations in (30, 150):
        value, spent = lbfgs(rows, iterations)
        yield {"lbfgs": spent, "iterations": iterations, "loss": value}


def squares() -> list[dict]:
    """5,000 x 2,000."""
    torch.manual_seed(0)
    x, y = torch.randn(5000, 50), torch.randn(5000, 3).double()
    with torch.no_grad():
        h = tp.softplus(x @ torch.randn(50, 2000) / 7, 10.0)
    m = torch.cat([h.double(), torch.ones(5000, 1).double()], 1)
    ours, theirs, over = [], [], 0.0
    for _ in range(3):
        known, spent = seconds(lambda: torch.linalg.lstsq(m, y, driver="gels").solution)
        theirs.append(spent)
        (found, _), spent = seconds(lambda: least_squares(m, y))
        ours.append(spent)
        over = float(((m @ found - y).square().sum() - (m @ known - y).square().sum()) / 5000)
    times = statistics.median(ours) / statistics.median(theirs)
    found = {"exact": statistics.median(ours), "gels": statistics.median(theirs)}
    return [found | {"by gels": times, "loss above gels": over}]


def trained(x: Tensor, y: Tensor, mode: str, width: int, beta: float = 1.0, **settings):
    """A run of two small layers and a wide one."""
    torch.manual_seed(0)
    classes = int(y.max()) + 1 if y.dim() == 1 and not y.is_floating_point() else y.shape[1]
    model = nn.Sequential(
        *(nn.Linear(x.shape[1], 32), tp.nn.Softplus(beta)),
        *(nn.Linear(32, width), tp.nn.Softplus(beta), nn.Linear(width, classes)),
    )
    loss = "mse" if y.is_floating_point() else "cross_entropy"
    settings = {"epochs": 20, "tau": 0.5, "verify": False, "lr": 0.01, **settings}
    lr = settings.pop("lr")
    trainer = tp.Trainer(
        model,
        loss=loss,
        second_phase=mode,
        optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
        run_dir=False,
        progress=False,
        **settings,
    )
    return trainer.fit((x, y))


def real() -> list[tuple[str, Tensor, Tensor]]:
    """Ten data sets: columns standardised; images in [0, 1], the first 400."""
    found = []
    for name in ("iris", "wine", "digits", "breast_cancer", "diabetes", "linnerud"):
        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        x, y = torch.as_tensor(x).float()[:400], torch.as_tensor(y)[:400]
        x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
        if name in ("diabetes", "linnerud"):
            y = y.float().view(len(y), -1)
            y = (y - y.mean(0)) / y.std(0)
        found.append((name, x, y))
    for name, split in (
        *(("mnist", "train"), ("fashion-mnist", "train")),
        *(("cifar10", "train"), ("fashion-mnist", "test")),
    ):
        images, labels = data.load(name, split, download=False)
        x, y = data.as_float(images[:400]).flatten(1), labels[:400].long()
        found.append((f"{name} {split}", x, y))
    return found


def bounds() -> list[dict]:
    """agd: how near its bound comes, and whether any loss lies above it."""
    problems = real()
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        n = int(torch.randint(40, 400, (), generator=g))
        x = torch.randn(n, 10, generator=g)
        targets = x[:, :4] + torch.randn(n, 4, generator=g)
        problems.append((f"random {seed}", x, targets.argmax(1) if seed % 2 else targets))
    found = []
    for name, x, y in problems:
        result = trained(x, y, "agd", math.ceil(1.1 * len(x)), epochs=30)
        curve = [p for p in result.guarantee.curve if p["steps"]]
        ratios = [p["bound"] / p["loss"] for p in curve]
        found.append(
            {
                "set": name,
                "n": len(x),
                "loss": curve[-1]["loss"],
                "bound": curve[-1]["bound"],
                "closest": min(ratios),
                "above": all(p["loss"] <= p["bound"] for p in curve),
            }
        )
    return found


def guarantee() -> Iterator[dict]:
    """Seconds of the guarantee by those of the phase: its epochs, constants and factorization."""
    for n, width in SHAPES:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(n, 20, generator=g)
        y = (x[:, :10] + torch.randn(n, 10, generator=g)).argmax(1)
        for mode in MODES:
            spent = []
            for epochs in (2, 20):
                times = trained(x, y, mode, width, epochs=epochs).timings
                phase = sum(
                    times.get(s, 0) for s in ("second_phase", "smoothness", "factorization")
                )
                spent.append(times["guarantee"] / phase)
            keys = {"n": n, "width": width, "phase": mode}
            yield keys | {"after 1 epoch": spent[0], "after 10 epochs": spent[1]}


PARTS = {f.__name__: f for f in (logistic, wide, squares, bounds, guarantee)}


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kept = {"environment": environment_of_run(torch.device("cpu"), 0)}
    for name in options.parts:
        kept[name] = []
        for row in PARTS[name]():
            kept[name].append(row)
            shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"{name}: {', '.join(shown)}", flush=True)
            write_json(options.out, kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
