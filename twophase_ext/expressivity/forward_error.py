"""The wide layer's input with a proved bound of its rounding error.

The model's graph (torch.fx) is evaluated in float64 with one bound for each sample, rule by rule
(error_rules.py). What a layer of zero weights would read is not computed: its result is its bias.
"""

import inspect
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..model.probing import input_of, unwrap
from .backbone_graph import (
    WEIGHTED,
    BackboneGraph,
    arguments,
    backbone_graph,
    is_zero,
    plain_call,
    shape_call,
)
from .bounded import ARITHMETIC, LIBM, SOFTPLUS, Bounded, Unbounded, exact
from .damping import damped
from .error_rules import Rules

__all__ = ["BoundedFeatures", "Unbounded", "bounded_features", "damped"]

_ASSUMED = {"softplus": SOFTPLUS, **dict.fromkeys(("sigmoid", "tanh", "silu", "gelu"), LIBM)}
# What the graph computes and what the model computes, both in float64, agree within
# CHECK_ERRORS bounds and CHECK_RELATIVE of the size: else the graph is not the model.
CHECK_ERRORS, CHECK_RELATIVE = 8, 1e-8


@dataclass(frozen=True)
class BoundedFeatures:
    """Computed features z [n, d] and error [n] >= ||z_i - exact z_i||_2, float64.

    assumptions: what the bound rests on, in words. seconds: wall-clock time.
    """

    z: Tensor
    error: Tensor
    assumptions: list[str]
    seconds: float


