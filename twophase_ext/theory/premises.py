"""Premises of Theorem 1 that the model, the loss and the number of samples decide."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..core.messages import type_and_line
from ..model.losses import resolve_loss
from ..model.network import Network
from ..nn import classify

HELD, FAILED, UNCHECKED = "held", "failed", "not checked"


@dataclass
class Assumption:
    """One premise: its name, held / failed / not checked / not met, the evidence, what to do."""

    name: str
    status: str
    evidence: str
    advice: str = ""


def loss_premise(loss: Any) -> Assumption:
    """Assumption 2: convex in the output, gradient L_ell-Lipschitz. ValueError: unknown name."""
    name = "convex, smooth loss"
    try:
        resolved = resolve_loss(loss)
    except ValueError as error:
        if isinstance(loss, str):
            raise
        return Assumption(
            name,
            FAILED,
            str(error),
            "use 'cross_entropy', a loss of torch.nn, or declare your own by tp.ConvexLoss",
        )
    evidence = f"{resolved.name}, L_ell = {resolved.smoothness:g}"
    if resolved.known:
        return Assumption(name, HELD, evidence)
    return Assumption(
        name,
        UNCHECKED,
        f"{evidence}, as declared",
        "Assumption 2: convex in the output, its gradient L_ell-Lipschitz; show it on paper",
    )


def width_premise(network: Network, n: int, distinct: int) -> Assumption:
    """[h_X', 1] has at least N = distinct columns, without which its rank cannot be N."""
    bias = network.last.module.bias
    ones = bias is not None and bias.requires_grad
    evidence = f"m_H = {network.width}, n = {n}"
    if distinct < n:
        evidence += f", N = {distinct} distinct inputs"
    if not ones:
        evidence += "; without a trainable bias in the last layer there is no column of ones"
    elif network.width == distinct - 1:
        evidence += "; enough with the column of ones, Theorem 2 itself asks for m_H >= N"
    return Assumption(
        "m_H >= N - 1" if ones else "m_H >= N",
        HELD if network.width + ones >= distinct else FAILED,
        evidence,
        f"tp.nn.widen(model, {distinct}) adds a softplus layer of 1.1 N units before the last one",
    )


def analytic_premises(
    model: nn.Module, batches: Sequence[Tensor] | None = None, *, whole: bool = False
) -> list[Assumption]:
    """h_X is real analytic: the modules, and the functions that they call; one row or more each.

    batches: inputs as the model takes them, on which `classify` runs it; whole: they are all.
    """
    try:
        findings = classify(model, example_input=batches, whole=whole, frozen=True)
    except Exception as error:  # a rule's own: what is not judged is no reason to lose the rest
        evidence = f"not judged: {type_and_line(error)}"
        names = ("analytic modules", "analytic calls")
        return [Assumption(name, UNCHECKED, evidence) for name in names]
    bad = [finding for finding in findings if finding.status != "analytic"]
    rows: dict[str, list[Assumption]] = {"analytic modules": [], "analytic calls": []}
    for finding in bad:
        name = "analytic calls" if finding.kind.startswith("function ") else "analytic modules"
        status = FAILED if finding.status == "not analytic" else UNCHECKED
        evidence = f"{finding.name or 'the model'} ({finding.kind}) is {finding.status}"
        cure = "; tp.nn.analytic(model) puts analytic functions there" if status == FAILED else ""
        rows[name].append(Assumption(name, status, evidence, f"{finding.reason}{cure}"))
    if not rows["analytic modules"]:
        evidence = f"all {len(findings) - len(bad)} modules"
        dropout = [k for k, m in model.named_modules() if isinstance(m, _DropoutNd) and m.p > 0]
        if dropout:
            evidence += (
                f" in eval mode, as in the second phase; {', '.join(dropout[:3])} (dropout) "
                "random in train mode"
            )
        rows["analytic modules"].append(Assumption("analytic modules", HELD, evidence))
    if not rows["analytic calls"]:
        unseen = [f.name or "the model" for f in bad if f.status == "unknown"]
        evidence = f"not seen in {', '.join(unseen)}" if unseen else "none found that is not"
        status = UNCHECKED if unseen else HELD
        rows["analytic calls"].append(Assumption("analytic calls", status, evidence))
    return [*rows["analytic modules"], *rows["analytic calls"]]


def depth_premise(model: nn.Module, network: Network) -> Assumption:
    """H counts hidden layers: modules with a matrix of weights before the last layer."""
    matrices = [m for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    hidden = len(matrices) - 1
    return Assumption(
        "H >= 2",
        HELD if hidden >= 2 else FAILED,
        f"{hidden} hidden layers before {network.last.name}",
        "tp.nn.widen(model, n) adds one hidden layer",
    )
