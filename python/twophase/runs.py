"""twophase demo and train: a run of the Trainer, its folder, picture and report."""

import os
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import twophase_ext as tp
from twophase_ext.core.files import write_atomically
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
    run_dir: str | None = None,
    epochs: int = 20,
    seed: int = 1,
    progress: bool = True,
    callbacks: tuple = (),
) -> int:
    """Train a small softplus network in two phases on real images and verify its condition.

    MNIST (2,000 images) where TWOPHASE_DATA points to it, scikit-learn's digits otherwise.

    Args:
        run_dir: the run's folder; a new one under runs/ by default.
        epochs: epochs in all; the second phase begins at 60 % of them.
        seed: seed of every random stream.
        progress: print what happens.
        callbacks: passed to the Trainer (not on the command line).
    """
    try:
        images, labels = data.load("mnist", "train", download=False)
        test = data.load("mnist", "test", download=False)
        images, labels = images[:2000], labels[:2000]
        name = "2,000 MNIST images"
    except FileNotFoundError:
        images, labels = data.load("digits", "train")
        test = data.load("digits", "test")
        name = f"{len(images):,} images of scikit-learn's digits"
    wide = tp.nn.wide_units(len(images))
    model = build_model("small", images, 10, width=8, wide=wide, seed=seed)
    trainer = tp.Trainer(
        model, epochs=epochs, seed=seed, run_dir=run_dir, progress=progress, callbacks=callbacks
    )
    if progress:
        print(
            f"Two-phase training of a small convolutional softplus network on {name}:\n"
            f"first phase {trainer.config.tau_epoch} epochs on all layers, then Gaussian noise on "
            f"the hidden layers,\nthen only the last layer, over {wide} fixed features (1.1 n).\n"
        )
    result = trainer.fit((images, labels), test)
    if progress:
        print(f"\n{result}")
        _draw(result)
    _report(result, progress)
    if progress:
        _explain(result)
    return _exit_code(result.status)


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
    epochs: int = 100,
    tau: int | float = 0.6,
    noise_std: float = 1e-3,
    batch_size: int = 64,
    second_phase: Literal["base", "gd", "sgd", "lazy", "none"] = "base",
    l_h: Literal["tight", "paper"] = "tight",
    l2: float = 0.0,
    steps: int = 1,
    c: float | None = None,
    eps: float = 0.1,
    smoothness: float | None = None,
    eta_bar: float = 0.5,
    verify_every: int = 1,
    batch_norm: Literal["frozen", "batch"] = "frozen",
    feature_cache: Literal[
        "auto", "hidden", "backbone", "disk", "hidden-bfloat16", "none"
    ] = "auto",
    verify: Literal["auto", "separation", "certificate", "svd", "off"] = "auto",
    precision: Literal["float32", "float64", "bf16-mixed", "fp16-mixed"] = "float32",
    compile: bool = False,
    accumulate: int = 1,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    scheduler_interval: Literal["epoch", "step"] = "epoch",
    device: str = "auto",
    seed: int = 1,
    run_dir: str | None = None,
    resume: bool | Literal["auto"] = False,
    checkpoint_every: int | str | None = None,
    logger: Literal["tensorboard", "wandb"] | None = None,
    progress: bool = True,
    callbacks: tuple = (),
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
        epochs: epochs in all.
        tau: the second phase begins at this fraction of the epochs, or epoch.
        noise_std: sigma of the noise on the hidden layers.
        batch_size: samples a step.
        second_phase: base, gd (Theorem 1 i) and sgd (Theorem 1 ii) train the last layer; lazy all
            layers, by full gradients (Theorem 3); none is the base algorithm to the end.
        l_h: of gd, the form of L_H; the step is 1 / L_H.
        l2: of gd, L2 regularisation of the last layer.
        steps: of gd, gradient steps an epoch.
        c: of sgd, eta_t = c / t^(1/2 + eps); 1 / L_H by default.
        eps: of sgd.
        smoothness: L of the lazy phase's loss, if you know it; the step is 2 eta_bar / L.
        eta_bar: in (0, 1), of the lazy phase.
        verify_every: lazy steps between two checks of the rank.
        batch_norm: frozen statistics in the second phase, or batch statistics.
        feature_cache: what the second phase keeps in memory.
        verify: check the expressivity condition after the perturbation.
        precision: of training; mixed is float32 with the first phase under autocast.
        compile: run the first phase through torch.compile.
        accumulate: micro-batches that a step of the first phase goes through the model in.
        optimizer: a class of torch.optim (and --optimizer.lr ...) in the place of SGD with lr,
            momentum and weight_decay.
        scheduler: a class of torch.optim.lr_scheduler (and --scheduler.T_max ...).
        scheduler_interval: the scheduler is stepped after every epoch, or every step.
        device: auto is CUDA where there is one, else the CPU.
        seed: seed of every random stream.
        run_dir: the run's folder; a new one under runs/ by default.
        resume: continue the run in run_dir; auto begins it where there is none yet.
        checkpoint_every: epochs, or for example "500 steps" or "10 minutes".
        logger: log each epoch there too, beside metrics.csv; wandb is offline unless WANDB_MODE
            says otherwise.
        progress: print what happens.
        callbacks: passed to the Trainer (not on the command line).
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
    settings: dict[str, object] = {
        "gd": {"smoothness": l_h, "l2": l2, "steps": steps},
        "sgd": {"c": c, "eps": eps},
        "lazy": {"smoothness": smoothness, "eta_bar": eta_bar, "verify_every": verify_every},
    }
    trainer = tp.Trainer(
        network,
        loss=loss,
        optimizer=optimizer
        or partial(tp.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay),
        epochs=epochs,
        tau=tau,
        noise_std=noise_std,
        batch_size=batch_size,
        second_phase=second_phase,
        **{name: value for name, value in settings.items() if name == second_phase},
        batch_norm=batch_norm,
        feature_cache=feature_cache,
        verify=False if verify == "off" else verify,
        precision=precision,
        compile=compile,
        accumulate=accumulate,
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        device=device,
        seed=seed,
        run_dir=run_dir,
        checkpoint_every=checkpoint_every,
        progress=progress,
        callbacks=callbacks if log is None else (*callbacks, log),
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
    if not getattr(result.guarantee, "curve", []):
        print(
            "With momentum and a constant rate (second_phase='base', the paper's experiments) no "
            "rate is claimed:\nsecond_phase='gd' and 'sgd' draw Theorem 1's bound beside the loss."
        )


def _exit_code(status: str) -> int:
    return {"completed": 0, "interrupted": 130, "diverged": 1, "stopped": 1}[status]
