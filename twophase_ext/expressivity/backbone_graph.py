"""The calls between a model's input and one of its layers, and which rule bounds each of them."""

import builtins
import copy
import inspect
import math
import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import ops
from ..core.messages import type_and_line
from ..model.probing import cuda_devices
from ..model.softplus import Softplus
from .bounded import Unbounded

Invoke = Callable[[Any], dict[str, Any]]

# Methods and functions by their own names; torch's several names of one function share a rule.
_FUNCTIONS: dict[Any, str] = {
    ops.softplus: "softplus",
    ops.softplus_: "softplus",
    F.linear: "linear",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.batch_norm: "batch_norm",
    F.layer_norm: "layer_norm",
    F.avg_pool2d: "avg_pool2d",
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d",
    F.pad: "pad",
    **dict.fromkeys((F.relu, torch.relu, torch.relu_), "relu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_), "tanh"),
    F.silu: "silu",
    F.gelu: "gelu",
    **dict.fromkeys((operator.add, operator.iadd, torch.add), "add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract), "sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), "mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.true_divide), "div"),
    **dict.fromkeys((operator.neg, torch.neg, torch.negative), "neg"),
    torch.mean: "mean",
    torch.sum: "sum",
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "cat"),
    **dict.fromkeys((torch.flatten, torch.reshape), "reshape"),
    **dict.fromkeys((torch.permute, torch.transpose, torch.swapaxes), "permute"),
    **dict.fromkeys((torch.unsqueeze, torch.squeeze), "squeeze"),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, torch.dropout), "dropout"),
}
_METHODS: dict[str, str] = {
    **{n: n for n in ("relu", "sigmoid", "tanh", "add", "sub", "mul", "div", "neg", "mean", "sum")},
    **{f"{n}_": n for n in ("relu", "sigmoid", "tanh", "add", "sub", "mul", "div", "neg")},
    **dict.fromkeys(("view", "reshape", "flatten"), "reshape"),
    **dict.fromkeys(("permute", "transpose", "swapaxes"), "permute"),
    **dict.fromkeys(("unsqueeze", "squeeze"), "squeeze"),
    **dict.fromkeys(("contiguous", "clone", "detach"), "same"),
}


def _affine(m: Any) -> dict[str, Any]:
    return {"weight": m.weight, "bias": m.bias}


def _conv(m: Any) -> dict[str, Any]:
    if m.padding_mode != "zeros":
        raise Unbounded(f"no rule for padding_mode={m.padding_mode!r}; 'zeros' has one")
    return _affine(m) | {n: getattr(m, n) for n in ("stride", "padding", "dilation", "groups")}


def _batch_norm(m: Any) -> dict[str, Any]:
    names = ("running_mean", "running_var", "weight", "bias", "training", "eps")
    return {name: getattr(m, name) for name in names}


def _settings(*names: str) -> Invoke:
    return lambda m: {name: getattr(m, name) for name in names}


_MODULES: dict[type[nn.Module], tuple[str, Invoke]] = {
    nn.Linear: ("linear", _affine),
    nn.Conv1d: ("conv1d", _conv),
    nn.Conv2d: ("conv2d", _conv),
    nn.BatchNorm1d: ("batch_norm", _batch_norm),
    nn.BatchNorm2d: ("batch_norm", _batch_norm),
    nn.LayerNorm: ("layer_norm", _settings("normalized_shape", "weight", "bias", "eps")),
    Softplus: ("softplus", _settings("beta")),
    nn.ReLU: ("relu", _settings()),
    nn.Sigmoid: ("sigmoid", _settings()),
    nn.Tanh: ("tanh", _settings()),
    nn.SiLU: ("silu", _settings()),
    nn.GELU: ("gelu", _settings("approximate")),
    nn.AvgPool2d: (
        "avg_pool2d",
        _settings(
            *("kernel_size", "stride", "padding", "ceil_mode"),
            *("count_include_pad", "divisor_override"),
        ),
    ),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", _settings("output_size")),
    nn.Flatten: ("reshape", _settings("start_dim", "end_dim")),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d), ("same", _settings())),
}
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)

