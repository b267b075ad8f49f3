"""One first phase and the second phases that leave it: the unit of every experiment.

A trunk is named by the hash of its resolved settings. Its folder holds the run folders of the first
phase and of each branch, and, once all are finished, cell.json; then nothing is computed again. A
killed trunk continues from its last checkpoints.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import twophase_ext as tp
from twophase_ext.core.environment import environment_of_run
from twophase_ext.core.files import inside, write_json

from .. import data
from ..assembly import build_model, first
from ..augment import Compose, for_dataset
from ..paper import PAPER_SETTING

SPECTRUM_ROWS = 500  # samples whose sigma_min([h, 1]) is followed: an SVD an epoch
TEST_BATCH = 500
CELL = "cell.json"


@dataclass(frozen=True)
class Trunk:
    """A first phase by the paper's base algorithm, and branches {name: Trainer.branch's changes}.

    n, n_test: the first images of the data set, None for all. width: of PreActResNet18. spectrum:
    follow sigma_min of [h, 1] from epoch to epoch. curves: loss and accuracy on the test images
    after every epoch; nothing is chosen by them.
    """

    data_set: str
    augmentation: bool
    seed: int
    n: int | None
    n_test: int | None
    width: int
    epochs: int
    branches: Mapping[str, Mapping[str, Any]]
    batch_norm: str = "frozen"
    spectrum: bool = False
    curves: bool = False
    setting: Mapping[str, Any] = field(
        default_factory=lambda: {
            name: getattr(PAPER_SETTING, name)
            for name in (
                "batch_size",
                "lr",
                "momentum",
                "weight_decay",
                "wide_ratio",
                "tau_0",
                "delta_0",
            )
        }
    )

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the outcome, as plain data."""
        transform = repr(for_dataset(self.data_set)) if self.augmentation else None
        return {**asdict(self), "transform": transform, "version": tp.build_info()["version"]}

    @property
    def name(self) -> str:
        """The folder: readable, and the hash of `resolved`."""
        text = json.dumps(self.resolved(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        kind = "augmented" if self.augmentation else "plain"
        return f"{self.data_set}-{kind}-seed{self.seed}-{digest}"

    def finished(self, root: Path) -> dict[str, Any] | None:
        """What cell.json holds, None where the trunk is not finished."""
        path = inside(root, f"{self.name}/{CELL}")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def run(self, root: Path, device: torch.device) -> dict[str, Any]:
        """Train what is missing under `root`; what cell.json then holds.

        Raises FileNotFoundError for missing data, KeyboardInterrupt where Ctrl-C ended a run: what
        was done is kept.
        """
        known = self.finished(root)
        if known is not None:
            return known
        train, test, transform = self._data()
        folder = root / self.name
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.iterdir():  # of a run that was killed before its first checkpoint
            if part.is_dir() and not any(part.glob("checkpoint*")):
                shutil.rmtree(part)
        setting = self.setting
        model = build_model(
            "preactresnet18",
            train[0],
            int(train[1].max()) + 1,
            width=self.width,
            wide=tp.nn.wide_units(len(train[0]), setting["wide_ratio"]),
            seed=self.seed,
        ).to(device)
        rule = {name: setting[name] for name in ("lr", "momentum", "weight_decay")}
        watch = Watch(self, folder)
        results = tp.Trainer(
            model,
            optimizer=lambda parameters: tp.optim.SGD(parameters, **rule),
            epochs=self.epochs,
            tau=setting["tau_0"],
            noise_std=setting["delta_0"],
            batch_norm=self.batch_norm,
            batch_size=setting["batch_size"],
            seed=self.seed,
            augment=transform,
            run_dir=folder,
            progress=self.n is None,  # all images: minutes to hours
            callbacks=[watch],
        ).branch(self.branches, train, test if self.curves else None, resume=True)
        watch.clear()
        if any(result.status == "interrupted" for result in results.values()):
            raise KeyboardInterrupt
        cell = {
            "settings": self.resolved(),
            "n": len(train[0]),
            "environment": environment_of_run(device, self.seed),
            "branches": {name: _outcome(result, test) for name, result in results.items()},
            "spectrum": watch.spectrum,
        }
        write_json(folder / CELL, cell)
        for name in ("trunk", *self.branches):  # hundreds of megabytes each at full scale
            for checkpoint in inside(folder, name).glob("checkpoint*"):
                checkpoint.unlink()
        return cell

    def _data(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Compose | None]:
        """Training and test images as the paper feeds them, and the transform."""
        train = first(self.n, *data.load(self.data_set, "train", download=False))
        test = first(self.n_test, *data.load(self.data_set, "test", download=False))
        if not self.augmentation:
            return train, test, None
        if self.data_set != "cifar10":
            return train, test, for_dataset(self.data_set)
        # Inputs are scaled to [0, 1] alone but here (the code that the paper's setting follows).
        pixels = data.as_float(train[0])
        mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))

        def normalised(images: Tensor) -> Tensor:
            return (data.as_float(images) - mean[:, None, None]) / std[:, None, None]

        black = tuple((-mean / std).tolist())
        return (
            (normalised(train[0]), train[1]),
            (normalised(test[0]), test[1]),
            for_dataset(self.data_set, black),
        )


