"""The premise audit: what Theorem 1 asks of a run, whether it held, and the evidence."""

from collections.abc import Callable
from itertools import pairwise

import torch

from ..core.messages import type_and_line
from ..linalg.bounds import bound_text
from ..theory.premises import (
    FAILED,
    HELD,
    UNCHECKED,
    Assumption,
    analytic_premises,
    depth_premise,
    loss_premise,
    width_premise,
)
from .batchnorm import batch_norms
from .context import Context
from .declared import problem_of
from .settings import AcceleratedDescent
from .state import PhaseState, RunState, unfixed

Premise = tuple[str, str, str]
Rule = Callable[[], list[Premise]]
SEEN = 2  # samples on which the model is watched for kinks
REFUTES = 1e-3  # relative rise of a custom loss's objective that float32 hardly explains


def premises(context: Context, state: RunState) -> list[Premise]:
    """(name, "held" | "failed" | "not checked", evidence) of each premise of Theorem 1.

    Part (i) for second_phase="gd", part (ii) for "sgd"; "base" and "none" are held against part
    (ii), the one for mini-batches. Before tau the premises of the second phase are not checked.
    """
    network, second = context.network, context.config.second_phase
    rules: list[tuple[str, Rule]] = [
        ("analytic modules", lambda: _analytic(context)),
        ("loss", lambda: [_loss(context)]),
        ("depth", lambda: [_plain(depth_premise(network.model, network))]),
        (
            "width",
            lambda: [_plain(width_premise(network, context.train.rows, context.train.distinct))],
        ),
        ("expressivity (Assumption 1)", lambda: [_expressivity(state)]),
    ]
    if second == "none":
        missing = ("perturbation, frozen layers", FAILED, "there was no second phase")
        return [*_judged(rules), missing]
    if state.hidden_hash is None:
        return [*_judged(rules), ("second phase", UNCHECKED, "the run ended before tau")]
    rules += [
        ("Gaussian noise at tau", lambda: [_noise(context, state)]),
        ("hidden layers frozen", lambda: [_frozen(context, state)]),
        ("fixed features", lambda: [_features(context, state)]),
        ("gradient", lambda: [_gradient(context)]),
        ("steps", lambda: _steps(context, state)),
    ]
    return _judged(rules)


def _judged(rules: list[tuple[str, Rule]]) -> list[Premise]:
    """The rules' rows; a rule's own exception is a row, not the end of a run otherwise fine."""
    rows: list[Premise] = []
    for name, rule in rules:
        try:
            rows += rule()
        except Exception as error:  # of the model, the loss or the rule
            rows.append((name, UNCHECKED, f"not judged: {type_and_line(error)}"))
    return rows


def _analytic(context: Context) -> list[Premise]:
    seen = torch.arange(min(context.train.n, SEEN), device="cpu")
    first, _ = context.train.fetch(seen, augmented=False)
    return [_plain(row) for row in analytic_premises(context.network.model, [first])]


def _plain(row: Assumption) -> Premise:
    return row.name, row.status, row.evidence


def _loss(context: Context) -> Premise:
    """Assumption 2, as declared; what a few samples and the run itself have to say about it."""
    name, status, evidence = _plain(loss_premise(context.loss))
    if problem := problem_of(context.loss, context.network.outputs, context.train):
        return name, FAILED, problem
    return name, status, evidence


def _expressivity(state: RunState) -> Premise:
    """Assumption 1: full rank for some weights, and with probability one at w^tau then."""
    verdict, name = state.verdict, "expressivity (Assumption 1)"
    if verdict is None:
        return name, UNCHECKED, "verify=False, or the run ended before tau"
    where = "at w^tau" if verdict.claim == "at w" else "for some weights"
    bound = verdict.sigma_min_lower
    shown = f", sigma_min >= {bound_text(bound, 3)}" if bound else ""
    if verdict.status == "proved":
        return name, HELD, f"proved {where} by {verdict.method}{shown}"
    if verdict.status == "full rank":
        return name, HELD, f"counted in float64 {where} by {verdict.method}, not proved"
    if verdict.status == "deficient":
        return name, FAILED, f"deficient: {verdict.reason}"
    return name, UNCHECKED, f"undecided: {verdict.reason}"


