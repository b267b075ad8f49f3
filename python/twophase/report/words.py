"""What a run was and what came of it, in sentences and shown numbers."""

from itertools import accumulate
from typing import Any

from twophase_ext.linalg.bounds import bound_text
from twophase_ext.theory.guarantee import Guarantee
from twophase_ext.theory.lazy_guarantee import LazyGuarantee
from twophase_ext.training.metrics import own_metrics

from .gather import RunRecord

SECOND_PHASES = {
    "base": "the base algorithm on the last layer alone",
    "gd": "full gradient steps of 1 / L_H on the last layer (Theorem 1 i)",
    "agd": "accelerated gradient steps in the features' metric on the last layer",
    "exact": "to the minimum of the last layer's objective",
    "sgd": "SGD with decaying steps on the last layer (Theorem 1 ii)",
    "lazy": "full gradient steps on all layers (Theorem 3)",
}
# Status of a premise -> symbol beside the word, and whether it stands for the premise.
SYMBOLS = {"held": "✓", "proved": "✓", "numerical": "≈", "not checked": "?", "failed": "✗"}
CELLS = 2000  # characters of one value shown


def shown(value: Any) -> str:
    """A value of a configuration, of an environment or of a file's row."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= CELLS else f"{text[:CELLS]} ... ({len(text):,} characters)"


def number(value: float | None, digits: int = 4, missing: str = "not measured") -> str:
    """A measured number; `missing` for None."""
    return missing if value is None else f"{value:.{digits}g}"


def share(value: float | None) -> str:
    """A share as per cent."""
    return "not measured" if value is None else f"{100 * value:.2f} %"


def joined(parts: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def counted(n: int, one: str, many: str = "") -> str:
    """'1 epoch', '2,000 epochs'."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, shown value) of nested plain data."""
    if isinstance(value, dict) and value:
        pairs = [(f"{prefix}.{key}" if prefix else str(key), part) for key, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        pairs = [(f"{prefix}[{i}]", part) for i, part in enumerate(value)]
    else:
        return [(prefix, shown(value))]
    return [row for name, part in pairs for row in flat(part, name)]


def status(record: RunRecord) -> str:
    """How far the run came."""
    known = record.result or {}
    done = known.get("epochs_done", record.epochs_done)
    so_far = f"{done:,} of {record.config['epochs']:,} epochs"
    if "result.json" in record.problems:
        return f"unknown: result.json cannot be read; metrics.csv has {so_far}"
    if record.result is None:
        return f"unfinished: there is no result.json; metrics.csv has {so_far}"
    said = {
        "completed": f"completed, {so_far}",
        "interrupted": f"interrupted after {so_far}; resume=True continues it",
        "diverged": f"diverged: the loss or the weights were not finite after {so_far}",
        "stopped": f"stopped after {so_far}",
    }.get(known["status"], f"{known['status']} after {so_far}")
    lazy = record.guarantee if isinstance(record.guarantee, LazyGuarantee) else None
    if why := known.get("stopped") or (lazy and lazy.stopped):
        said += f": {why}"
    if record.history and done != record.epochs_done:
        said += f"; metrics.csv, with {counted(record.epochs_done, 'epoch')}, is of another time"
    return said


def training(record: RunRecord) -> str:
    """What was run."""
    config, done = record.config, record.epochs_done
    data = (record.options or {}).get("data_name")
    of_data = f" of {data}" if data else ""
    total = f"{config['epochs']:,}"
    span = total if done == config["epochs"] else f"{done:,} of {total}"
    sentence = (
        f"{config['model']} (m_H = {config['width']:,}) was trained on "
        f"{counted(config['n'], 'sample')}{of_data} for {span} epochs: "
    )
    mode = config["second_phase"]
    if mode == "none":
        return f"{sentence}the base algorithm on all layers to the end, no second phase."
    tau = config["tau_epoch"]
    first = f"{counted(tau, 'epoch')} on all layers" if tau else "no first phase (tau = 0)"
    sentence += f"{first}, then {SECOND_PHASES.get(mode, mode)}"
    reached = any(row["phase"] == 2 for row in record.history)
    return f"{sentence}." if reached else f"{sentence}; this second phase has no epoch yet."


def condition(record: RunRecord) -> str:
    """The expressivity verdict in a few words."""
    if "verdict.json" in record.problems:
        return "the verdict cannot be read"
    if record.verdict is None:
        return "not verified"
    return str(record.verdict).splitlines()[0].partition(": ")[2]


def audit(record: RunRecord) -> dict[str, list[str]]:
    """Status -> names of the premises of that status, the weakest last."""
    found: dict[str, list[str]] = {name: [] for name in SYMBOLS}
    for name, state, _ in record.guarantee.premises if record.guarantee else []:
        found.setdefault(state, []).append(name)
    return {state: names for state, names in found.items() if names}


def guarantee(record: RunRecord) -> tuple[str, str]:
    """Did the guarantee hold? In a few words, and in a sentence."""
    found, premises = record.guarantee, audit(record)
    if record.result is None:
        return "not known", "Whether the guarantee held is not known before the run has ended."
    if found is None:
        return "no claim", "The run ended before the audit of its premises: nothing is claimed."
    failed, unchecked = (len(premises.get(state, [])) for state in ("failed", "not checked"))
    weak = [f"{failed} failed"] if failed else []
    weak += [f"{unchecked} {'was' if unchecked == 1 else 'were'} not checked"] if unchecked else []
    total = sum(map(len, premises.values()))
    because = f": of {counted(total, 'premise')}, {joined(weak)}" if weak else ""
    if isinstance(found, LazyGuarantee):
        if found.bound is None:
            return "no claim", f"No rate of Theorem 3 is claimed{because}."
        return (
            f"gap ≤ {bound_text(found.bound, upper=True)}",
            "Theorem 3 bounds the least loss over the steps, above the infimum, by "
            f"{bound_text(found.bound, upper=True)}, for the L given"
            + (" and ranks counted numerically." if "numerical" in premises else "."),
        )
    if "gap" in found.constants:
        gap = bound_text(found.constants["gap"], upper=True)
        return (
            f"gap ≤ {gap}",
            f"Of the weights at the end is known: {'; '.join(found.notes)}{because}.",
        )
    if not record.curve:
        why = f" ({found.reason})" if found.reason else ""
        return "no claim", f"No bound of Theorem 1 is claimed for this run{why}{because}."
    return _bound(record, found, because)


def bound_name(record: RunRecord) -> str:
    """What the curve of the bound is called."""
    found = record.guarantee
    refuted = isinstance(found, Guarantee) and found.refuted
    return "refuted bound" if refuted else "guaranteed loss"


def _bound(record: RunRecord, found: Guarantee, because: str) -> tuple[str, str]:
    """The same, where guarantee.csv holds a bound; because: the premises that are not held."""
    mean, rigorous = found.in_expectation, found.rigorous
    last = record.curve[-1]
    limit = bound_text(last["bound"], upper=True)
    known = [p for p in record.curve if "loss" in p]
    measured = [p["loss"] for p in known]
    if mean:  # what is bounded is the least loss so far
        measured = list(accumulate(measured, min))
    above = sum(loss > p["bound"] for loss, p in zip(measured, known, strict=True))
    after = f"after {counted(int(last['steps']), 'step')} of the second phase"
    what = "objective, loss and l2 term," if found.constants.get("l2") else "training loss"
    if mean:
        what = "least loss so far, on average over the draws,"
    name = "Accelerated, Theorem 1" if found.mode == "agd" else "Theorem 1"
    said = f"{name} bounds the {what} by {limit} {after}"
    if "loss" in last:
        said += f"; {number(measured[-1])} was measured"
    if above:
        said += f". What was measured is above the bound at {above} of {len(known)} points"
    if not rigorous:
        said += ". A constant of the bound was measured: it is no proof"
    if found.refuted:
        return "REFUTED", f"REFUTED: {said}, so that it is no bound: {found.refuted}."
    if because:
        verdict, start = "not guaranteed", "The bound rests on premises that are not established"
        return verdict, f"{start}{because}. {said}."
    if above:
        return ("above the bound" if not mean else "above the mean's bound"), f"{said}."
    verdict = "held" if rigorous and not mean else "bound met"
    start = "The guarantee held" if verdict == "held" else "The bound was met"
    return verdict, f"{start}, and every premise held. {said}."


def losses(record: RunRecord) -> str:
    """The losses reached."""
    final = (record.result or {}).get("final") or {}
    if final.get("train_loss") is not None:
        parts = []
        for key, what in (("train", "training"), ("val", record.held_out)):
            if final.get(f"{key}_loss") is not None:
                accuracy = final.get(f"{key}_accuracy")
                shown = [] if accuracy is None else [f"accuracy {share(accuracy)}"]
                shown += own_metrics(final, key)
                also = f" ({', '.join(shown)})" if shown else ""
                parts.append(f"the {what} loss is {number(final[f'{key}_loss'])}{also}")
        return f"At the end {joined(parts)}."
    if not record.history:
        return "No loss is recorded: metrics.csv has no row."
    row = record.history[-1]
    return (
        f"In the last recorded epoch, {row['epoch']:g}, the mean training loss was "
        f"{number(row['train_loss'])}; final losses are measured when a run completes."
    )


def answer(record: RunRecord) -> str:
    """How far from the global minimum, what was run, did the guarantee hold: one paragraph."""
    said = condition(record)
    sentence = (record.result or {}).get("sentence")
    first = [sentence] if isinstance(sentence, str) else []
    verdict = f"The expressivity condition, under which the minimum is global: {said}."
    return " ".join((*first, training(record), guarantee(record)[1], verdict, losses(record)))
