"""twophase verify: prove the expressivity condition, or prove a certificate again."""

from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor, nn

import twophase_ext as tp
from twophase_ext.core.files import inside, read_tensors
from twophase_ext.training.persistence import checkpoint

from .assembly import DataName, build_model, load_inputs
from .pictures import culprit_picture

# What a model's own code raises, and files that lack what they should hold; wrong arguments are
# the errors that the command line names with exit code 2.
FAILURES = (RuntimeError, MemoryError, LookupError, ArithmeticError, AssertionError)

OPTIONS = "options.yaml"  # what `twophase train` leaves in a run folder


def verify(
    data_name: DataName = "digits",
    model: str = "small",
    n: int | None = None,
    width: int = 8,
    ratio: float = 1.1,
    x: str | None = None,
    y: str | None = None,
    weights: str | None = None,
    run: str | None = None,
    w: Literal["current", "init", "witness"] = "witness",
    method: Literal["auto", "separation", "certificate", "svd"] = "auto",
    factorization: Literal["auto", "triangular", "gram", "preconditioned"] = "auto",
    seed: int = 1,
    out: str | None = None,
    folder: str | None = None,
    recheck: str | None = None,
    progress: bool = True,
) -> int:
    """Prove that [h_X', 1] has rank N over the distinct inputs of a model, and write a certificate.

    Args:
        data_name: digits, mnist, fashion-mnist, kmnist, cifar10, cifar100 or svhn; read from
            TWOPHASE_DATA or downloaded.
        model: mlp, small, preactresnet18, or package.module:callable of your own. With recheck or
            run, a callable that the file names is only called where it is given here, too.
        n: the first n samples only.
        width: channels (or units) of the built-in models' hidden layers.
        ratio: the wide last hidden layer has ceil(ratio * n) units; 0 adds none.
        x: your own inputs instead of a data set, a .npy, .npz or .csv file.
        y: their targets, as of `train`: their classes are counted.
        weights: a state dict (torch.save) to load into the model.
        run: a run folder of twophase train: its model, weights and data.
        w: prove it for made weights, for the default initialisation, or for the current weights.
        method: auto is separation, then the certificate where it fits.
        factorization: of the certificate.
        seed: seed of the initialisation.
        out: write the certificate here (JSON).
        folder: keep features and tiles here, to continue after a kill; it must exist.
        recheck: a certificate to prove again, from the data and model that it names. Where it names
            none, as that of a run made from Python, from --model (as it was trained, with the
            folder's weights, or --weights) and --x.
        progress: print what happens.
    """
    source: dict[str, Any] = {
        "data_name": data_name,
        "model": model,
        "n": n,
        "width": width,
        "ratio": ratio,
        "x": x,
        "y": y,
        "weights": weights,
        "run": run,
        "seed": seed,
    }
    if recheck is not None:
        return _recheck(recheck, source, folder)
    try:
        network, inputs = problem_of(source, model)
        verdict = tp.verify_expressivity(
            network,
            inputs,
            w=w,
            method=method,
            factorization=factorization,
            seed=seed,
            folder=folder,
            progress=progress,
        )
    except FAILURES as error:
        print(f"undecided: {_said(error)}")
        return 1
    verdict.source = source
    if progress:
        print(verdict)
    if out is not None:
        verdict.save(out)
        if progress:
            own = f" --model {model}" if ":" in model else ""
            print(f"certificate: {out}; prove it again with: twophase verify --recheck {out}{own}")
        draw_culprits(verdict, inputs, Path(out).with_suffix(".png"))
    return 0 if verdict.status == "proved" else 1


def _recheck(path: str, given: dict[str, Any], folder: str | None) -> int:
    """0 where the certificate holds, else 1 and the reason.

    given: the command line's source, which counts where the file names none.
    """
    verdict = tp.Verdict.load(path)
    source = verdict.source or _own_source(Path(path).parent, given)
    try:
        network, inputs = problem_of(source, given["model"])
    except FAILURES as error:
        print(f"does not hold: its model and data cannot be made: {_said(error)}")
        return 1
    return 0 if verdict.recheck(network, inputs, folder=folder) else 1


def _own_source(run: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Of a certificate that says nothing of model and data: the folder's, or the command line's."""
    if inside(run, OPTIONS).exists():
        return {"run": str(run)}
    if ":" not in given["model"]:
        raise ValueError(
            f"recheck: neither the certificate nor {run} says which model and data it is about; "
            "name them: --model package.module:callable, which returns the network as it was "
            "trained, and --x, the inputs"
        )
    kept = str(run) if given["weights"] is None and checkpoint.exists(run) else None
    return {**given, "ratio": 0, "checkpoint": kept}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def draw_culprits(verdict: tp.Verdict, inputs: Tensor, path: Path) -> bool:
    """A picture of the first groups of culprits, where there are some and inputs are images."""
    if not verdict.culprits or inputs.dim() != 4:
        return False
    culprit_picture(inputs, verdict.culprits, path)
    return True


def problem_of(source: dict[str, Any], trusted: str) -> tuple[nn.Module, Tensor]:
    """Model and inputs of a certificate's `source`, or of a run folder.

    trusted: the model that the command line names. ValueError where the file names a callable, that
    is code to run, and it is not that one.
    """
    run = source.get("run")
    if run is not None:
        path = inside(Path(run), OPTIONS)
        if not path.exists():
            raise FileNotFoundError(f"run: {run} holds no {OPTIONS} of twophase train")
        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"run: {path} cannot be read: {error}") from error
        keys = ("data_name", "model", "width", "ratio", "seed")
        own = {key: options.get(key) for key in ("n", "x", "y")}  # what is null is left out there
        source = {key: options[key] for key in keys} | own | {"run": run}
    if ":" in source["model"] and source["model"] != trusted:
        raise ValueError(
            f"model: the file names {source['model']!r}, code that would run; where you trust it, "
            "name it by --model too"
        )
    files = source.get("x"), source.get("y")
    inputs, classes = load_inputs(source["data_name"], source["n"], *files)
    wide = tp.nn.wide_units(len(inputs), source["ratio"]) if source["ratio"] > 0 else 0
    network = build_model(
        source["model"], inputs, classes, width=source["width"], wide=wide, seed=source["seed"]
    )
    if (kept := run or source.get("checkpoint")) is not None:
        tp.load_run(kept, network)
    elif source.get("weights"):
        try:
            state = read_tensors(source["weights"], "cpu")
        except Exception as error:  # torch raises many types for a damaged file
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"weights: {source['weights']} cannot be read: {reason}") from error
        network.load_state_dict(state)
    return network, inputs
