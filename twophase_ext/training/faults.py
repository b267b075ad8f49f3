"""A loss that is not finite: found at its step, and reported with the samples that it came from."""

import math
from typing import Any

import torch
from torch import Tensor

from .context import Context
from .persistence import checkpoint
from .state import RunState

LOOK_EVERY = 64  # steps on an accelerator, where each look at a loss waits for the device


class Diverged(Exception):
    """The loss of a step, or the weights after it, are not finite.

    step: of the epoch; loss: its value; samples: the indices of its mini-batch, None where the step
    is over all samples.
    """

    def __init__(self, step: int, loss: float, samples: Tensor | None) -> None:
        """See the class."""
        super().__init__(f"step {step}: loss {loss}")
        self.step, self.loss, self.samples = step, loss, samples


class Stopped(Exception):
    """The second phase cannot go on, for the reason given: the run ends before the step."""


class LossWatch:
    """Remembers the losses of steps until they are looked at."""

    def __init__(self, device: torch.device) -> None:
        """On the CPU every loss is looked at at once."""
        self.every = 1 if device.type == "cpu" else LOOK_EVERY
        self.losses: list[Tensor] = []

    def add(self, loss: Tensor, now: bool) -> tuple[int, float] | None:
        """(steps back from this one, loss) of the first loss that is not finite, if one is known.

        loss: 0-d, of the step just made. now: look, whatever it costs.
        """
        self.losses.append(loss)
        if not now and len(self.losses) < self.every:
            return None
        losses, self.losses = torch.stack(self.losses).tolist(), []
        bad = next((i for i, value in enumerate(losses) if not math.isfinite(value)), None)
        return None if bad is None else (len(losses) - 1 - bad, losses[bad])


def describe(context: Context, state: RunState, fault: Diverged) -> dict[str, Any]:
    """The fault as plain data, said too: `Result.divergence`.

    The mini-batch is fetched again: what is drawn at random for it comes from the seed.
    """
    samples, inputs = fault.samples, []
    if samples is not None:
        x = context.train.fetch(samples)[0]
        good = torch.isfinite(x).reshape(len(x), -1).all(1).cpu()
        inputs = samples[~good].tolist()
    found: dict[str, Any] = {
        "epoch": state.epoch,
        "step": fault.step,
        "loss": str(fault.loss),  # JSON has neither NaN nor infinity
        "samples": None if samples is None else samples.tolist(),
        "inputs_not_finite": inputs,
    }
    of = "" if samples is None else f" (samples {found['samples']})"
    broken = "the weights are not finite"
    if not math.isfinite(fault.loss):
        broken = f"the loss is {fault.loss}"
    kept = ""
    if context.folder is not None and checkpoint.exists(context.folder.path):
        kept = f" {context.folder.path} keeps the last good checkpoint."
    advice = "Lower the learning rate and start again in another folder"
    if inputs:
        advice = f"The inputs of samples {inputs} are not finite: mend their transform"
    context.progress.say(
        f"epoch {state.epoch}, step {fault.step}{of}: {broken}; stopped.{kept} {advice}"
    )
    return found
