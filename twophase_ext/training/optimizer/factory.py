"""The base algorithm's optimizer, checked against the model before anything is trained."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ... import optim
from ...model.network import Network
from ...ops.perturb import checked_tensors
from .groups import lacks, parts, plain_groups

CALLS = (
    "For every mini-batch the Trainer calls zero_grad(), one backward() without create_graph, and "
    "step() without a closure"
)
HOOKS = [
    f"_optimizer_{what}_{when}_hooks"
    for what in ("step", "state_dict", "load_state_dict")
    for when in ("pre", "post")
]
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def paper_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with the paper's settings: lr 0.01, momentum 0.9, weight decay 1e-5 (section 7.2)."""
    return optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-5)


def make_optimizer(
    factory: OptimizerFactory, network: Network, noise_std: float | dict[str, float]
) -> torch.optim.Optimizer:
    """The optimizer of the network's trainable parameters.

    NumPy's numbers in its groups become Python's. Raises TypeError or ValueError for an optimizer
    that cannot be made or used, for parameters that cannot be perturbed or trained, and for a
    noise_std that does not name the hidden parameters.
    """
    parameters = network.parameters()
    if not network.last.module.weight.requires_grad:
        raise ValueError(
            f"last_layer: {network.last.name}.weight does not require a gradient, but the "
            "second phase trains it"
        )
    hidden = checked_tensors(network.hidden_parameters())  # what perturb_ refuses at tau
    if isinstance(noise_std, dict):
        missing = [name for name in hidden if name not in noise_std]
        unknown = [name for name in noise_std if name not in hidden]
        if missing or unknown:
            problem = f"missing {missing[:3]}" if missing else f"unknown {unknown[:3]}"
            raise ValueError(f"noise_std: expected one sigma per hidden parameter, {problem}")
    try:
        optimizer = factory(list(parameters.values()))
    except Exception as error:  # whatever the package raises
        kind = type(error) if isinstance(error, TypeError) else ValueError
        shapes = sorted({f"{p.dim()}-D" for p in parameters.values()})
        said = str(error).rstrip(".") or "without a message"
        raise kind(
            f"optimizer: the callable failed on the model's {len(parameters)} parameters "
            f"({', '.join(shapes)}): {type(error).__name__}: {said}. Where it takes some of them "
            "alone, return one object that holds another optimizer for the rest (docs/torch.md)"
        ) from error
    if lacking := lacks(optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__} without "
            f"{', '.join(lacking)}"
        )
    required = inspect.Parameter.empty
    if any(p.default is required for p in inspect.signature(optimizer.step).parameters.values()):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} needs a closure and is not a mini-batch "
            f"algorithm. {CALLS}"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    absent = [name for name, p in parameters.items() if id(p) not in held]
    if absent:
        raise ValueError(f"optimizer: lacks {absent[0]} ({len(absent)} such parameters)")
    for part in parts(optimizer):
        if isinstance(part, torch.optim.Optimizer):  # some leave torch's __init__ out
            for name in HOOKS:
                vars(part).setdefault(name, OrderedDict())
        if not isinstance(part.param_groups, list):
            raise TypeError(
                f"optimizer: expected {type(part).__name__}.param_groups to be a list, got "
                f"{type(part.param_groups).__name__}"
            )
    plain_groups(optimizer)
    return optimizer


@contextmanager
def first_try(model: nn.Module) -> Iterator[None]:
    """Around the first step: where it fails the model is as it was."""
    tensors = [*model.parameters(), *model.buffers()]
    kept = [t.detach().clone() for t in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for t, value in zip(tensors, kept, strict=True):
                t.copy_(value)
        for p in model.parameters():
            p.grad = None
        raise


def refused(optimizer: torch.optim.Optimizer, error: Exception, where: str) -> ValueError:
    """The error for a step that failed; where: "first step", "first step of the second phase"."""
    said = str(error).rstrip(".") or "without a message"
    return ValueError(
        f"optimizer: {type(optimizer).__name__} failed in the {where}: {type(error).__name__}: "
        f"{said}. {CALLS}; an optimizer that evaluates the loss again "
        "(SAM, line searches) or differentiates gradients (AdaHessian) cannot be its base algorithm"
    )
