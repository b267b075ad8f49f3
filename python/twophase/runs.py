"""twophase demo and train: a run of the Trainer, its folder, picture and report."""

import os
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import twophase_ext as tp
from twophase_ext.core.files import write_atomically
from twophase_ext.model.groups import groups_of
from twophase_ext.training.distributed.ranks import joined

from . import data
from .assembly import DataName, build_model, first
from .figures import run_figure
from .loggers import make_logger
from .report import write_report
from .verification import draw_culprits


class SaveOptions:
    """Writes the command's resolved options into the run folder when training starts."""

    def __init__(self, text: str) -> None:
        """text: YAML that --config reads back."""
        self.text = text

    def on_fit_start(self, run: object) -> None:
        """Called by the Trainer."""
        folder = run.folder  # type: ignore[attr-defined]
        if folder is not None:
            write_atomically(folder / "options.yaml", lambda f: f.write(self.text.encode()))


def demo(
    data_name: Literal["images", "iris"] = "images",
    run_dir: str | None = None,
    epochs: int = 20,
    seed: int = 1,
    progress: bool = True,
    callbacks: tuple = (),
) -> int:
    """Train a small softplus network in two phases on real data and verify its condition.

    Images: MNIST (2,000) where TWOPHASE_DATA points to it, scikit-learn's digits otherwise. Iris:
    150 flowers, one of them measured twice.

    Args:
        data_name: images or iris.
        run_dir: the run's folder; a new one under runs/ by default.
        epochs: epochs in all; the second phase begins at 60 % of them.
        seed: seed of every random stream.
        progress: print what happens.
        callbacks: passed to the Trainer (not on the command line).
    """
    name, x, labels, test = _demo_data(data_name)
    wide = tp.nn.wide_units(int(groups_of(x).max()) + 1)
    kind = "small" if data_name == "images" else "mlp"
    model = build_model(kind, x, int(labels.max()) + 1, width=8, wide=wide, seed=seed)
    trainer = tp.Trainer(
        model,
        epochs=epochs,
        seed=seed,
        second_phase="agd",
        run_dir=run_dir,
        progress=progress,
        callbacks=callbacks,
    )
    if progress:
        print(
            f"Two-phase training of a small softplus network on {name}:\n"
            f"first phase {trainer.config.tau_epoch} epochs on all layers, then Gaussian noise on "
            f"the hidden layers,\nthen only the last layer, over {wide} fixed features (1.1 for "
            "each distinct input), by\naccelerated gradient steps with a guarantee.\n"
        )
    result = trainer.fit((x, labels), test)
    if progress:
        print(f"\n{result}")
        _draw(result)
    _report(result, progress)
    if progress:
        _explain(result)
        print(f"\n{result.minimum}" if result.minimum else "")
    return _exit_code(result.status)


