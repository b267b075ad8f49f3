"""Can a model's forward passes be followed without values, one path for all inputs? By torch.fx."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ...core.messages import type_and_line
from ..probing import cuda_devices
from .catalog import is_container, is_hooked, rule_for
from .watch import twin_of


@dataclass
class Trace:
    """What tracing saw.

    visited: paths of the modules whose own forward was traced. failures: path -> why not.
    output: path of the module whose result is the model's result, None where it is not a module's.
    """

    visited: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    output: str | None = None


class _Tracer(fx.Tracer):
    """Stops at the modules that the catalogue judges as a whole, and at those of type `whole`.

    Remembers whom it entered, and what a forward asked of a value although there is none: it may
    have caught the error, and taken a path that it takes for no tensor.
    """

    def __init__(self, prefix: str, whole: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.prefix, self.whole = prefix, whole
        self.visited = {prefix}
        self.asked = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self.whole) or rule_for(m) is not None:
            return True
        # torch's other modules are leaves, unless somebody's code runs with them
        return super().is_leaf_module(m, module_qualified_name) and not (
            is_hooked(m) or "forward" in vars(m)
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            self.visited.add(join(self.prefix, path))
        return super().call_module(m, forward, args, kwargs)

    def to_bool(self, obj: Any) -> bool:
        self.asked = self.asked or "its control flow asks for values"
        return super().to_bool(obj)

    def iter(self, obj: Any) -> Any:
        self.asked = self.asked or "it runs over the entries of a tensor"
        return super().iter(obj)


def join(prefix: str, name: str) -> str:
    """A dotted path; either part may be empty."""
    return ".".join(part for part in (prefix, name) if part)


def trace(model: nn.Module, *, whole: tuple[type[nn.Module], ...] = ()) -> Trace:
    """Trace the model; where that fails, its children one by one, so that they are still seen.

    whole: types of modules that are not entered. The model itself is not touched: a copy that
    shares its parameters is traced, in eval mode.
    """
    found = Trace()
    try:
        twin = twin_of(model)
    except Exception as error:
        found.failures[""] = f"could not be traced: it cannot be copied ({type_and_line(error)})"
        return found
    with torch.random.fork_rng(devices=cuda_devices()):
        _trace_into(found, twin, "", whole)
    return found


def _trace_into(
    found: Trace, module: nn.Module, prefix: str, whole: tuple[type[nn.Module], ...]
) -> None:
    if rule_for(module) is not None:
        found.output = "" if prefix == "" else found.output
        return
    if not is_container(module) or isinstance(module, nn.Sequential):
        tracer = _Tracer(prefix, whole)
        try:
            if is_hooked(module) or "forward" in vars(module):
                raise RuntimeError("it has hooks or a forward of its own")
            graph = tracer.trace(module, concrete_args=_omitted(module))
            if tracer.asked:
                raise RuntimeError(tracer.asked)
        # whatever a user's forward raises on proxies means one thing: it cannot be traced
        except Exception as error:
            found.failures[prefix] = f"could not be traced: {type_and_line(error)}"
        else:
            found.visited |= tracer.visited
            if prefix == "":
                found.output = _output(graph)
            return
    for name, child in module.named_children():
        _trace_into(found, child, join(prefix, name), whole)


def _omitted(module: nn.Module) -> dict[str, None]:
    """Arguments of forward that are None unless given: `if mask is None` is then decided."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: None for p in parameters if p.default is None}


def _output(graph: fx.Graph) -> str | None:
    result = next(iter(reversed(graph.nodes))).args[0]
    if isinstance(result, fx.Node) and result.op == "call_module":
        return str(result.target)
    return None
