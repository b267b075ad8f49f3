"""How far a run is from the global minimum over all weights: one sentence, and its numbers."""

from dataclasses import dataclass
from typing import Any

import torch

from ..expressivity import Verdict
from ..linalg.bounds import bound_text, plus
from ..model.network import Network
from ..theory.floor import LossFloor, floor_of
from ..theory.guarantee import MEASURED
from .collapse import collapse
from .data.samples import Samples

PROVED, CONDITIONAL, FAILED = "proved", "if the expressivity condition holds", "failed"


@dataclass(frozen=True)
class Minimum:
    """loss: the trained network's over all training samples, in evaluation mode, or None.

    floor: what no weights of any network can go below; None where the training data are no fixed
    set. condition: "proved", then the floor is the infimum over all weights of this network; "if
    the expressivity condition holds"; or "failed", where no weights of its last layer reach the
    floor. gap: loss - floor.lower, rounded up, with the loss's own rounding in `eps`. last_layer:
    under an L2 term of the last layer an upper bound of objective - its minimum over the last
    layer, from the measured gradient. collapse: "" unless the outputs are the same for all inputs.
    """

    loss: float | None
    floor: LossFloor | None
    condition: str
    eps: float
    last_layer: float | None = None
    collapse: str = ""

    @property
    def gap(self) -> float | None:
        """At most this far above the infimum; None where loss or floor is not known."""
        if self.loss is None or self.floor is None or not self.floor.lower > -float("inf"):
            return None
        return plus(self.loss, -self.floor.lower, MEASURED * self.eps * abs(self.loss))

    def __str__(self) -> str:
        """The sentence."""
        floor, gap = self.floor, self.gap
        start = "No training loss was measured at the end"
        if self.loss is not None:
            start = f"The training loss is {self.loss:.6g}"
        if floor is None:
            text = f"{start}; the samples change from visit to visit: no global minimum is known"
        elif gap is None and self.loss is not None:
            text = f"{start}; how low {floor.loss} could be is not known (tp.loss_floor may tell)"
        elif gap is not None and gap < 0:
            text = (
                f"{start}, below {bound_text(floor.lower, 6)}, which no function of the inputs can "
                "have: the model does not give equal inputs equal outputs, and nothing is claimed"
            )
        else:
            known = self.condition != FAILED and not floor.reason
            least = bound_text(floor.lower, 6)
            text = f"{start}; the global minimum over all weights of this network is "
            text += f"{'' if known else 'at least '}{least} "
            if self.condition == FAILED:
                text += "(no weights of its last layer give every distinct input any output)"
            else:
                text += f"({self.condition}{', not attained' if floor.attained is False else ''})"
            if gap is not None:
                text += f", so this run is at most {bound_text(gap, 3, upper=True)} above it"
        if self.last_layer is not None:
            text += (
                "; with its L2 term the objective is at most "
                f"{bound_text(self.last_layer, 3, upper=True)} above its minimum over the last "
                "layer (strong convexity, by the measured gradient)"
            )
        return f"{text}; {self.collapse}." if self.collapse else f"{text}."

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "loss": self.loss,
            "floor": self.floor and self.floor.as_dict(),
            "condition": self.condition,
            "gap": self.gap,
            "eps": self.eps,
            "last_layer": self.last_layer,
            "collapse": self.collapse,
        }

    @classmethod
    def of(cls, fields: dict[str, Any] | None) -> "Minimum | None":
        """From `as_dict`; None of nothing. Raises TypeError or KeyError for other fields."""
        if not fields:
            return None
        floor = None if fields["floor"] is None else LossFloor(**fields["floor"])
        known = [fields[key] for key in ("condition", "eps", "last_layer")]
        return cls(fields["loss"], floor, *known, *[fields.get("collapse", "")])


def minimum(
    network: Network,
    train: Samples,
    loss: float | None,
    verdict: Verdict | None,
    constants: dict[str, float],
) -> Minimum:
    """The Minimum of a run that has ended; loss: over `train`; constants: of its guarantee."""
    floor = None
    if not train.random and train.groups is not None:
        floor = floor_of(train.objective, train.groups, train.targets, network.outputs, solves=0)
    bias = network.last.module.bias
    columns = network.width + (bias is not None and bias.requires_grad)
    condition = PROVED if verdict is not None and verdict.status == "proved" else CONDITIONAL
    if floor is not None and floor.distinct > columns:
        condition = FAILED
    return Minimum(
        loss,
        floor,
        condition,
        float(torch.finfo(train.dtype).eps),
        constants.get("last_layer_gap"),
        "" if loss is None else collapse(network, train),
    )