# Results that share no memory with an operand (unless the call works in place).
_FRESH = {
    *("linear", "conv1d", "conv2d", "batch_norm", "layer_norm", "softplus", "relu", "sigmoid"),
    *("tanh", "silu", "gelu", "add", "sub", "mul", "div", "neg", "mean", "sum", "cat", "pad"),
    *("avg_pool2d", "adaptive_avg_pool2d"),
}
_AUGMENTED = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)
_IN_PLACE = {getattr(operator, name) for name in _AUGMENTED}
_PLAIN = {"size", "dim", "ndimension", "numel"}  # of a tensor's shape
_PLAIN_MODULES = ("_operator", "builtins", "math")


class _Reached(BaseException):
    """The stop layer is called. Not an Exception, which a forward might swallow."""


class _Proxy(fx.Proxy):
    """Records `y += x` as in place, where fx records y = y + x."""


def _augmented(function: Any) -> Callable[[_Proxy, Any], Any]:
    def record(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in _AUGMENTED:
    setattr(_Proxy, f"__{_name}__", _augmented(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def __init__(self, stop: nn.Module | None) -> None:
        # softplus is an autograd.Function, which fx cannot enter: one call, under both names
        root = sys.modules[ops.__name__.partition(".")[0]]
        super().__init__(autowrap_modules=(math, ops, root))  # type: ignore[arg-type]
        self.stop = stop
        self.reached: fx.Node | None = None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is self.stop or type(m) in _MODULES or super().is_leaf_module(m, "")

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m is self.stop:
            given = args[0] if args else kwargs["input"]
            self.reached = given.node
            raise _Reached
        return super().call_module(m, forward, args, kwargs)


class BackboneGraph(NamedTuple):
    """nodes: calls in order; output: the node of the stop layer's input, or of the model's output.

    model: the copy in evaluation mode whose modules the nodes name.
    """

    nodes: list[fx.Node]
    output: fx.Node
    model: nn.Module

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that the node calls, None where it calls none."""
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def rule(self, node: fx.Node) -> str | None:
        """Name of the rule for the node's call, None where there is none."""
        if node.op == "call_module":
            return _MODULES.get(type(self.module(node)), (None,))[0]  # type: ignore[arg-type]
        known: dict[Any, str] = _METHODS if node.op == "call_method" else _FUNCTIONS
        return known.get(node.target)

    def label(self, node: fx.Node) -> str:
        """The node for a person: module path and type, or function and whose forward calls it."""
        if node.op == "call_module":
            return f"{node.target} ({type(self.module(node)).__name__})"
        name = node.target if isinstance(node.target, str) else node.target.__name__
        stack = node.meta.get("nn_module_stack") or {}
        owner = next(reversed(stack.values()))[0] if stack else ""
        return f"{name} in {owner or 'the model'}'s forward"


def backbone_graph(model: nn.Module, stop: str | None) -> BackboneGraph:
    """Trace a copy of the model up to the layer named `stop` (to its output where it is None).

    The copy is in evaluation mode and in float64; parameters that are float64 already are shared.
    Raises Unbounded where torch.fx cannot trace the model, and where hooks, a replaced forward or a
    tensor overwritten between two uses make a call differ from what the graph says.
    """
    shared = {id(p): p for p in model.parameters()}
    if any(p.dtype != torch.float64 for p in shared.values()):
        shared = {}
    try:
        twin = copy.deepcopy(model, shared).double().eval()  # type: ignore[arg-type]
    except Exception as error:  # whatever a user's tensors raise
        raise Unbounded(f"model: it cannot be copied ({type_and_line(error)})") from error
    layer = None if stop is None else twin.get_submodule(stop)
    tracer = _Tracer(layer)
    with torch.random.fork_rng(devices=cuda_devices()):
        state = torch.get_rng_state()
        try:
            tracer.trace(twin, concrete_args=_omitted(twin))
        except _Reached:
            pass
        except Exception as error:  # whatever a user's forward raises on proxies
            raise Unbounded(f"model: torch.fx cannot trace it ({type_and_line(error)})") from error
        if not torch.equal(state, torch.get_rng_state()):
            raise Unbounded("model: its forward pass draws random numbers")
    nodes = list(tracer.graph.nodes)
    if stop is None:
        output = nodes[-1].args[0]
        nodes = nodes[:-1]
    else:
        output = tracer.reached
    if not isinstance(output, fx.Node):
        raise Unbounded(f"model: its forward pass does not reach {stop or 'a tensor'}")
    graph = BackboneGraph(nodes, output, twin)
    _refuse_hooks("model", twin)
    if layer is not None:
        _refuse_hooks(str(stop), layer)
    _refuse_overwritten(graph)
    return graph


def arguments(graph: BackboneGraph, node: fx.Node) -> dict[str, Any]:
    """What a module's call passes to its rule besides the activation; Unbounded where it cannot."""
    module = graph.module(node)
    assert module is not None
    _refuse_hooks(str(node.target), module)
    if module.training:
        raise Unbounded("it does not obey eval()")
    return _MODULES[type(module)][1](module)


def plain_call(node: fx.Node) -> bool:
    """Whether the call computes with sizes and numbers, given that no operand is a tensor."""
    return node.op == "call_function" and (
        getattr(node.target, "__module__", "") in _PLAIN_MODULES or node.target is builtins.getattr
    )


def shape_call(node: fx.Node) -> bool:
    """Whether the call asks for an activation's shape."""
    if node.op == "call_method":
        return node.target in _PLAIN
    return node.target is builtins.getattr and node.args[1] in ("shape", "ndim")


def _refuse_hooks(name: str, module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise Unbounded(f"{name}: hooks or a replaced forward may change what it computes")


def _refuse_overwritten(graph: BackboneGraph) -> None:
    """The graph is evaluated without in-place writes: nobody may read what one has overwritten."""
    shares: dict[fx.Node, set[fx.Node]] = {}  # nodes that may share memory, one set for all of them
    overwritten: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            if operand in overwritten:
                raise Unbounded(
                    f"{graph.label(node)}: uses what {graph.label(overwritten[operand])} "
                    "has overwritten in place"
                )
        target = _written(graph, node)
        if target is not None:
            overwritten.update(dict.fromkeys(shares[target], node))
        own = {node}
        if target is not None or graph.rule(node) not in _FRESH:
            for operand in node.all_input_nodes:
                own |= shares[operand]
        for member in own:
            shares[member] = own
    if graph.output in overwritten:
        raise Unbounded(f"{graph.label(overwritten[graph.output])}: overwrites the features")


def _written(graph: BackboneGraph, node: fx.Node) -> fx.Node | None:
    """The operand that the call overwrites."""
    if "out" in node.kwargs:
        written = node.kwargs["out"]
    else:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = (
            getattr(graph.module(node), "inplace", False)
            if node.op == "call_module"
            else node.op in ("call_function", "call_method")
            and (
                bool(node.kwargs.get("inplace", False))
                or node.target in _IN_PLACE
                or node.target is operator.setitem
                or (name.endswith("_") and not name.endswith("__"))
            )
        )
        written = node.all_input_nodes[0] if in_place and node.all_input_nodes else None
    return written if isinstance(written, fx.Node) else None


def _omitted(module: nn.Module) -> dict[str, None]:
    """Arguments of forward that are None unless given: `if mask is None` is then decided."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: None for p in parameters if p.default is None}


def is_zero(weight: Tensor) -> bool:
    """Whether every entry is zero."""
    return not bool(weight.detach().any())
