"""The base algorithm's optimizer, checked against the model before anything is trained."""

import inspect
from collections.abc import Callable

import torch
from torch import nn

from .. import optim
from ..network import Network
from ..ops.perturb import checked_tensors

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def paper_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with the paper's settings: lr 0.01, momentum 0.9, weight decay 1e-5 (section 7.2)."""
    return optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-5)


def make_optimizer(
    factory: OptimizerFactory, network: Network, noise_std: float | dict[str, float]
) -> torch.optim.Optimizer:
    """The optimizer of the network's trainable parameters.

    Raises TypeError or ValueError for an optimizer that cannot be used, for parameters that cannot
    be perturbed or trained, and for a noise_std that does not name the hidden parameters.
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
    optimizer = factory(list(parameters.values()))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    required = inspect.Parameter.empty
    if any(p.default is required for p in inspect.signature(optimizer.step).parameters.values()):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} needs a closure and is not a mini-batch "
            "algorithm"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    absent = [name for name, p in parameters.items() if id(p) not in held]
    if absent:
        raise ValueError(f"optimizer: lacks {absent[0]} ({len(absent)} such parameters)")
    return optimizer
