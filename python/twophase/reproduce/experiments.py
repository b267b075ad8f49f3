"""The paper's tables from finished trunks: which trunks there are, and what is read off them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from twophase_ext.linalg.bounds import bound_text

from ..paper import PAPER_SETTING, PAPER_TABLE_1, PAPER_TABLE_2
from ..tables import Comparison, ResultTable, compare, grid
from .cells import Trunk
from .scales import Scale

TITLES = {
    "digits": "digits",
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "kmnist": "Kuzushiji-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
}
BASE, TWO_PHASE, THEOREM, ACCELERATED = "base", "two-phase", "gd", "agd"
THEOREM_ROWS = 5000  # up to here the bound's comparators are cheap: an eigendecomposition of n x n
THEOREM_STEPS = 50  # full gradient steps an epoch

Cells = Sequence[tuple[Trunk, Mapping[str, Any]]]


def table1_trunks(
    scale: Scale,
    data_sets: Sequence[str],
    augmentation: Sequence[bool],
    seeds: Sequence[int],
    batch_norm: str,
) -> list[Trunk]:
    """Base and two-phase from one first phase; without augmentation also Theorem 1's own "gd"
    where it is cheap; "agd" where the scale has it."""
    trunks, trunk = [], _sized(scale, batch_norm)
    for data_set in data_sets:
        for augmented in augmentation:
            branches: dict[str, dict[str, Any]] = {
                BASE: {"second_phase": "none"},
                TWO_PHASE: {"second_phase": "base"},
            }
            small = scale.n is not None and scale.n <= THEOREM_ROWS
            if small and not augmented and batch_norm == "frozen":
                branches[THEOREM] = {"second_phase": "gd", "gd": {"steps": THEOREM_STEPS}}
            if scale.agd and not augmented:
                branches[ACCELERATED] = {"second_phase": "agd", "agd": dict(scale.agd)}
            trunks += [
                trunk(
                    data_set=data_set,
                    augmentation=augmented,
                    seed=seed,
                    epochs=scale.epochs_augmented if augmented else scale.epochs,
                    branches=branches,
                    spectrum=seed == 1 and not augmented,
                    curves=scale.curves,
                )
                for seed in seeds
            ]
    return trunks


def table1(cells: Cells, scale: Scale, notes: Sequence[str]) -> ResultTable:
    """Test errors of base and two-phase training, paired by seed, beside the paper's Table 1."""
    comparisons = []
    for (data_set, augmented), parts in groups(cells).items():
        printed = PAPER_TABLE_1.get((data_set, augmented))
        comparisons.append(
            Comparison(
                {
                    "data set": TITLES[data_set],
                    "n": parts[0][1]["n"],
                    "augmentation": "yes" if augmented else "no",
                },
                _errors(parts, BASE),
                _errors(parts, TWO_PHASE),
                paper=printed and (printed.base, printed.two_phase),
                expressivity=expressivity([cell["branches"][TWO_PHASE] for _, cell in parts]),
            )
        )
    return compare(
        comparisons,
        title="Test errors of base and two-phase training (Table 1)",
        notes=[scale.note(), *notes],
    )


def table2_trunks(
    scale: Scale, data_sets: Sequence[str], seeds: Sequence[int], batch_norm: str
) -> list[Trunk]:
    """One first phase for each seed; every tau_0 and delta_0 is a branch of it."""
    branches = {
        f"tau {tau:g}, noise {delta:g}": {"tau": tau, "noise_std": delta}
        for tau in PAPER_SETTING.tau_0_grid
        for delta in PAPER_SETTING.delta_0_grid
    }
    trunk = _sized(scale, batch_norm)
    return [
        trunk(
            data_set=data_set,
            augmentation=False,
            seed=seed,
            epochs=scale.epochs,
            branches=branches,
        )
        for data_set in data_sets
        for seed in seeds
    ]


def table2(cells: Cells, scale: Scale, notes: Sequence[str]) -> ResultTable:
    """Test errors over tau_0 and delta_0 on one data set, beside the paper's Table 2 on its own."""
    runs: dict[tuple[float, float], dict[int, float]] = {}
    outcomes = []
    for trunk, cell in cells:
        for name, changes in trunk.branches.items():
            outcome = cell["branches"][name]
            outcomes.append(outcome)
            if outcome["test_error"] is not None:
                place = (changes["noise_std"], changes["tau"])
                runs.setdefault(place, {})[trunk.seed] = outcome["test_error"]
    data_set = cells[0][0].data_set
    return grid(
        runs,
        title=f"Test errors of two-phase training on {TITLES[data_set]} (Table 2)",
        paper=PAPER_TABLE_2 if data_set == PAPER_SETTING.tuned_on else None,
        notes=[
            scale.note(),
            f"n = {cells[0][1]['n']:,}. Expressivity at tau: {expressivity(outcomes)}.",
            *notes,
        ],
    )


def expressivity(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The verdicts of several runs: status, method, how many, the least bound of sigma_min."""
    verdicts = [outcome["verdict"] for outcome in outcomes if outcome["verdict"]]
    kinds: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for verdict in verdicts:
        key = verdict["status"], verdict["claim"], verdict["method"]
        kinds.setdefault(key, []).append(verdict)
    words = []
    for (status, claim, method), found in kinds.items():
        where = "for some weights" if claim == "exists" else "at the weights of tau"
        text = f"{status} {where} ({method}) in {len(found)} of {len(outcomes)}"
        bounds = [v["sigma_min_lower"] for v in found if v["sigma_min_lower"] is not None]
        ranks = sorted(v["rank"] for v in found if v["rank"] is not None)
        if bounds:
            text += f", σ_min ≥ {bound_text(min(bounds), 3)}"
        if claim == "exists" and ranks:  # the count at tau's own weights, not proved
            span = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
            text += f", rank {span} counted at tau's weights"
        words.append(text)
    if len(verdicts) < len(outcomes):
        words.append(f"not verified in {len(outcomes) - len(verdicts)}")
    return "; ".join(words)


def groups(cells: Cells) -> dict[tuple[str, bool], list[tuple[Trunk, Mapping[str, Any]]]]:
    """The cells by (data set, augmentation), in their order."""
    found: dict[tuple[str, bool], list[tuple[Trunk, Mapping[str, Any]]]] = {}
    for trunk, cell in cells:
        found.setdefault((trunk.data_set, trunk.augmentation), []).append((trunk, cell))
    return found


def _sized(scale: Scale, batch_norm: str) -> Callable[..., Trunk]:
    """Trunk with the sizes of a scale."""
    sizes = {name: getattr(scale, name) for name in ("n", "n_test", "width")}
    return partial(Trunk, **sizes, batch_norm=batch_norm)


def _errors(parts: Cells, branch: str) -> dict[int, float]:
    """Test errors in percent by seed; a run that diverged has none."""
    found = {trunk.seed: cell["branches"][branch]["test_error"] for trunk, cell in parts}
    return {seed: error for seed, error in found.items() if error is not None}
