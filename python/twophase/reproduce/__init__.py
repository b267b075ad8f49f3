"""twophase reproduce: the paper's tables and figures by one command each."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import data
from ..paper import PAPER_SETTING
from . import drawing
from .cells import Trunk, sweep
from .experiments import Cells, table1, table1_trunks, table2, table2_trunks
from .scales import SCALES, Scale
from .second_phases import equal_time, second_phases

DATA_SETS = {
    "table1": ("mnist", "cifar10", "cifar100", "svhn"),
    "table2": (PAPER_SETTING.tuned_on,),
    "figure3": ("mnist", "cifar10", "cifar100", "svhn"),
}
AUGMENTATION = {"both": (False, True), "no": (False,), "yes": (True,)}
WHAT = ("table1", "table2", "figure2", "figure3")


def reproduce(
    what: str,
    *,
    scale: str = "small",
    datasets: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    augmentation: str = "both",
    batch_norm: str = "frozen",
    device: str = "auto",
    run_dir: str | Path = "runs/reproduce",
) -> list[Path]:
    """Run what is missing of a table or figure, write it into `run_dir`, print it; the files.

    what: one of WHAT. Table 1 and Figure 3 are drawn from the same runs, "figure3" adds the
    guaranteed loss and sigma_min of [h, 1]. scale: "smoke", "small", "medium" (all images, eight
    channels, the accelerated second phase beside) or "full" (the paper's own). datasets: names of
    `data.NAMES`, the paper's by default; a missing one is skipped and the command that fetches it
    printed. seeds: of the trials. augmentation: "both", "no" or "yes" of Table 1 and Figure 3.
    Returns [] where no data set was found. Raises ValueError for unknown names, KeyboardInterrupt
    after Ctrl-C with everything finished kept.
    """
    for name, value, known in (
        ("what", what, WHAT),
        ("scale", scale, SCALES),
        ("augmentation", augmentation, AUGMENTATION),
        *(("datasets", data_set, data.NAMES) for data_set in datasets or ()),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    root = Path(run_dir)
    root.mkdir(parents=True, exist_ok=True)
    if what == "figure2":
        return _said(drawing.figure2(root))
    size, place = SCALES[scale], _device(device)
    found, notes = _available(datasets or DATA_SETS[what], size)
    if not found:
        print("nothing to run: no data set was found. --datasets digits needs no download")
        return []
    print(size.note())
    if what == "table2":
        return _table2(size, found, seeds, batch_norm, root, place, notes)
    trials = tuple(seeds or range(1, size.trials + 1))
    kinds = AUGMENTATION[augmentation]
    trunks = table1_trunks(size, found, kinds, trials, batch_norm)
    cells = list(zip(trunks, sweep(trunks, root / "trunks", place), strict=True))
    if what == "table1":
        notes += _environments(cells)
        table = table1(cells, size, notes)
        print("\n" + table.markdown())
        written = table.write(root, f"table1-{scale}")
        if size.curves:
            beside = second_phases(cells, size, notes)
            print("\n" + beside.markdown())
            written += beside.write(root, f"second-phases-{scale}")
            written += equal_time(cells, root, f"equal-time-{scale}")
        return _said(written)
    draw: list[tuple[Callable[..., list[Path]], str]] = [
        (drawing.figure3, f"figure3-{scale}"),
        (drawing.guarantee_figure, f"guarantee-{scale}"),
        (drawing.spectrum_figure, f"spectrum-{scale}"),
    ]
    return _said([path for make, stem in draw for path in make(cells, root, stem)])


def _table2(
    size: Scale,
    found: Sequence[str],
    seeds: Sequence[int] | None,
    batch_norm: str,
    root: Path,
    place: torch.device,
    notes: list[str],
) -> list[Path]:
    trials = tuple(seeds or range(1, size.trials_grid + 1))
    trunks = table2_trunks(size, found, trials, batch_norm)
    cells = list(zip(trunks, sweep(trunks, root / "trunks", place), strict=True))
    written = []
    for data_set in found:
        own = [cell for cell in cells if cell[0].data_set == data_set]
        table = table2(own, size, [*notes, *_environments(own)])
        print("\n" + table.markdown())
        written += table.write(root, f"table2-{data_set}-{size.name}")
    return _said(written)


def _available(names: Sequence[str], size: Scale) -> tuple[list[str], list[str]]:
    """The data sets that are here, and notes on those that are not, or not whole."""
    found, notes = [], []
    for name in names:
        try:
            images, _ = data.load(name, "test", download=False)
        except FileNotFoundError as error:
            notes.append(f"{name} skipped: not found. `twophase download {name}` fetches it.")
            print(f"{notes[-1]} ({error})")
            continue
        found.append(name)
        if size.n_test is not None and len(images) < size.n_test:
            notes.append(f"{name}: there were {len(images):,} test images.")
    return found, notes


def _environments(cells: Cells) -> list[str]:
    """Where the runs were made: processor or GPU, threads, torch, commit."""
    found = {}
    for _, cell in cells:
        where = cell["environment"]
        device = where["processor"] if where["device"] == "cpu" else where["device"]
        found[
            f"Run on {device}, threads: {where['threads']}; torch {where['torch']}; "
            f"commit {(where['commit'] or 'unknown')[:10]}."
        ] = None
    return list(found)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _said(paths: list[Path]) -> list[Path]:
    for path in paths:
        print(path)
    return paths


__all__ = ["AUGMENTATION", "SCALES", "WHAT", "Trunk", "reproduce"]
