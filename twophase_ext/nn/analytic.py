"""Make a network real analytic: ReLU-like modules become the exact softplus."""

import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from .modules import NOT_ANALYTIC, RELU_LIKE, UNKNOWN, Kind, classify
from .softplus import Softplus

_CALLS = {
    F.relu: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.elu: "elu",
    F.selu: "selu",
    F.hardtanh: "hardtanh",
    F.hardswish: "hardswish",
    F.softplus: "softplus (thresholded)",
    F.max_pool1d: "max_pool1d",
    F.max_pool2d: "max_pool2d",
    F.max_pool3d: "max_pool3d",
    F.adaptive_max_pool1d: "adaptive_max_pool1d",
    F.adaptive_max_pool2d: "adaptive_max_pool2d",
    torch.relu: "relu",
    torch.relu_: "relu_",
    torch.abs: "abs",
    torch.clamp: "clamp",
    torch.max: "max",
    torch.min: "min",
    torch.amax: "amax",
    torch.maximum: "maximum",
    torch.minimum: "minimum",
    torch.sign: "sign",
    torch.where: "where",
    operator.abs: "abs",
}
_METHODS = {
    "relu",
    "relu_",
    "abs",
    "clamp",
    "clamp_",
    "clamp_min",
    "max",
    "min",
    "amax",
    "maximum",
    "minimum",
    "sign",
    "where",
}


@dataclass
class AnalyticReport:
    """What `analytic` did: replaced (name, old type), and what is left that is not analytic.

    remaining: modules that have no stand-in, and functional calls found by tracing; unknown:
    modules it cannot judge. traced: whether the forward pass could be traced for functional calls;
    if not, `trace_error` says why and calls inside forward() are unseen.
    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    remaining: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[Kind] = field(default_factory=list)
    traced: bool = True
    trace_error: str = ""

    @property
    def is_analytic(self) -> bool:
        """True only where everything was seen and judged analytic."""
        return self.traced and not self.remaining and not self.unknown

    def __str__(self) -> str:
        """A table for a person."""
        lines = [f"replaced    {name}: {old} -> Softplus" for name, old in self.replaced]
        lines += [f"remaining   {name}: {reason}" for name, reason in self.remaining]
        lines += [f"unknown     {kind.name}: {kind.type}, {kind.reason}" for kind in self.unknown]
        if not self.traced:
            lines.append(f"not traced  calls inside forward() are unseen: {self.trace_error}")
        verdict = "real analytic" if self.is_analytic else "not shown to be real analytic"
        return "\n".join([*lines, f"the network is {verdict}"])


def analytic(model: nn.Module, beta: float = 100.0) -> AnalyticReport:
    """Replace ReLU-like modules by the exact Softplus(beta), in place; say what could not be.

    Replaced at any depth: ReLU and its variants, and torch's own thresholded nn.Softplus, which
    keeps its beta. An instance used in several places stays one instance. Not replaced, but
    reported: max-pooling, other modules with kinks, and functional calls (F.relu, torch.max, ...)
    found by symbolic tracing. A model that is itself such a module raises ValueError.
    """
    if isinstance(model, RELU_LIKE):
        raise ValueError(f"model: is itself {type(model).__name__} and has no parent to change")
    report = AnalyticReport()
    stand_ins: dict[nn.Module, Softplus] = {}
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):  # named_children skips repeats
            if not isinstance(child, RELU_LIKE):
                continue
            if child not in stand_ins:
                own_beta = float(child.beta) if isinstance(child, nn.Softplus) else beta
                stand_ins[child] = Softplus(own_beta, getattr(child, "inplace", False))
                stand_ins[child].train(child.training)
            setattr(parent, name, stand_ins[child])
            path = f"{parent_name}.{name}" if parent_name else name
            report.replaced.append((path, type(child).__name__))
    for kind in classify(model):
        if kind.status == NOT_ANALYTIC:
            report.remaining.append((f"{kind.name} ({kind.type})", kind.reason))
        elif kind.status == UNKNOWN:
            report.unknown.append(kind)
    calls, report.trace_error = functional_calls(model)
    report.traced = not report.trace_error
    report.remaining += [(where, f"{call}() is not analytic") for where, call in calls]
    return report


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Softplus) or super().is_leaf_module(m, module_qualified_name)


def functional_calls(model: nn.Module) -> tuple[list[tuple[str, str]], str]:
    """([(where, call)] that are not analytic in forward passes, why tracing failed or "")."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's code, which may raise anything
        return [], f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
    found = []
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        where = f"call {node.name}" + (f" in {list(stack)[-1]}" if stack else "")
        if node.op == "call_function" and node.target in _CALLS:
            found.append((where, _CALLS[node.target]))
        elif node.op == "call_method" and node.target in _METHODS:
            found.append((where, str(node.target)))
    return found, ""
