"""The command line: twophase demo | train | verify | doctor | report | reproduce | download."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser, Namespace

import twophase_ext as tp

from . import data
from .assembly import DataName, build_model, load_inputs
from .commands import DESCRIPTION, SUMMARIES, did_you_mean, nearly
from .help import HIDDEN
from .report import write_report
from .reproduce import WHAT
from .reproduce import reproduce as run_experiment
from .runs import SaveOptions, demo, train
from .verification import verify


def doctor(
    data_name: DataName = "digits",
    model: str = "small",
    n: int | None = None,
    width: int = 8,
    ratio: float = 1.1,
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy",
    seed: int = 1,
    x: str | None = None,
    y: str | None = None,
) -> int:
    """Say which premises of Theorem 1 hold for a model, its loss and its data, and what to do.

    Args:
        data_name: digits, mnist, fashion-mnist, kmnist, cifar10, cifar100 or svhn; read from
            TWOPHASE_DATA or downloaded.
        model: mlp, small, preactresnet18, or package.module:callable of your own.
        n: look at the first n samples only.
        width: channels (or units) of the built-in models' hidden layers.
        ratio: the wide last hidden layer has ceil(ratio * n) units; 0 adds none.
        loss: the training loss.
        seed: seed of the initialisation.
        x: your own inputs instead of a data set, a .npy, .npz or .csv file.
        y: their targets, as of `train`: their classes are counted.
    """
    images, classes = load_inputs(data_name, n, x, y)
    wide = tp.nn.wide_units(len(images), ratio) if ratio > 0 else 0
    network = build_model(model, images, classes, width=width, wide=wide, seed=seed)
    assumptions = tp.check_assumptions(network, images, loss=loss)
    print(assumptions)
    return 0 if assumptions.hold else 1


def report(runs: list[str], out: str | None = None) -> int:
    """Write one HTML file about one run folder or several: what ran, what was guaranteed.

    Args:
        runs: run folders.
        out: the file; by default report.html, in the run folder for one run, here for several.
    """
    folders = [Path(run) for run in runs]
    place = folders[0] if len(folders) == 1 else Path()
    print(write_report(folders, place / "report.html" if out is None else Path(out)))
    return 0


def reproduce(
    what: str,
    scale: Literal["smoke", "small", "medium", "full"] = "small",
    datasets: list[str] | None = None,
    seeds: list[int] | None = None,
    augmentation: Literal["both", "no", "yes"] = "both",
    batch_norm: Literal["frozen", "batch"] = "frozen",
    device: str = "auto",
    run_dir: str = "runs/reproduce",
) -> int:
    """Reproduce a table or figure of the paper, at the scale that this machine allows.

    Args:
        what: table1, table2, figure2 or figure3.
        scale: full is the paper's setting; small takes under half an hour on two cores;
            medium has all images and eight channels.
        datasets: data sets, by default the paper's; missing ones are skipped.
        seeds: seeds of the trials.
        augmentation: rows of Table 1 and panels of Figure 3 with and without augmentation.
        batch_norm: frozen statistics in the second phase, or batch statistics.
        device: auto is CUDA where there is one, else the CPU.
        run_dir: where results and finished runs are kept; the same command goes on from there.
    """
    written = run_experiment(
        what,
        scale=scale,
        datasets=datasets,
        seeds=seeds,
        augmentation=augmentation,
        batch_norm=batch_norm,
        device=device,
        run_dir=run_dir,
    )
    return 0 if written else 1


def download(datasets: list[str]) -> int:
    """Fetch data sets, with their checksums verified, to where every command finds them.

    Args:
        datasets: names of data sets.
    """
    for name in datasets:
        parts = {split: len(data.load(name, split)[0]) for split in ("train", "test")}
        print(f"{name}: {parts['train']:,} training and {parts['test']:,} test images")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "train": train,
    "verify": verify,
    "doctor": doctor,
    "report": report,
    "reproduce": reproduce,
    "download": download,
}


class Parser(ArgumentParser):
    """Says of an unknown option which one it nearly is."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Exit with code 2."""
        for word in re.findall(r"(?<!\S)--[\w.]+", message):
            if word not in self._option_string_actions:
                message += did_you_mean(word, self._option_string_actions)
        message += nearly(message)
        for word in re.findall(r"path string: (\w+)$", message, re.M)[:1]:
            message += did_you_mean(word, {*dir(torch.optim), *dir(torch.optim.lr_scheduler)})
        for word in re.findall(r"invalid choice: '([^']*)'", message):
            choices = re.findall(r"'([^']*)'", message.partition("choose from")[2])
            message += did_you_mean(word, choices)
        super().error(message, ex)


def make_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser and its subcommands' parsers."""
    parser = Parser(prog="twophase", description=DESCRIPTION)
    subcommands = parser.add_subcommands(required=True)
    parts = {}
    for name, function in COMMANDS.items():
        part = Parser(description=SUMMARIES[name])
        own = _positional(part, function)
        part.add_function_arguments(function, skip={*HIDDEN, *own})
        part.add_argument("--config", action="config", help="YAML file with these options")
        subcommands.add_subcommand(name, part, help=SUMMARIES[name])
        parts[name] = part
    return parser, parts


def _positional(part: ArgumentParser, function: Callable[..., int]) -> tuple[str, ...]:
    """Add the arguments that are positions or take several words; their names."""
    if function is report:
        part.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
        return ("runs",)
    if function is download:
        part.add_argument("datasets", nargs="+", choices=data.NAMES, help="names of data sets")
        return ("datasets",)
    if function is reproduce:
        part.add_argument("what", choices=WHAT, help="table or figure of the paper")
        part.add_argument(
            "--datasets", nargs="+", choices=data.NAMES, help="the paper's by default"
        )
        part.add_argument("--seeds", nargs="+", type=int, help="seeds of the trials")
        return ("what", "datasets", "seeds")
    return ()


def _said(error: BaseException) -> str:
    """What settings that are refused said, which jsonargparse wraps in what else it tried."""
    while str(error).startswith("Does not validate") and error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; the exit code.

    0 done, 1 failed or not proved, 2 wrong arguments, 130 interrupted.
    """
    parser, parts = make_parser()
    options: Namespace = parser.parse_args(arguments)
    name = options.subcommand
    chosen = options[name]
    # classes with their arguments become callables; older versions have the other name only
    build = getattr(parts[name], "instantiate", None) or parts[name].instantiate_classes
    try:
        keywords = {key: value for key, value in build(chosen).as_dict().items() if key != "config"}
        if name in ("demo", "train"):
            keywords["callbacks"] = (SaveOptions(parts[name].dump(chosen)),)
        return COMMANDS[name](**keywords)
    except KeyboardInterrupt:  # before or after the training, or for the second time in it
        print(f"twophase {name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, AttributeError) as error:
        said = _said(error)
        print(f"twophase {name}: {said}{nearly(said)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