@torch.no_grad()
def bounded_features(
    model: nn.Module,
    stop: nn.Module,
    batches: Iterable[Tensor],
    *,
    n: int,
    progress: Callable[[int], object] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> BoundedFeatures:
    """The input of the layer `stop` for all samples, with a bound of each sample's error.

    batches: floating-point tensors [b, ...] on the model's device, n samples in all, taken as
    exact. The model runs in evaluation mode: BatchNorm's running statistics are constants.
    "Exact" is real arithmetic on the stored weights and inputs; the bound holds for the float64
    arithmetic in `assumptions`. z or error is NaN or infinite where the computation overflows.
    progress: called with the number of samples done. say: gets one line.

    Raises Unbounded (a ValueError) naming the module or call that has no rule, and where the model
    cannot be traced; ValueError where `stop` is not in the model or n is not the number of samples.
    """
    started = time.perf_counter()
    source = unwrap(model)
    names = {module: name for name, module in source.named_modules()}
    if stop not in names:
        raise ValueError("stop: expected a module of the model")
    graph = backbone_graph(source, names[stop])
    evaluation = _Evaluation(graph, graph.model.get_submodule(names[stop]))
    z: Tensor | None = None
    done = 0
    for x in batches:
        if not x.is_floating_point():
            raise Unbounded(f"x: no rule for inputs of dtype {x.dtype}; expected real numbers")
        if x.dim() < 2 or done + len(x) > n:
            what = f"{tuple(x.shape)} after {done}"
            raise ValueError(f"batches: expected {n} samples in batches [b, ...], got {what}")
        if len(x) == 0:
            continue
        x = x.double()
        if z is None:
            evaluation.prepare(x[:2].clone())  # the model may work in place
        features = evaluation(x)
        if features.value.dim() != 2:
            raise Unbounded(f"stop: expected features [b, d], got {tuple(features.value.shape)}")
        if z is None:
            z, error = x.new_empty(n, features.value.shape[1]), x.new_empty(n)
            evaluation.check(x[:2], features)
        z[done : done + len(x)], error[done : done + len(x)] = features.value, features.error
        done += len(x)
        progress(len(x))
    if z is None or done != n:
        raise ValueError(f"batches: expected {n} samples, got {done}")
    say(f"features: {len(evaluation.needed)} calls, {len(evaluation.zero)} layers of zero weights")
    assumptions = [ARITHMETIC]
    for rule in map(graph.rule, evaluation.needed):
        if rule in _ASSUMED and _ASSUMED[rule] not in assumptions:
            assumptions.append(_ASSUMED[rule])
    return BoundedFeatures(z, error, assumptions, time.perf_counter() - started)


class _Evaluation:
    """The graph as a function of a batch."""

    def __init__(self, graph: BackboneGraph, stop: nn.Module) -> None:
        self.graph, self.stop = graph, stop
        self.rules = Rules()
        self.zero: dict[fx.Node, tuple[int, ...]] = {}  # layers of zero weights: a sample's shape
        self.needed: list[fx.Node] = []
        self.last_use: dict[fx.Node, fx.Node] = {}

    def prepare(self, x: Tensor) -> None:
        """Find the layers of zero weights by a run of the model, and what is needed besides."""
        shapes: dict[nn.Module, list[tuple[int, ...]]] = {}
        handles = []
        for node in self.graph.nodes:
            module = self.graph.module(node)
            if type(module) in WEIGHTED and is_zero(module.weight) and module not in shapes:  # type: ignore[union-attr, arg-type]
                shapes[module] = []  # type: ignore[index]
                handles.append(module.register_forward_hook(self._remember(shapes)))  # type: ignore[union-attr]
        self.reference = input_of(self.graph.model, self.stop, x)
        for handle in handles:
            handle.remove()
        for node in self.graph.nodes:
            seen = shapes.get(self.graph.module(node), [])  # type: ignore[arg-type]
            if len(seen) == 1:
                arguments(self.graph, node)  # refuses what may change its result
                self.zero[node] = seen[0]
        wanted, found = [self.graph.output], set()
        while wanted:
            node = wanted.pop()
            if node not in found:
                found.add(node)
                wanted += [] if node in self.zero else node.all_input_nodes
        # whatever is not reached, a zero layer's input too, is not computed
        self.needed = [node for node in self.graph.nodes if node in found]
        self.zero = {node: shape for node, shape in self.zero.items() if node in found}
        for node in self.needed:
            for operand in () if node in self.zero else node.all_input_nodes:
                self.last_use[operand] = node

    @staticmethod
    def _remember(shapes: dict[nn.Module, list[tuple[int, ...]]]) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            shapes[module].append(tuple(output.shape[1:]))

        return hook

    def check(self, x: Tensor, features: Bounded) -> None:
        """Compare the graph's result with the model's own for a sample or two."""
        value, error = features.value[: len(x)], features.error[: len(x)]
        apart = (value - self.reference).norm(dim=1)
        allowed = CHECK_ERRORS * error + CHECK_RELATIVE * self.reference.norm(dim=1)
        if bool((apart > allowed).any()):
            raise Unbounded("model: its traced calls do not reproduce its forward pass")

    def __call__(self, x: Tensor) -> Bounded:
        """The output node's activation for a batch."""
        values: dict[fx.Node, Any] = {}
        for node in self.needed:
            try:
                values[node] = self._evaluate(node, values, x)
            except Unbounded as error:
                raise Unbounded(f"{self.graph.label(node)}: {error}") from None
            for operand in node.all_input_nodes:
                if self.last_use.get(operand) is node and operand is not self.graph.output:
                    del values[operand]
        result = values[self.graph.output]
        if not isinstance(result, Bounded):
            raise Unbounded("stop: its input does not depend on the data")
        return result

    def _evaluate(self, node: fx.Node, values: dict[fx.Node, Any], x: Tensor) -> Any:
        if node in self.zero:
            return self._bias_of(node, len(x), x)
        if node.op == "placeholder":
            first = node is next(n for n in self.graph.nodes if n.op == "placeholder")
            if first:
                return exact(x)
            return node.args[0] if node.args else None
        if node.op == "get_attr":
            if str(node.target).startswith("_tensor_constant"):
                raise Unbounded("no rule for a tensor that the forward pass makes of constants")
            return _attribute(self.graph.model, str(node.target))
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = dict(fx.node.map_arg(node.kwargs, values.__getitem__))
        tensors = [a for a in _leaves((args, kwargs)) if isinstance(a, Bounded | Tensor)]
        if shape_call(node) and isinstance(args[0], Bounded):
            tensor = args[0].value
            if node.op == "call_method":
                return getattr(tensor, str(node.target))(*args[1:], **kwargs)
            return getattr(tensor, args[1])
        if not tensors and plain_call(node):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        rule = self.graph.rule(node)
        if rule is None or not any(isinstance(t, Bounded) for t in tensors):
            raise Unbounded("no rule for its error")
        if node.op == "call_module":
            kwargs |= arguments(self.graph, node)
        if rule in ("same", "reshape", "permute", "squeeze", "dropout"):
            return _moved(node, rule, args, kwargs)
        call = getattr(self.rules, rule)
        kwargs.pop("inplace", None)
        try:
            inspect.signature(call).bind(*args, **kwargs)
        except TypeError as error:
            raise Unbounded(f"no rule for these arguments ({error})") from None
        return call(*args, **kwargs)

    def _bias_of(self, node: fx.Node, count: int, x: Tensor) -> Bounded:
        bias = self.graph.module(node).bias  # type: ignore[union-attr]
        shape = (count, *self.zero[node])
        if bias is None:
            return exact(x.new_zeros(1).expand(shape))
        axis = -1 if type(self.graph.module(node)) is nn.Linear else 1
        view = [1] * len(shape)
        view[axis] = -1
        return exact(bias.detach().view(view).expand(shape))  # type: ignore[operator]


def _moved(node: fx.Node, rule: str, args: Any, kwargs: dict[str, Any]) -> Bounded:
    """Calls that move numbers about; the samples have to stay where they are."""
    x, rest = args[0], args[1:]
    if not isinstance(x, Bounded):
        raise Unbounded("no rule for its error")
    value = x.value
    if rule == "same":
        return x
    if rule == "dropout":
        training = rest[1] if len(rest) > 1 else kwargs.get("training", kwargs.get("train", True))
        if training:
            raise Unbounded("dropout is on; pass training=self.training")
        return x
    if node.op == "call_module":
        moved = value.flatten(**kwargs)
    elif node.op == "call_method":
        moved = getattr(value, str(node.target))(*rest, **kwargs)
    else:
        moved = node.target(value, *rest, **kwargs)  # type: ignore[operator]
    # Row-major order keeps samples together if their number stays.
    axes = [a for a in _leaves((rest, list(kwargs.values()))) if isinstance(a, int)]
    if rule == "permute":
        swaps = "permute" not in str(getattr(node.target, "__name__", node.target))
        stays = 0 not in [a % value.dim() for a in axes] if swaps else axes[0] % value.dim() == 0
    else:
        stays = rule == "reshape" or (
            len(axes) == 1 and axes[0] % max(value.dim(), moved.dim()) != 0
        )
    if not stays or len(moved) != len(value) or moved.dim() < 2 or moved.dtype != value.dtype:
        raise Unbounded("it mixes the samples")
    return Bounded(moved, x.error)


def _leaves(nested: Any) -> list[Any]:
    if isinstance(nested, tuple | list):
        return [leaf for item in nested for leaf in _leaves(item)]
    if isinstance(nested, dict):
        return _leaves(list(nested.values()))
    return [nested]


def _attribute(model: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)