def _noise(context: Context, state: RunState) -> Premise:
    """It makes the rank full with probability one; a proof at the very weights needs no noise."""
    sigma = context.config.noise_std
    shown = f"{sigma:g}" if isinstance(sigma, float) else f"{min(sigma.values()):g} or more"
    name, count = "Gaussian noise at tau", len(context.network.hidden_parameters())
    others = len(context.network.hidden_state(buffers=False)) - count
    frozen = f"; {others} frozen: constants" if others else ""
    if count == 0:
        evidence, verdict = f"there is no hidden tensor to perturb{frozen}", state.verdict
        if verdict is not None and (verdict.status, verdict.claim) == ("proved", "at w"):
            return name, HELD, f"{evidence}; none is needed, the rank is proved at w^tau itself"
        return name, FAILED, evidence
    return name, HELD, f"sigma = {shown} on {count} hidden tensors{frozen}"


def _frozen(context: Context, state: RunState) -> Premise:
    name = "hidden layers frozen"
    if not context.config.fixed_statistics and batch_norms(context.network.model):
        return name, FAILED, "parameters are, but BatchNorm statistics follow the batches"
    if state.hidden_unchanged is None or state.hidden_hash is None:
        return name, UNCHECKED, "the run did not come to its end"
    return name, HELD, f"SHA-256 {state.hidden_hash[:12]} at tau and at the end"


def _features(context: Context, state: RunState) -> Premise:
    """One fixed h_X, that of the network."""
    name, copies = "fixed features", context.config.augment_copies
    if not context.config.fixed_statistics:
        return name, FAILED, "batch_norm='batch': h depends on the batch"
    if state.cache_mode == "hidden-bfloat16":
        return name, FAILED, "h was rounded to bfloat16: what holds, holds for the rounded h"
    if copies is not None:
        return (
            name,
            FAILED,
            (
                f"{copies} augmented copies in the place of random transforms: what holds, holds "
                f"for these {copies * context.train.rows} samples"
            ),
        )
    return fixed_premise(context, state)


def fixed_premise(context: Context, state: RunState) -> Premise:
    """Whether h was the same function of each sample at every visit and in every batch."""
    name = "fixed features"
    if evidence := unfixed(context, state):
        return name, FAILED, evidence
    return name, HELD, f"cached: {state.cache_mode}; {context.fixed.extent}"


def _gradient(context: Context) -> Premise:
    mode = context.config.second_phase
    if mode in ("gd", "agd", "exact"):
        return "gradient", HELD, "full, over all samples"
    name = "unbiased gradient, E[g | w] = grad L(w)"
    if mode == "sgd":
        return name, HELD, "every mini-batch drawn independently and uniformly"
    return name, FAILED, "mini-batches follow a permutation of each epoch: not independent"


