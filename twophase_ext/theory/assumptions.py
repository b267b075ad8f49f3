"""The premises of Theorem 1, checked for a user's own model, loss and data."""

import textwrap
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..core import notebook
from ..expressivity import Verdict, verify_network
from ..linalg.bounds import bound_text
from ..model.calling import one_tensor
from ..model.groups import firsts, groups_of, repeated
from ..model.inputs import as_example, checked_inputs, first_parameter
from ..model.network import Network
from .premises import (
    FAILED,
    HELD,
    UNCHECKED,
    Assumption,
    analytic_premises,
    depth_premise,
    loss_premise,
    width_premise,
)

NOT_MET = "not met"  # a sufficient condition that may fail: nothing depends on it
COLUMNS = 100  # of the printed table
PRODUCTS = 3e11  # of entries, for Assumption 3: some ten seconds
EXACT_PAIRS = 100  # compared in rational arithmetic, for Assumption 3


@dataclass
class Assumptions:
    """The table that `check_assumptions` returns; print it."""

    rows: list[Assumption] = field(default_factory=list)
    verdict: Verdict | None = None

    @property
    def hold(self) -> bool:
        """Whether no premise failed (some may be unchecked)."""
        return all(row.status != FAILED for row in self.rows)

    def _repr_html_(self) -> str:
        """For a notebook: the table, with the verdict folded behind it."""
        rows = [
            (
                row.name,
                row.status,
                row.evidence + (f" → {row.advice}" if row.advice and row.status != HELD else ""),
            )
            for row in self.rows
        ]
        behind = "" if self.verdict is None else self.verdict._repr_html_()
        return notebook.table(("premise", "status", "evidence"), rows) + behind

    def __str__(self) -> str:
        """A table for a person, 100 columns wide."""
        width = max(len(row.name) for row in self.rows)
        status_width = max(len(row.status) for row in self.rows)
        margin = " " * (width + status_width + 4)
        lines: list[str] = []

        def add(start: str, text: str, rest: str) -> None:
            lines.extend(
                textwrap.wrap(text, COLUMNS, initial_indent=start, subsequent_indent=rest)
                or [start.rstrip()]
            )

        for row in self.rows:
            add(f"{row.name:<{width}}  {row.status:<{status_width}}  ", row.evidence, margin)
            if row.advice and row.status != HELD:
                add(f"{margin}-> ", row.advice, f"{margin}   ")
        return "\n".join(lines)


@torch.inference_mode(False)
def check_assumptions(
    model: nn.Module,
    x: Any,
    *,
    loss: Any = "cross_entropy",
    last_layer: nn.Module | str | None = None,
    method: str = "auto",
) -> Assumptions:
    """Check what Theorem 1 asks of a model, its loss and its n training inputs x.

    Rows: affine last layer; every module real analytic, as it is in eval mode; functional calls
    analytic; loss convex and smooth (Assumption 2, with L_ell); H >= 2; m_H >= N - 1 (N where the
    last layer has no trainable bias), N the number of distinct inputs, as the model's dtype tells
    them apart; how many these are, which is no premise; Assumption 3, ||x_i||^2 - x_i.x_j > 0 for
    distinct ones, which is only sufficient (Theorem 2) and may be "not met"; expressivity
    (Assumption 1, by `verify_expressivity` with `method`). Every row that is not held says what to
    do. x: tensor or array [n, ...], uint8 scaled to [0, 1], a dict or tuple of them, or a Dataset
    or DataLoader, of which the inputs count. loss: a name, a `ConvexLoss`, or any callable, for
    which the row fails. The model is not changed. Raises as verify_expressivity, ValueError for an
    unknown name of a loss.
    """
    with one_tensor(model, x) as packed:
        return _check(model, checked_inputs(packed), loss, last_layer, method)


def _check(
    model: nn.Module, x: Tensor, loss: Any, last_layer: nn.Module | str | None, method: str
) -> Assumptions:
    table = Assumptions()
    loss_row = loss_premise(loss)
    parameter = first_parameter(model)

    def place(part: Tensor) -> Tensor:
        part = part.to(parameter.device)
        return part.to(parameter.dtype) / 255 if part.dtype == torch.uint8 else part

    try:
        network = Network(model, as_example(x, parameter), last_layer)
    except (ValueError, TypeError) as error:
        advice = "name it by last_layer=, or end the model with an nn.Linear"
        table.rows.append(Assumption("affine last layer", FAILED, str(error), advice))
        return table
    last = f"{network.last.name}, {network.width} -> {network.outputs}"
    table.rows.append(Assumption("affine last layer", HELD, last))
    parts = x.split(256)
    ends = [place(parts[0]), place(parts[-1])]  # of other sizes
    table.rows += analytic_premises(model, ends, whole=len(parts) <= 2)
    groups = groups_of(x.to(parameter.dtype) if x.is_floating_point() else x)
    first, each = firsts(groups), network.last.rows
    width = width_premise(network, len(x) * each, len(first) * each)
    table.rows += [loss_row, depth_premise(model, network), width, _distinct(groups)]
    table.rows.append(_assumption_3(x, first.tolist()))
    table.verdict = verify_network(
        network, [(place(part), None) for part in parts], n=len(x), method=method
    )
    table.rows.append(_expressivity(table.verdict))
    return table


