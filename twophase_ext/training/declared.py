"""The loss that a run is given, tried on some of its targets before the first step."""

import warnings

import torch

from ..core.messages import type_and_line
from ..model.losses import ConvexLoss, loss_problem, zero_dim
from .config import Config
from .data.samples import Samples

BOUNDED = ("gd", "agd", "exact", "sgd", "lazy")  # second phases with a bound to evaluate


def problem_of(loss: ConvexLoss, outputs: int, samples: Samples) -> str:
    """`loss_problem` on telling targets of the run; none is tried where its constants are known."""
    if loss.known:
        return ""
    return loss_problem(loss, outputs, samples.telling.targets().to(samples.device))


def check_loss(loss: ConvexLoss, outputs: int, samples: Samples, config: Config) -> None:
    """ValueError for a loss that no bound of this run would hold for, or be evaluated for.

    A warning where the run has no bound: its audit then says "failed". ValueError too where the
    loss does not take outputs of the training precision.
    """
    if loss.known:
        return
    count = min(samples.n, 2)
    _, targets = samples.fetch(torch.arange(count, device="cpu"), augmented=False)
    made_up = torch.zeros(count, outputs, dtype=samples.dtype, device=samples.device)
    try:
        with torch.enable_grad():
            value = loss(made_up.requires_grad_(), targets)
        zero_dim(value)
        torch.autograd.grad(value, made_up)
    except Exception as error:  # whatever the user's own function raises
        raise ValueError(
            f"loss: {loss.name} fails on outputs {made_up.dtype} {list(made_up.shape)} and targets "
            f"{targets.dtype} {list(targets.shape)} ({type_and_line(error)})"
        ) from error
    if problem := problem_of(loss, outputs, samples):
        if config.second_phase in BOUNDED:
            raise ValueError(problem)
        warnings.warn(f"{problem}. Theorem 1 does not apply to this run", stacklevel=5)