def _steps(context: Context, state: RunState) -> list[Premise]:
    config, known = context.config, state.second
    if config.gd is not None:
        largest = known.smoothness
        rate = "not computed" if largest is None else f"L_H = {largest:.6g}"
        found = [
            (
                "eta = 1 / L_H",
                UNCHECKED if largest is None else HELD,
                f"{rate}, {_form(config.gd)}",
            ),
            ("no momentum, no weight decay", HELD, "plain steps"),
            _no_other_steps(known),
        ]
        steps = (state.epoch - config.tau_epoch) * config.gd.steps
        if unfixed(context, state):
            found.append(("monotone descent", UNCHECKED, "the features are not fixed"))
        elif known.rise is not None:
            evidence = f"the objective did not rise in {steps} steps beyond rounding"
            found.append(("monotone descent", HELD, evidence))
        else:
            found.append(_descent(state))
        return found
    if config.exact is not None:
        return [("steps", HELD, "any: what counts is the gap at the end"), _no_other_steps(known)]
    if config.agd is not None:
        return [_metric(config.agd, known), _no_other_steps(known)]
    if config.sgd is not None:
        largest = known.smoothness
        c = config.sgd.c if config.sgd.c is not None else 1 / (largest or float("nan"))
        eta = f"eta_t = {c:.4g} / t^{0.5 + config.sgd.eps:g}"
        return [
            ("sum eta_t^2 finite, sum eta_t infinite", HELD, eta),
            ("no momentum, no weight decay", HELD, "plain steps"),
            _no_other_steps(known),
        ]
    weight = context.network.last.module.weight
    group = next(g for g in context.optimizer.param_groups if any(p is weight for p in g["params"]))
    momentum, decay = group.get("momentum", 0), group.get("weight_decay", 0)
    rows = [row["learning_rate"] for row in state.history if row["phase"] == 2]
    rates = sorted({rate for rate in rows if rate is not None})  # None: the optimizer finds it
    shown = ", ".join(f"{rate:g}" for rate in rates[:3])
    kind = type(context.optimizer).__name__
    constant = f"eta = {shown}, as the base algorithm has it: sum eta_t^2 does not converge"
    plain = kind == "SGD" and not momentum and not decay
    return [
        (
            "sum eta_t^2 finite, sum eta_t infinite",
            FAILED if len(rates) == 1 else UNCHECKED,
            constant if len(rates) == 1 else f"a schedule: eta = {shown}, ...",
        ),
        (
            "no momentum, no weight decay",
            HELD if plain else FAILED,
            f"{kind}, momentum {momentum}, weight decay {decay}",
        ),
    ]


def _metric(settings: AcceleratedDescent, known: PhaseState) -> Premise:
    """H >= M^T M / n by its definition; how the factorization errs is in the bound."""
    name = "steps H^-1 grad / L_ell, H >= M^T M / n"
    if known.iterate is None:
        return name, UNCHECKED, "no step was made"
    if settings.damping is None:
        return name, HELD, f"H = L_H / L_ell I, L_H = {known.smoothness:.6g}, accelerated"
    shown = "" if settings.l2 == 0 else f", l2 = {settings.l2:g} included"
    if known.sketch:
        sketch = f"H is a sketch of rank {known.sketch['rank']} + mu I{shown}"
        return name, HELD, f"{sketch}: along every step, what is missing counts in the bound"
    shown = f"{settings.damping:g} mean eigenvalues{shown}"
    return name, HELD, f"H = M^T M / n + lambda I, lambda = {shown}, accelerated"


def _no_other_steps(known: PhaseState) -> Premise:
    name = "no other steps"
    if known.changed:
        return name, FAILED, known.changed
    return name, HELD, "the weights kept their bits from each epoch's end to the next one's start"


def _descent(state: RunState) -> Premise:
    """For a loss whose rounding has no bound here: the objectives at the epochs' starts."""
    name = "monotone descent"
    known = [row["objective"] for row in state.history if row.get("objective") is not None]
    for k, (before, after) in enumerate(pairwise(known), 1):
        if after > before + REFUTES * max(abs(before), abs(after)):
            rise = f"the objective rose from {before:.6g} to {after:.6g} in epoch {k}"
            return name, FAILED, f"{rise} of the second phase: L_ell is too small, or rounding"
    return name, UNCHECKED, "no bound of rounding for this loss"


def _form(settings: object) -> str:
    form, l2 = settings.smoothness, settings.l2  # type: ignore[attr-defined]
    name = "the trace form" if form == "paper" else "a bound of (L_ell / n) lambda_max"
    return name if l2 == 0 else f"{name}, l2 = {l2:g} included"
