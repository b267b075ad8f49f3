"""The premises of Theorem 1, checked for a user's own model, loss and data."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .expressivity import Verdict
from .expressivity.verify import (
    as_example,
    checked_inputs,
    first_parameter,
    identical_rows,
    verify_network,
)
from .network import Network
from .nn import classify
from .training.losses import ConvexLoss, resolve_loss

HELD, FAILED, UNCHECKED = "held", "failed", "not checked"


@dataclass
class Assumption:
    """One premise: its name, held / failed / not checked, the evidence, and what to do."""

    name: str
    status: str
    evidence: str
    advice: str = ""


@dataclass
class Assumptions:
    """The table that `check_assumptions` returns; print it."""

    rows: list[Assumption] = field(default_factory=list)
    verdict: Verdict | None = None

    @property
    def hold(self) -> bool:
        """Whether no premise failed (some may be unchecked)."""
        return all(row.status != FAILED for row in self.rows)

    def __str__(self) -> str:
        """A table for a person."""
        width = max(len(row.name) for row in self.rows)
        lines = []
        for row in self.rows:
            lines.append(f"{row.name:<{width}}  {row.status:<11}  {row.evidence}")
            if row.advice and row.status != HELD:
                lines.append(f"{'':<{width}}               -> {row.advice}")
        return "\n".join(lines)


def check_assumptions(
    model: nn.Module,
    x: Any,
    *,
    loss: str | ConvexLoss = "cross_entropy",
    last_layer: nn.Module | str | None = None,
    method: str = "auto",
) -> Assumptions:
    """Check what Theorem 1 asks of a model, its loss and its n training inputs x.

    Rows: affine last layer; every module real analytic; functional calls analytic; loss convex and
    smooth (Assumption 2, with L_ell); H >= 2; m_H >= n - 1; inputs distinct; expressivity
    (Assumption 1 at the model's weights, by `verify_expressivity` with `method`). x: tensor or
    array [n, ...], uint8 scaled to [0, 1]. The model is not changed. Raises as verify_expressivity.
    """
    x = checked_inputs(x)
    resolved = resolve_loss(loss)
    table = Assumptions()
    parameter = first_parameter(model)

    def place(part: torch.Tensor) -> torch.Tensor:
        part = part.to(parameter.device)
        return part.to(parameter.dtype) / 255 if part.dtype == torch.uint8 else part

    try:
        network = Network(model, as_example(x, parameter), last_layer)
    except (ValueError, TypeError) as error:
        table.rows.append(Assumption("affine last layer", FAILED, str(error), "name last_layer="))
        return table
    table.rows.append(
        Assumption(
            "affine last layer",
            HELD,
            f"{network.last.name}, {network.width} -> {network.outputs}",
        )
    )
    table.rows += _analyticity(model)
    table.rows.append(
        Assumption("convex, smooth loss", HELD, f"{resolved.name}, L_ell = {resolved.smoothness:g}")
    )
    table.rows.append(_depth(model, network))
    n, width = len(x), network.width
    table.rows.append(
        Assumption(
            "m_H >= n - 1",
            HELD if width >= n - 1 else FAILED,
            f"m_H = {width}, n = {n}",
            "tp.nn.widen(model, n) adds the wide softplus layer",
        )
    )
    groups = identical_rows(x.cpu().flatten(1))
    table.rows.append(
        Assumption(
            "distinct inputs",
            FAILED if groups else HELD,
            f"{len(groups)} groups of identical inputs, first {groups[0][:5]}"
            if groups
            else f"{n} inputs, all different",
            "remove all but one of each group",
        )
    )
    verdict = verify_network(
        network, [(place(part), None) for part in x.split(256)], n=n, method=method
    )
    status = {"proved": HELD, "deficient": FAILED}.get(verdict.status, UNCHECKED)
    evidence = verdict.reason
    if verdict.status == "full rank":
        status = HELD
        evidence = (
            f"rank {verdict.rank} of {n} at these weights, counted in float64 (not proved), "
            f"sigma_min {verdict.sigma_min:.2e}"
        )
    table.rows.append(Assumption("expressivity", status, evidence))
    table.verdict = verdict
    return table


def _analyticity(model: nn.Module) -> list[Assumption]:
    findings = classify(model)
    bad = [finding for finding in findings if finding.status != "analytic"]
    rows: dict[str, list[Assumption]] = {"analytic modules": [], "analytic calls": []}
    for finding in bad:
        name = "analytic calls" if finding.kind.startswith("function ") else "analytic modules"
        status = FAILED if finding.status == "not analytic" else UNCHECKED
        evidence = f"{finding.name or 'the model'} ({finding.kind}) is {finding.status}"
        rows[name].append(Assumption(name, status, evidence, finding.reason))
    if not rows["analytic modules"]:
        held = Assumption("analytic modules", HELD, f"all {len(findings) - len(bad)} modules")
        rows["analytic modules"].append(held)
    if not rows["analytic calls"]:
        unseen = [f.name or "the model" for f in bad if f.status == "unknown"]
        evidence = f"not seen in {', '.join(unseen)}" if unseen else "none found that is not"
        status = UNCHECKED if unseen else HELD
        rows["analytic calls"].append(Assumption("analytic calls", status, evidence))
    return [*rows["analytic modules"], *rows["analytic calls"]]


def _depth(model: nn.Module, network: Network) -> Assumption:
    """H counts hidden layers: affine or convolutional modules before the last layer."""
    layers = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
    hidden = sum(isinstance(m, layers) for m in model.modules()) - 1
    return Assumption(
        "H >= 2",
        HELD if hidden >= 2 else FAILED,
        f"{hidden} hidden layers before {network.last.name}",
        "tp.nn.widen(model, n) adds one",
    )
