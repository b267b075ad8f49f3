"""How much of the paper's setting is run: `full` is section 7's, the others are smaller."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..paper import PAPER_SETTING

PAPER_WIDTH = 64  # channels of PreActResNet18 in its common form; the paper does not say


@dataclass(frozen=True)
class Scale:
    """Sizes of an experiment. None: the whole set.

    n, n_test: training and test images, the first ones of the data set. width: channels of
    PreActResNet18. epochs, epochs_augmented: T without and with augmentation. trials, trials_grid:
    seeds 1, 2, ... of Tables 1 and 2. agd: settings of the accelerated second phase, beside Table
    1's two branches; {} for none. curves: whether the test images are looked at after every epoch.
    """

    name: str
    n: int | None
    n_test: int | None
    width: int
    epochs: int
    epochs_augmented: int
    trials: int
    trials_grid: int
    agd: Mapping[str, Any] = field(default_factory=dict)
    curves: bool = False

    def note(self) -> str:
        """What differs from the paper, in words."""
        paper = PAPER_SETTING
        if self == SCALES["full"]:
            return "Scale full: the setting of the paper's section 7."
        train = f"the first {self.n:,} training images (paper: all)" if self.n else "all images"
        test = f" and {self.n_test:,} test images (all)" if self.n_test else ""
        return (
            f"Scale {self.name}: {train}{test}, PreActResNet18 of {self.width} channels "
            f"({PAPER_WIDTH}), T = {self.epochs} epochs ({paper.epochs}), "
            f"{self.epochs_augmented} with augmentation ({paper.epochs_augmented}), "
            f"{self.trials} trials ({paper.trials}), {self.trials_grid} in Table 2 "
            f"({paper.trials_grid}). All else as in the paper."
        )


SCALES = {
    "smoke": Scale("smoke", 96, 128, 2, 5, 5, 2, 1, agd={"steps": 2}, curves=True),
    "small": Scale("small", 500, 2000, 4, 40, 60, 5, 3),
    "medium": Scale("medium", None, None, 8, 10, 10, 3, 1, agd={"steps": 2}, curves=True),
    "full": Scale(
        "full",
        None,
        None,
        PAPER_WIDTH,
        PAPER_SETTING.epochs,
        PAPER_SETTING.epochs_augmented,
        PAPER_SETTING.trials,
        PAPER_SETTING.trials_grid,
    ),
}
