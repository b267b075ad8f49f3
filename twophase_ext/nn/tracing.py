"""The calls that a model's forward passes make besides their modules, found by torch.fx."""

import copy
import inspect
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from twophase_ext import ops
from twophase_ext.probing import cuda_devices

from .catalog import CONTAINERS, function_name, rule_for

# Calls whose results are numbers about a tensor, not functions of its entries.
_METADATA = {"size", "dim", "numel", "ndimension", "stride", "element_size", "nelement", "len"}
_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout", "itemsize"}
_RANDOM = {"rand", "randn", "randint", "randperm", "normal", "uniform", "bernoulli", "exponential"}


@dataclass
class Trace:
    """What tracing saw.

    calls: (path of the module whose forward makes the call, the call's node), constants left out.
    visited: paths of the modules whose own forward was traced. failures: path -> why not.
    random: paths whose trace drew random numbers, which are then mere constants to the tracer.
    output: path of the module whose result is the model's result, None where it is not a module's.
    """

    calls: list[tuple[str, fx.Node]] = field(default_factory=list)
    visited: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    random: set[str] = field(default_factory=set)
    output: str | None = None


class _Tracer(fx.Tracer):
    """Stops at the modules that the catalogue judges as a whole; remembers whom it entered."""

    def __init__(self, prefix: str) -> None:
        # softplus is an autograd.Function, which fx cannot enter: keep it as one call, under both
        # names by which a user reaches it.
        root = sys.modules[ops.__name__.partition(".")[0]]
        super().__init__(autowrap_modules=(math, ops, root))  # type: ignore[arg-type]
        self.prefix = prefix
        self.visited = {prefix}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return rule_for(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            self.visited.add(join(self.prefix, path))
        return super().call_module(m, forward, args, kwargs)


def join(prefix: str, name: str) -> str:
    """A dotted path; either part may be empty."""
    return ".".join(part for part in (prefix, name) if part)


def trace(model: nn.Module) -> Trace:
    """Trace the model; where that fails, its children one by one, so that they are still seen.

    The model itself is not touched: a copy that shares its parameters is traced, in eval mode.
    """
    found = Trace()
    try:
        # A forward may keep its tensors as attributes or change buffers: let it do so in a copy.
        twin = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    except Exception as error:
        found.failures[""] = f"could not be traced: it cannot be copied ({_first_line(error)})"
        return found
    with torch.random.fork_rng(devices=cuda_devices()):
        _trace_into(found, twin, "")
    return found


def _trace_into(found: Trace, module: nn.Module, prefix: str) -> None:
    if rule_for(module) is not None:
        found.output = "" if prefix == "" else found.output
        return
    if not isinstance(module, CONTAINERS) or isinstance(module, nn.Sequential):
        tracer = _Tracer(prefix)
        random_state = _random_state()
        try:
            graph = tracer.trace(module, concrete_args=_omitted(module))
        # whatever a user's forward raises on proxies means one thing: it cannot be traced
        except Exception as error:
            found.failures[prefix] = f"could not be traced: {_first_line(error)}"
        else:
            found.visited |= tracer.visited
            found.calls += _calls(graph, prefix)
            if _random_state() != random_state:
                found.random.add(prefix)
            if prefix == "":
                found.output = _output(graph)
            return
    for name, child in module.named_children():
        _trace_into(found, child, join(prefix, name))


def _random_state() -> list[bytes]:
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda_devices())]
    return [state.numpy().tobytes() for state in states]


def _omitted(module: nn.Module) -> dict[str, None]:
    """Arguments of forward that are None unless given: `if mask is None` is then decided."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: None for p in parameters if p.default is None}


def _calls(graph: fx.Graph, prefix: str) -> list[tuple[str, fx.Node]]:
    constant: set[fx.Node] = set()
    calls = []
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if _is_constant(node, constant):
            constant.add(node)
            continue
        stack = node.meta.get("nn_module_stack") or {}
        owner = next(reversed(stack.values()))[0] if stack else ""
        calls.append((join(prefix, owner), node))
    return calls


def _is_constant(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Sizes, and whatever is computed from constants alone: the same for all weights."""
    name = function_name(node)
    if name in _METADATA or (name == "getattr" and node.args[1] in _ATTRIBUTES):
        return True
    return name not in _RANDOM and all(n in constant for n in node.all_input_nodes)


def _output(graph: fx.Graph) -> str | None:
    result = next(iter(reversed(graph.nodes))).args[0]
    if isinstance(result, fx.Node) and result.op == "call_module":
        return str(result.target)
    return None


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:200]