def _demo_data(name: str) -> tuple[str, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """(what it is, inputs, labels, test set) of the demo."""
    if name == "iris":
        from sklearn.datasets import load_iris

        values, kinds = load_iris(return_X_y=True)
        x = torch.from_numpy((values - values.mean(0)) / values.std(0)).float()
        return "iris, 150 flowers", x, torch.from_numpy(kinds).long(), None
    try:
        images, labels = data.load("mnist", "train", download=False)
        test = data.load("mnist", "test", download=False)
        return "2,000 MNIST images", images[:2000], labels[:2000], test
    except FileNotFoundError:
        images, labels = data.load("digits", "train")
        what = f"{len(images):,} images of scikit-learn's digits"
        return what, images, labels, data.load("digits", "test")


def train(
    data_name: DataName = "digits",
    model: str = "small",
    n: int | None = None,
    width: int = 8,
    ratio: float = 1.1,
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy",
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-5,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    device: str = "auto",
    seed: int = 1,
    resume: bool | Literal["auto"] = False,
    logger: Literal["tensorboard", "wandb"] | None = None,
    progress: bool = True,
    callbacks: tuple = (),
    **settings: Any,
) -> int:
    """Train a model in two phases and leave a run folder.

    Args:
        data_name: data set; read from TWOPHASE_DATA or downloaded.
        model: mlp, small, preactresnet18, or package.module:callable of your own.
        n: train on the first n samples only.
        width: channels (or units) of the built-in models' hidden layers.
        ratio: the wide last hidden layer has ceil(ratio * n) units; 0 adds none.
        loss: squared_error trains on one-hot targets.
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD.
        optimizer: a class of torch.optim (and --optimizer.lr ...) in the place of SGD with lr,
            momentum and weight_decay.
        device: auto is CUDA where there is one, else the CPU.
        seed: seed of every random stream.
        resume: continue the run in run_dir; auto begins it where there is none yet.
        logger: log each epoch there too, beside metrics.csv; wandb is offline unless WANDB_MODE
            says otherwise.
        progress: print what happens.
        callbacks: passed to the Trainer (not on the command line).
        **settings: the Trainer's other arguments.
    """
    ranks = joined()
    progress = progress and ranks.rank == 0
    log = None if logger is None or ranks.rank else make_logger(logger)
    images, labels = data.load(data_name, "train")
    test_images, test_labels = data.load(data_name, "test")
    classes = int(labels.max()) + 1
    images, labels = first(n, images, labels)
    wide = tp.nn.wide_units(len(images), ratio) if ratio > 0 else 0
    network = build_model(model, images, classes, width=width, wide=wide, seed=seed)
    if device == "auto":
        own = "cuda" if ranks.size == 1 else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = own if torch.cuda.is_available() else "cpu"
    network.to(device)
    if loss == "squared_error":
        labels, test_labels = (
            nn.functional.one_hot(part, classes).float() for part in (labels, test_labels)
        )
    trainer = tp.Trainer(
        network,
        loss=loss,
        optimizer=optimizer
        or partial(tp.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay),
        device=device,
        seed=seed,
        progress=progress,
        callbacks=callbacks if log is None else (*callbacks, log),
        **settings,
    )
    with nullcontext() if log is None else closing(log):
        result = trainer.fit((images, labels), (test_images, test_labels), resume=resume or None)
    if ranks.rank:  # rank 0 writes for all
        return _exit_code(result.status)
    if result.verdict is not None and result.run_dir is not None:
        draw_culprits(result.verdict, images, result.run_dir / "culprits.png")
    if progress:
        print(f"\n{result}")
        _draw(result)
    _report(result, progress)
    if progress:
        _explain(result)
    return _exit_code(result.status)


def _draw(result: tp.Result) -> None:
    """The loss curve into the run folder, and where it is."""
    if result.run_dir is not None and result.history:
        print(f"  picture: {run_figure(result.run_dir)[1]}")


def _report(result: tp.Result, progress: bool) -> None:
    """report.html into the run folder, and where it is; a failure costs a line, not the run."""
    if result.run_dir is None:
        return
    try:
        page = write_report([result.run_dir], result.run_dir / "report.html")
    except Exception as error:  # whatever it is, the run is done and its exit code stands
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"report.html was not written: {reason}", file=sys.stderr)
        return
    if progress:
        print(f"  report: {page}")


def _explain(result: tp.Result) -> None:
    if result.status != "completed" or result.verdict is None:
        return
    known = {
        "proved": "is proved" + (" at these weights" if result.verdict.claim == "at w" else ""),
        "full rank": "holds at these weights, counted numerically in float64 and not proved",
    }
    if result.verdict.status not in known:
        return
    print(
        f"\nThe expressivity condition {known[result.verdict.status]}: where the features have "
        "full rank, the training\nloss is convex in the last layer and its infimum is the "
        "global one. The Gaussian noise reaches such weights\nwith probability 1."
    )
    if getattr(result.guarantee, "mode", "") in ("base", "none"):
        print(
            "With momentum and a constant rate (second_phase='base', the paper's experiments) no "
            "rate is claimed:\nsecond_phase='gd', 'agd' and 'sgd' draw their bound beside the loss."
        )


def _exit_code(status: str) -> int:
    return {"completed": 0, "interrupted": 130, "diverged": 1, "stopped": 1}[status]
