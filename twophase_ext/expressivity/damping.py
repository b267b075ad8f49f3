"""A tamer backbone for residual networks: the branches' last layers, made small."""

import math
from numbers import Real

from torch import Tensor, fx, nn

from ..probing import unwrap
from .backbone_graph import WEIGHTED, BackboneGraph, backbone_graph
from .bounded import Unbounded


def damped(model: nn.Module, factor: float) -> dict[str, Tensor]:
    """Entries of the state dict that shrink every residual branch to `factor` times itself.

    A residual sum has two operands that both depend on the input. Its branch is the operand with
    more weighted layers (linear, convolution) of its own, the other one the shortcut; the weight
    and bias of the branch's last such layer are multiplied by `factor`. Error bounds then grow by
    what the shortcuts do, and with factor 0 the branches need not be computed. As Assumption 1 asks
    for some weights, these are as good a witness as any.

    factor: 0 <= factor < 1, exact in any dtype for 0 and powers of two. Names and dtypes are the
    model's; {} where no residual sum is found, as in a model that cannot be traced. The model is
    not changed. Raises TypeError and ValueError for a wrong factor.
    """
    if isinstance(factor, bool) or not isinstance(factor, Real):
        raise TypeError(f"factor: expected a number, got {type(factor).__name__}")
    if not (math.isfinite(factor) and 0 <= factor < 1):
        raise ValueError(f"factor: expected 0 <= factor < 1, got {factor}")
    source = unwrap(model)
    try:
        graph = backbone_graph(source, None)
    except Unbounded:
        return {}
    state = source.state_dict()
    changed: dict[str, Tensor] = {}
    for layer in _last_layers(graph):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in state:
                changed[name] = state[name].detach() * factor
    return changed


def _last_layers(graph: BackboneGraph) -> list[str]:
    """Paths of the last weighted layers of the residual branches."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    behind: dict[fx.Node, set[fx.Node]] = {}  # each node with all that it depends on
    for node in graph.nodes:
        behind[node] = {node}.union(*(behind[operand] for operand in node.all_input_nodes))
    layers = []
    for node in graph.nodes:
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if node.op == "call_module" or graph.rule(node) != "add" or len(operands) != 2:
            continue
        a, b = operands
        if not any(n.op == "placeholder" for n in behind[a] & behind[b]):
            continue
        own = [_weighted(graph, behind[a] - behind[b]), _weighted(graph, behind[b] - behind[a])]
        if len(own[0]) != len(own[1]):
            branch = max(own, key=len)
            layers.append(str(max(branch, key=order.__getitem__).target))
    return layers


def _weighted(graph: BackboneGraph, nodes: set[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if type(graph.module(node)) in WEIGHTED]