@torch.no_grad()
def test_error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Misclassified images in percent, in evaluation mode."""
    device, wrong = next(model.parameters()).device, 0
    model.eval()
    for x, y in zip(images.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True):
        x = x if x.is_floating_point() else data.as_float(x)
        wrong += int((model(x.to(device)).argmax(1).cpu() != y).sum())
    return 100 * wrong / len(labels)


def _outcome(result: tp.Result, test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """A branch's result as plain data."""
    verdict = None if result.verdict is None else result.verdict.as_dict()
    kept = ("status", "claim", "method", "sigma_min_lower", "sigma_min", "rank", "margin")
    columns = ("epoch", "phase", "train_loss", "seconds", "val_loss", "val_accuracy")
    return {
        "status": result.status,
        "test_error": test_error(result.model, *test) if result.status == "completed" else None,
        "final": result.final,
        "timings": result.timings,
        "history": [
            {key: row[key] for key in columns if row[key] is not None} for row in result.history
        ],
        "verdict": verdict and {key: verdict[key] for key in kept},
        "minimum": result.minimum and result.minimum.as_dict(),
        "curve": getattr(result.guarantee, "curve", []),
    }


class Watch:
    """A line on a terminal while a small trunk is trained, and sigma_min of [h, 1] where asked."""

    def __init__(self, trunk: Trunk, folder: Path) -> None:
        """Continues the spectrum that an earlier, killed run left in `folder`."""
        self.trunk, self.path = trunk, folder / "spectrum.json"
        self.shows = trunk.n is not None and sys.stdout.isatty()
        self.every = max(1, trunk.epochs // 20)
        self.spectrum: dict[str, dict[str, float]] = {}
        if self.path.exists():
            self.spectrum = json.loads(self.path.read_text(encoding="utf-8"))

    def on_epoch_end(self, run: Any, record: Mapping[str, Any]) -> None:
        """Called by the Trainer."""
        epoch, part = record["epoch"] + 1, run.folder.name
        if self.shows:
            loss = record["train_loss"]
            print(f"\r  {part}: epoch {epoch} of {self.trunk.epochs}, loss {loss:.4f}  ", end="")
        last = epoch == self.trunk.epochs
        if self.trunk.spectrum and part not in ("gd", "agd") and (epoch % self.every == 0 or last):
            self.spectrum.setdefault(part, {})[str(epoch)] = smallest_singular_value(run)
            write_json(self.path, self.spectrum)

    def clear(self) -> None:
        """Take the line away."""
        if self.shows:
            print("\r" + " " * 60 + "\r", end="", flush=True)


@torch.no_grad()
def smallest_singular_value(run: Any) -> float:
    """sigma_min of [h, 1] of a run's first SPECTRUM_ROWS samples, evaluation mode, in float64.

    An SVD's value, not a bound: near 1e-16 times the largest one it is rounding.
    """
    modes = {module: module.training for module in run.network.model.modules()}
    run.network.model.eval()
    x = next(run.train.in_order(min(SPECTRUM_ROWS, run.train.n)))[0]
    h = run.network.hidden(x).double()
    for module, mode in modes.items():
        module.training = mode
    return float(torch.linalg.svdvals(torch.cat([h, h.new_ones(len(h), 1)], 1)).min())


def sweep(trunks: list[Trunk], root: Path, device: torch.device) -> list[dict[str, Any]]:
    """Run the trunks in order, a line for each with the time left; what is finished is read.

    Raises KeyboardInterrupt after Ctrl-C, saying how to go on.
    """
    cells, spent, done = [], 0.0, 0
    missing = sum(trunk.finished(root) is None for trunk in trunks)
    if missing < len(trunks):
        print(
            f"{len(trunks) - missing} of {len(trunks)} first phases are finished: read from {root}"
        )
    for i, trunk in enumerate(trunks, 1):
        fresh, began = trunk.finished(root) is None, time.monotonic()
        try:
            cells.append(trunk.run(root, device))
        except KeyboardInterrupt:
            print(f"\nstopped; the same command goes on from here (kept in {root / trunk.name})")
            raise
        if fresh:
            spent, done = spent + time.monotonic() - began, done + 1
            left = spent / done * (missing - done)
            errors = ", ".join(
                f"{name} {branch['test_error']:.2f} %"
                for name, branch in cells[-1]["branches"].items()
                if branch["test_error"] is not None
            )
            print(
                f"[{i}/{len(trunks)}] {trunk.data_set}{', augmented' if trunk.augmentation else ''}"
                f", seed {trunk.seed}: test error {errors}; {time.monotonic() - began:.0f} s, "
                f"about {left / 60:.0f} min left",
                flush=True,
            )
    return cells
