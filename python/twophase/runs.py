"""twophase demo and train: a run of the Trainer, its folder, picture and report."""

import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import twophase_ext as tp
from twophase_ext.core.files import inside, write_atomically
from twophase_ext.model.groups import groups_of
from twophase_ext.model.labels import Classes, decode
from twophase_ext.training.distributed.ranks import joined

from . import data
from .assembly import DataName, build_model, first, outputs_for
from .figures import run_figure
from .files import SUFFIXES, read_inputs, read_targets
from .report import write_report
from .verification import OPTIONS, draw_culprits, problem_of

PAPER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5}  # section 7.2


class SaveOptions:
    """Writes the command's resolved options into the run folder when training starts."""

    def __init__(self, text: str) -> None:
        """text: YAML that --config reads back."""
        self.text = text

    def on_fit_start(self, run: object) -> None:
        """Called by the Trainer."""
        folder = run.folder  # type: ignore[attr-defined]
        if folder is not None:
            write_atomically(folder / OPTIONS, lambda f: f.write(self.text.encode()))


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
    print(f"\n{result}" if progress else result.lead)
    if progress:
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
    x: str | None = None,
    y: str | None = None,
    x_test: str | None = None,
    y_test: str | None = None,
    model: str = "small",
    n: int | None = None,
    width: int = 8,
    ratio: float = 1.1,
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy",
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
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
        data_name: digits, mnist, fashion-mnist, kmnist, cifar10, cifar100 or svhn; read from
            TWOPHASE_DATA or downloaded.
        x: your own inputs instead of a data set, a .npy, .npz or .csv file.
        y: their targets, a file, or the name of a column or an array of x (by default y of an
            .npz). Whole numbers and words are labels.
        x_test: inputs that are measured after every epoch.
        y_test: their targets.
        model: mlp, small, preactresnet18, or package.module:callable of your own; in Python
            twophase.runs.load_run(FOLDER) has it, trained.
        n: train on the first n samples only.
        width: channels (or units) of the built-in models' hidden layers.
        ratio: the wide last hidden layer has ceil(ratio * n) units; 0 adds none.
        loss: squared_error trains on numbers, on one-hot targets where they are labels.
        lr: learning rate of SGD, 0.01 by default.
        momentum: momentum of SGD, 0.9 by default.
        weight_decay: weight decay of SGD, 1e-5 by default.
        optimizer: a class of torch.optim (and --optimizer.lr ...) in the place of SGD with lr,
            momentum and weight_decay.
        device: auto is CUDA where there is one, else the CPU.
        seed: seed of every random stream.
        resume: continue the run in run_dir; auto begins it where there is none yet.
        logger: log each epoch there too, beside metrics.csv; wandb is offline unless WANDB_MODE
            says otherwise.
        progress: print what happens; otherwise the result's sentence alone.
        callbacks: passed to the Trainer (not on the command line).
        **settings: the Trainer's other arguments.
    """
    ranks = joined()
    progress = progress and ranks.rank == 0
    rule = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    given = {name: value for name, value in rule.items() if value is not None}
    if optimizer is not None and given:
        name = next(iter(given))
        raise ValueError(f"{name}: of SGD alone; give the optimizer its own, --optimizer.{name}")
    if str(settings.get("run_dir")).lower() == "false":  # a folder's name, by its type
        settings["run_dir"] = False
    (images, labels), test, classes, names = _data(data_name, x, y, x_test, y_test)
    images, labels = first(n, images, labels)
    wide = tp.nn.wide_units(len(images), ratio) if ratio > 0 else 0
    network = build_model(model, images, classes, width=width, wide=wide, seed=seed)
    if device == "auto":
        own = "cuda" if ranks.size == 1 else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = own if torch.cuda.is_available() else "cpu"
    network.to(device)
    targets = _targets(labels, loss, classes, names)
    if test is not None:
        test = test[0], _targets(test[1], loss, classes, names)
    trainer = tp.Trainer(
        network,
        loss=loss,
        optimizer=optimizer or partial(tp.optim.SGD, **{**PAPER, **given}),
        device=device,
        seed=seed,
        progress=progress,
        callbacks=callbacks,
        logger=logger,
        **settings,
    )
    result = trainer.fit((images, targets), test, resume=resume or None)
    if ranks.rank:  # rank 0 writes for all
        return _exit_code(result.status)
    if result.status == "interrupted" and result.run_dir is not None:
        run = shlex.quote(str(result.run_dir))
        again = f"twophase train --config {run}/{OPTIONS} --run_dir {run} --resume true"
        print(f"interrupted; it goes on with: {again}", file=sys.stderr)
    if result.verdict is not None and result.run_dir is not None:
        draw_culprits(result.verdict, images, result.run_dir / "culprits.png")
    print(f"\n{result}" if progress else result.lead)
    if progress:
        _draw(result)
    _report(result, progress)
    if progress:
        _explain(result)
    return _exit_code(result.status)


def _data(
    data_name: str, x: str | None, y: str | None, x_test: str | None, y_test: str | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None, int, Classes | None]:
    """Training data, test data or None, the number of outputs, names of labels that are words."""
    if x is None:
        if other := [name for name in (y, x_test, y_test) if name is not None]:
            raise ValueError(f"x: expected a file beside {other[0]}, got none")
        images, labels = data.load(data_name, "train")
        return (images, labels), data.load(data_name, "test"), int(labels.max()) + 1, None
    targets, names = read_targets(y, x)
    test = None
    if x_test is not None:
        column = y if y is None or Path(y).suffix not in SUFFIXES else None
        other = y_test if y_test is not None else column
        test = read_inputs(x_test, other), read_targets(other, x_test, names)[0]
    elif y_test is not None:
        raise ValueError(f"x_test: expected a file beside y_test = {y_test}, got none")
    return (read_inputs(x, y), targets), test, outputs_for(targets), names


def load_run(folder: str | Path) -> tp.Result:
    """The Result of a run of `twophase train`, its model included: `predict` and `score` work.

    The model is built as the command built it, from the folder's options and the data that they
    name. Raises FileNotFoundError where options or data are gone, ValueError where the model is a
    callable of yours (`tp.load_run(folder, model)` takes it), and as `tp.load_run`.
    """
    if not inside(Path(folder), OPTIONS).exists():
        raise FileNotFoundError(
            f"folder: {folder} holds no {OPTIONS} of twophase train; tp.load_run(folder, model) "
            "takes runs made in Python"
        )
    network, _ = problem_of({"run": str(folder)}, trusted="")
    return tp.load_run(folder, network)


def _targets(y: Tensor, loss: str, classes: int, names: Classes | None) -> Any:
    """As the loss takes them; words where they were, for the run to keep."""
    if y.is_floating_point():
        if loss == "cross_entropy":
            raise ValueError(
                f"y: expected whole numbers or words as labels, got {float(y.flatten()[0]):g}; "
                "--loss squared_error trains on numbers"
            )
        return y.reshape(len(y), -1)
    if loss == "squared_error":
        return nn.functional.one_hot(y, classes).float()
    return y if names is None else decode(y, names)


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