def _distinct(groups: Tensor) -> Assumption:
    n, several = len(groups), repeated(groups)
    if not several:
        return Assumption("distinct inputs", HELD, f"{n} inputs, all different")
    count = len(several)
    return Assumption(
        "distinct inputs",
        HELD,
        f"N = {int(groups.max()) + 1} of n = {n}: {count} {'group' if count == 1 else 'groups'} of "
        f"equal ones, first {several[0][:5]}; the condition is about the N",
    )


def _assumption_3(x: Tensor, names: list[int]) -> Assumption:
    """||x_i||^2 - x_i.x_j > 0 for all i != j: float64 with its error bound, exact where close.

    names: the samples looked at, one of each distinct input.

    By Cauchy-Schwarz only j with ||x_j|| >= ||x_i|| can violate it: rows sorted by norm, each
    compared with those after it.
    """
    name = "Assumption 3"
    advice = "only sufficient: distinct inputs do as well"
    if not (x.is_floating_point() or x.dtype == torch.uint8):
        return Assumption(name, UNCHECKED, "the inputs are indices, not vectors", advice)
    rows = x.cpu()[names].reshape(len(names), -1).double()
    squares = rows.square().sum(1)
    if not bool(torch.isfinite(squares).all()):
        return Assumption(name, UNCHECKED, "the squares of the inputs overflow", advice)
    order = squares.argsort()
    rows, squares, (n, d) = rows[order], squares[order], rows.shape
    # a sum of d products in any order errs by gamma_d |x_i||x_j|; 4 covers the order by norm too
    gamma, largest = 4 * (d + 2) * 2.0**-53, squares[-1].sqrt()
    unit = 1 if x.is_floating_point() else 255**2  # the model sees uint8 scaled to [0, 1]
    smallest, products, checked = float("inf"), 0, 0
    size = max(1, 2**24 // n)
    for a in range(0, n, size):
        if products > PRODUCTS:
            return Assumption(
                name,
                UNCHECKED,
                f"no violation by the {a} inputs of smallest norm; the others would take long",
                advice,
            )
        block = rows[a : a + size]
        products += len(block) * (n - a) * d
        own = squares[a : a + size, None]
        value = own - block @ rows[a:].T
        value.diagonal().fill_(float("inf"))
        error = gamma * (own + own.sqrt() * largest) + d * 2.0**-1073
        close = (~(value > error)).nonzero()
        close = close[value[close[:, 0], close[:, 1]].argsort()]
        for i, j in close.tolist():
            if checked == EXACT_PAIRS:
                return Assumption(
                    name,
                    UNCHECKED,
                    f"more than {EXACT_PAIRS} pairs are within rounding of equality",
                    advice,
                )
            checked += 1
            for p, q in ((a + i, a + j), (a + j, a + i)):
                exact = _exact_gap(rows[p], rows[q])
                if exact <= 0:
                    p, q, found = names[int(order[p])], names[int(order[q])], float(exact / unit)
                    return Assumption(
                        name,
                        NOT_MET,
                        f"||x_{p}||^2 - x_{p}.x_{q} = {found:.3g}, Theorem 2 asks for > 0",
                        f"{advice}; inputs scaled to equal norms would meet it",
                    )
                smallest = min(smallest, float(exact))
        if value.numel() > len(close):
            value[close[:, 0], close[:, 1]] = float("inf")
            smallest = min(smallest, float(value.min()))
    least = "one input" if n == 1 else f"least ||x_i||^2 - x_i.x_j = {smallest / unit:.3g}"
    return Assumption(name, HELD, least)


def _exact_gap(x: Tensor, other: Tensor) -> Fraction:
    """||x||^2 - x.other of float64 vectors, without rounding."""
    pairs = zip(x.tolist(), other.tolist(), strict=True)
    return sum((Fraction(p) * (Fraction(p) - Fraction(q)) for p, q in pairs), Fraction(0))


def _expressivity(verdict: Verdict) -> Assumption:
    where = "at these weights" if verdict.claim == "at w" else "for some weights"
    lower = verdict.sigma_min_lower
    if verdict.status == "proved":
        shown = f", sigma_min >= {bound_text(lower, 3)}" if lower else ""
        return Assumption("expressivity", HELD, f"proved {where} by {verdict.method}{shown}")
    if verdict.status == "full rank":
        shown = "" if verdict.sigma_min is None else f", sigma_min {verdict.sigma_min:.2e}"
        evidence = (
            f"rank {verdict.distinct} of {verdict.distinct} {where}, counted in float64 by "
            f"{verdict.method} (not proved){shown}"
        )
        return Assumption("expressivity", HELD, evidence)
    if verdict.status == "deficient":
        advice = "tp.nn.widen(model, x) adds a layer that is wide enough"
        return Assumption("expressivity", FAILED, f"deficient: {verdict.reason}", advice)
    return Assumption(
        "expressivity",
        UNCHECKED,
        f"undecided: {verdict.reason}",
        "tp.verify_expressivity(model, x, w='witness', method='certificate') looks for weights "
        "that can be certified",
    )
