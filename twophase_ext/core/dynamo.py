"""What torch.compile is told of this package, without importing it: that takes seconds."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
DYNAMO = "torch._dynamo"


class _WithDynamo(MetaPathFinder):
    """Finds torch._dynamo as Python does, and calls `then` once it is imported."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.then = then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != DYNAMO:
            return None
        sys.meta_path.remove(self)
        others = [f for f in sys.meta_path if isinstance(f, _WithDynamo)]  # of other functions
        spec = others[0].find_spec(name, path, target) if others else None
        spec = spec or PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self.then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def allowed_in_graph(function: F) -> F:
    """torch.compiler.allow_in_graph(function), at once or as soon as torch._dynamo is imported."""
    if DYNAMO in sys.modules:
        torch.compiler.allow_in_graph(function)
    else:
        sys.meta_path.insert(0, _WithDynamo(lambda: torch.compiler.allow_in_graph(function)))
    return function
