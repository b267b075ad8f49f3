"""A tamer backbone for residual networks: the branches' last layers, made small."""

import math
from numbers import Real

from torch import Tensor, fx, nn

from ..model.holding import trainable
from ..model.probing import unwrap
from .backbone_graph import WEIGHTED, BackboneGraph, backbone_graph
from .bounded import Unbounded


def damped(model: nn.Module, factor: float, identity: float | None = None) -> dict[str, Tensor]:
    """Entries of the state dict that shrink every residual branch to `factor` times itself.

    identity: the factor of branches whose shortcut has no weights of its own, `factor` by default.

    A residual sum has two operands that both depend on the input. Its branch is the operand with
    more weighted layers (linear, convolution) of its own, the other one the shortcut; the weight
    and bias of the branch's last such layer are multiplied by `factor`. Error bounds then grow by
    what the shortcuts do, and with factor 0 the branches need not be computed. As Assumption 1 asks
    for some weights, these are as good a witness as any.

    Factors lie between 0 and 1, exact in any dtype for 0 and powers of two. Names and dtypes are
    the model's; {} where no residual sum is found, as in a model that cannot be traced. Branches
    whose last layer is frozen (requires_grad=False) keep it. The model is not changed. Raises
    TypeError and ValueError for a wrong factor.
    """
    identity = factor if identity is None else identity
    for name, value in (("factor", factor), ("identity", identity)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
    source = unwrap(model)
    try:
        graph = backbone_graph(source, None)
    except Unbounded:
        return {}
    state = source.state_dict()
    changed: dict[str, Tensor] = {}
    for layer, plain in _last_layers(graph):
        times = identity if plain else factor
        module = source.get_submodule(layer)
        if not all(trainable(module, name) for name, _ in module.named_parameters(recurse=False)):
            continue
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in state and times != 1:
                changed[name] = state[name].detach() * times
    return changed


def _last_layers(graph: BackboneGraph) -> list[tuple[str, bool]]:
    """Paths of the residual branches' last weighted layers; whether the shortcut has no weights."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    behind: dict[fx.Node, set[fx.Node]] = {}  # each node with all that it depends on
    for node in graph.nodes:
        behind[node] = {node}.union(*(behind[operand] for operand in node.all_input_nodes))
    inputs = {node for node in graph.nodes if node.op == "placeholder"}
    layers = []
    for node in graph.nodes:
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if node.op == "call_module" or graph.rule(node) != "add" or len(operands) != 2:
            continue
        a, b = operands
        if not inputs & behind[a] & behind[b]:
            continue
        own = [_weighted(graph, behind[a] - behind[b]), _weighted(graph, behind[b] - behind[a])]
        if len(own[0]) != len(own[1]):
            branch = max(own, key=len)
            last = str(max(branch, key=order.__getitem__).target)
            layers.append((last, not min(own, key=len)))
    return layers


def _weighted(graph: BackboneGraph, nodes: set[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if type(graph.module(node)) in WEIGHTED]
