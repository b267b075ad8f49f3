"""What the paper prints: the numbers of its tables and the training settings of its section 7.

Kawaguchi & Sun, A Recipe for Global Convergence Guarantee in Deep Neural Networks, AAAI 2021.

Where the printed text leaves a choice, this is how it is read:

- Table 1 prints data set, number of training data and expressivity once for two rows; the row
  with augmentation takes them from the row above. Its "Yes" and "No" are True and False here.
- Table 2's corner reads "delta_0 tau_0": its first column is delta_0, its first row tau_0, as the
  values named in the text (tau_0 = 0.4, 0.5, 0.6, 0.8) confirm.
- Section 7.2 lists delta_0 = 0.0001, 0.001, 0.001; Table 2 has 0.0001, 0.001, 0.01. The second
  0.001 is taken for a misprint.
- Table 2 prints 2.06 (0.07) and 2.25 (0.11) twice each; all four are taken as they stand.
- The noise is delta = delta_0 * epsilon, epsilon ~ N(0, I_d), with d the number of all parameters
  in the paper's notation; Algorithm 1 adds noise to the hidden layers w_(1:H) alone.
- "Standard deviations" may divide by n or by n - 1: not said. The summaries hold no interval.
- Not said at all: number of epochs and augmentation for Table 2, the transformations of the
  augmentation, the width of the ResNet, the scaling of the inputs, the seeds of the trials.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from .statistics import Summary


def _printed(n: int, text: str) -> Summary:
    """ "0.41 (0.02)" over n trials."""
    mean, std = text.removesuffix(")").split(" (")
    return Summary(n, float(mean), float(std), None)


@dataclass(frozen=True)
class PaperRow:
    """One row of Table 1, test errors in percent over five trials.

    row: its number below the header, from 1. The other fields are its columns: data_set "Dataset",
    n_train "# of training data", expressivity "Expressivity Condition", augmentation
    "Augmentation", base "Base", two_phase "A(base) with guarantee".
    """

    row: int
    data_set: str
    n_train: int
    expressivity: str
    augmentation: bool
    base: Summary
    two_phase: Summary


def _table_1() -> dict[tuple[str, bool], PaperRow]:
    printed = [
        ("mnist", "MNIST", 60_000, False, "0.41 (0.02)", "0.38 (0.04)"),
        ("mnist", "MNIST", 60_000, True, "0.34 (0.03)", "0.28 (0.04)"),
        ("cifar10", "CIFAR-10", 50_000, False, "13.99 (0.17)", "13.57 (0.32)"),
        ("cifar10", "CIFAR-10", 50_000, True, "7.01 (0.18)", "6.84 (0.16)"),
        ("cifar100", "CIFAR-100", 50_000, False, "41.43 (0.43)", "40.78 (0.22)"),
        ("cifar100", "CIFAR-100", 50_000, True, "27.92 (0.36)", "27.41 (0.58)"),
        ("svhn", "SVHN", 73_257, False, "4.51 (0.04)", "4.50 (0.09)"),
        ("svhn", "SVHN", 73_257, True, "4.32 (0.06)", "4.16 (0.16)"),
    ]
    return {
        (key, augmentation): PaperRow(
            row, name, n, "Verified", augmentation, _printed(5, base), _printed(5, two_phase)
        )
        for row, (key, name, n, augmentation, base, two_phase) in enumerate(printed, 1)
    }


# Table 1 by (name of the data set in twophase.data.NAMES, augmentation).
PAPER_TABLE_1: dict[tuple[str, bool], PaperRow] = _table_1()

# Table 2 by (row delta_0, column tau_0): test errors in percent of A(base) with guarantee on
# Kuzushiji-MNIST over three trials. Each line is a row of the table, left to right.
PAPER_TABLE_2: dict[tuple[float, float], Summary] = {
    (delta_0, tau_0): _printed(3, text)
    for delta_0, row in (
        (0.0001, ("2.10 (0.14)", "2.06 (0.07)", "2.02 (0.09)", "2.01 (0.05)")),
        (0.001, ("2.06 (0.07)", "2.11 (0.12)", "1.92 (0.06)", "2.01 (0.12)")),
        (0.01, ("2.25 (0.11)", "2.25 (0.17)", "2.25 (0.11)", "2.09 (0.08)")),
    )
    for tau_0, text in zip((0.4, 0.5, 0.6, 0.8), row, strict=True)
}


def _said(value: Any, where: str) -> Any:
    """A field with its value and where the paper says it."""
    return field(default=value, metadata={"where": where})


_TRAINING = "section 7.2, Experimental setting"
_CHOICE = "section 7.2, Choice of tau and delta"
_VERIFICATION = "section 7.1"


@dataclass(frozen=True)
class PaperSetting:
    """The training settings of section 7; `where(name)` says where the paper states one."""

    architecture: str = _said(
        "pre-activation ResNet with 18 layers and batch normalization",
        "section 7, first paragraph; batch normalization: section 1, fourth contribution, "
        "and section 7, second paragraph",
    )
    wide_ratio: float = _said(1.1, "section 7, second paragraph: c, a last hidden layer of c n")
    activation: str = _said("softplus", "section 7, second paragraph, all layers")
    beta: float = _said(100.0, "section 7, second paragraph, and Figure 2: varsigma")
    loss: str = _said("cross_entropy", "section 7, second paragraph")
    base_algorithm: str = _said("SGD with momentum", "section 1, last paragraph; " + _TRAINING)
    batch_size: int = _said(64, _TRAINING)
    weight_decay: float = _said(1e-5, _TRAINING)
    momentum: float = _said(0.9, _TRAINING)
    lr: float = _said(0.01, _TRAINING + ", first phase")
    lr_second_phase: float = _said(0.01, _TRAINING + ", times nu: the last layer alone")
    epochs: int = _said(100, _TRAINING + ": T without augmentation, every data set")
    epochs_augmented: int = _said(400, _TRAINING + ": T with augmentation, every data set")
    tau_0: float = _said(0.6, _CHOICE + ", last sentence: tau = tau_0 T")
    delta_0: float = _said(0.001, _CHOICE + ", last sentence: delta = delta_0 epsilon")
    tau_0_grid: tuple[float, ...] = _said((0.4, 0.5, 0.6, 0.8), _CHOICE + "; Table 2, header")
    delta_0_grid: tuple[float, ...] = _said(
        (0.0001, 0.001, 0.01), "Table 2, first column (section 7.2 prints 0.001 for 0.01)"
    )
    tuned_on: str = _said("kmnist", _CHOICE + ": Kuzushiji-MNIST, for all other data sets")
    trials: int = _said(5, "captions of Table 1 and Figure 3")
    trials_grid: int = _said(3, "caption of Table 2")
    verification_w: str = _said("default initialisation", _VERIFICATION)
    verification_seed: int = _said(1, _VERIFICATION)
    verification_method: str = _said("numpy.linalg.matrix_rank, default options", _VERIFICATION)
    pytorch: str = _said("1.4.0", _VERIFICATION)
    numpy: str = _said("1.18.1", _VERIFICATION)

    def where(self, name: str) -> str:
        """Where the paper states the setting; ValueError for an unknown name."""
        stated = {f.name: f.metadata["where"] for f in fields(self)}
        if name not in stated:
            raise ValueError(f"name: expected one of {', '.join(stated)}, got {name!r}")
        return stated[name]


PAPER_SETTING = PaperSetting()
