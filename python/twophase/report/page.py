"""What the template shows, made of run records."""

import base64
import math
import re
from collections.abc import Sequence
from typing import Any

from twophase_ext import Verdict, build_info
from twophase_ext.linalg.bounds import bound_text
from twophase_ext.theory.lazy_guarantee import LazyGuarantee
from twophase_ext.training.persistence.runfolder import is_metric

from . import words
from .curves import Chart, Line, chart
from .gather import RunRecord

ROWS = 200  # of a table of epochs, steps or groups
SAMPLES = 20  # indices of a group
STAGES = {
    "first_phase": "first phase: all layers",
    "perturbation": "perturbation: noise on the hidden layers",
    "batch_norm": "BatchNorm statistics",
    "verification": "verification of the expressivity condition",
    "features": "features, cached",
    "smoothness": "computing L_H",
    "second_phase": "second phase",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "guarantee": "the bound, minimised over comparators",
    "lemma 7": "Lemma 7",
}
MEASURES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")


def describe(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The template's variables."""
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        names = [str(record.folder) for record in records]
    runs = [
        _run(f"run-{i}", name, record)
        for i, (name, record) in enumerate(zip(names, records, strict=True), 1)
    ]
    return {
        "runs": runs,
        "comparison": _comparison(runs, records) if len(runs) > 1 else None,
        "version": build_info()["version"],
    }


def thinned(rows: Sequence[Any]) -> list[Any]:
    """At most ROWS of the rows, evenly spaced, the first and the last among them."""
    if len(rows) <= ROWS:
        return list(rows)
    return [rows[round(k * (len(rows) - 1) / (ROWS - 1))] for k in range(ROWS)]


def _run(key: str, name: str, record: RunRecord) -> dict[str, Any]:
    """One run; key: prefix of its ids."""
    second = record.config["second_phase"]
    short, sentence = words.guarantee(record)
    return {
        "key": key,
        "name": name,
        "folder": str(record.folder),
        "answer": words.answer(record),
        "status": words.status(record),
        "problems": record.problems,
        "theorem": "Theorem 3" if second == "lazy" else "Theorem 1",
        "configuration": words.flat(record.config),
        "options": None if record.options is None else words.flat(record.options),
        "condition": words.condition(record),
        "verdict": _verdict(record.verdict),
        "ended": record.result is not None,
        "audit": [
            (name, state, words.SYMBOLS.get(state, "?"), evidence)
            for name, state, evidence in (record.guarantee.premises if record.guarantee else [])
        ],
        "counts": ", ".join(f"{len(v)} {k}" for k, v in words.audit(record).items()),
        "guarantee": short,
        "guarantee_sentence": sentence,
        "constants": _constants(record),
        "checks": _checks(record),
        "charts": _charts(key, record),
        "missing_charts": _missing_charts(record),
        "epochs": _epochs(record),
        "bounds": _bounds(record),
        "timings": _timings(record),
        "lazy": second == "lazy",
        "groups": _groups(record.verdict),
        "picture": _picture(record),
        "environment": None if record.environment is None else words.flat(record.environment),
        "held_out": record.held_out,
    }


def _verdict(verdict: Verdict | None) -> dict[str, Any] | None:
    """The verdict's own explanation, and its numbers."""
    if verdict is None:
        return None
    inputs = "X" if verdict.distinct == verdict.n else "X'"
    matrix = f"[h_{inputs}, 1]" if verdict.bias else f"h_{inputs}"
    method = verdict.method + (f" ({verdict.factorization})" if verdict.factorization else "")
    claim = "at these weights" if verdict.claim == "at w" else "for some weights"
    if verdict.status == "deficient":
        claim = "for all weights"
    explanation = [line.strip() for line in str(verdict).splitlines()]
    explanation = [line for line in explanation if not line.startswith("assumed: ")]
    return {
        "explanation": [line[:1].upper() + line[1:] for line in explanation],
        "numbers": [
            ("status", verdict.status),
            ("claim", claim),
            ("method", method),
            (f"sigma_min of {matrix}, proved", _at_least(verdict.sigma_min_lower)),
            ("log det of the Gram matrix, proved", _at_least(verdict.logabsdet_lower)),
            ("rank, counted", "not counted" if verdict.rank is None else f"{verdict.rank:,}"),
            ("sigma_min, estimated", words.number(verdict.sigma_min, missing="not estimated")),
            (
                "condition number, estimated",
                words.number(verdict.condition, missing="not estimated"),
            ),
            ("margin over all errors", words.number(verdict.margin, missing="none")),
            ("samples n", f"{verdict.n:,}"),
            ("distinct inputs N", f"{verdict.distinct:,}"),
            ("width m_H", f"{verdict.width:,}"),
            ("arithmetic", verdict.dtype),
            ("BatchNorm", verdict.batch_norm),
            ("time", f"{verdict.seconds:.3g} s"),
        ],
        "assumptions": verdict.assumptions,
        "hashes": words.flat(verdict.hashes) if verdict.hashes else [],
    }


def _at_least(bound: float | None) -> str:
    return "no bound" if bound is None else f"≥ {bound_text(bound)}"


def _constants(record: RunRecord) -> list[tuple[str, str]]:
    """Numbers that the bound is made of."""
    found = record.guarantee
    if found is None or isinstance(found, LazyGuarantee) or not record.curve:
        return []
    rows = [(name, words.number(value, 6)) for name, value in found.constants.items()]
    closest = found.closest
    if closest:
        ratio = f"{closest['bound'] / closest['loss']:.4g} times the measured loss"
        rows.append(("closest", f"{ratio} after {closest['steps']:,} steps"))
    return rows + [("assumed", text) for text in found.assumptions]


def _checks(record: RunRecord) -> list[list[str]]:
    """The lazy phase's verifications of the rank."""
    if not isinstance(record.guarantee, LazyGuarantee):
        return []
    names = ("steps", "status", "method", "rank")
    return [
        [
            *(words.shown(check.get(name)) for name in names),
            words.number(check.get("sigma_min")),
            _at_least(check.get("sigma_min_lower")),
            words.number((check.get("lemma7") or {}).get("bound")),
        ]
        for check in thinned(record.guarantee.checks)
    ]


def _points(record: RunRecord, column: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[column]) for row in record.history if column in row]


def _metrics(record: RunRecord) -> list[str]:
    """The user's own metrics."""
    columns = dict.fromkeys(key for row in record.history for key in row if is_metric(key))
    return list(dict.fromkeys(key.partition("_")[2] for key in columns))


def _taus(records: Sequence[RunRecord]) -> list[float]:
    """The first epochs of second phases, half an epoch before."""
    first = {next((r["epoch"] for r in run.history if r["phase"] == 2), None) for run in records}
    return sorted(epoch - 0.5 for epoch in first if epoch is not None)


def _charts(key: str, record: RunRecord) -> list[Chart]:
    held_out, taus = record.held_out, _taus([record])
    drawn = []
    for what in ("loss", "accuracy", *_metrics(record)):
        lines = [Line("training", _points(record, f"train_{what}"))]
        if points := _points(record, f"val_{what}"):
            lines.append(Line(held_out, points, 1, 1))
        if what == "loss":
            lines += _floor(record)
        title = f"{what[:1].upper()}{what[1:]} by epoch"
        drawn.append(
            chart(
                f"{key}-{re.sub(r'[^A-Za-z0-9]', '-', what)}",
                title,
                [line for line in lines if line.points],
                xlabel="epoch",
                ylabel=what,
                taus=taus,
                percent=what == "accuracy",
            )
        )
    if record.curve:
        name = words.bound_name(record)
        lines = [
            Line(
                name.removesuffix(" loss"), [(p["steps"], p["bound"]) for p in record.curve], 1, 1
            ),
            Line("measured", [(p["steps"], p["loss"]) for p in record.curve if "loss" in p]),
            *_floor(record, [p["steps"] for p in record.curve]),
        ]
        drawn.append(
            chart(
                f"{key}-bound",
                f"{name.capitalize()} and measured loss by step since tau",
                lines,
                xlabel="step",
                ylabel="training loss",
            )
        )
    return [figure for figure in drawn if figure is not None]


def _minimum(record: RunRecord) -> dict[str, float]:
    """The loss at the end, the least that any weights reach (its lower end) and the gap between."""
    found = (record.result or {}).get("minimum")
    known = found if isinstance(found, dict) else {}
    floor = known.get("floor")
    parts = {**known, "floor": floor.get("lower") if isinstance(floor, dict) else None}
    return {
        name: float(parts[name])
        for name in ("loss", "floor", "gap")
        if isinstance(parts.get(name), int | float) and math.isfinite(parts[name])
    }


def _floor(record: RunRecord, steps: Sequence[float] = ()) -> list[Line]:
    """The floor over these steps; over the epochs with the gap that is left at the end.

    None of a floor that is 0, which no logarithmic axis has (`_missing_charts` says it).
    """
    known = _minimum(record)
    places = steps or [row["epoch"] for row in record.history]
    if not places or not known.get("floor", 0) > 0:
        return []
    floor, last = known["floor"], max(places)
    found = [Line("floor", [(min(places), floor), (last, floor)], 2, 2)]
    if not steps and known.get("gap", -1) >= 0 and "loss" in known:
        label = f"gap, at most {bound_text(known['gap'], 3, upper=True)}"
        found.append(Line(label, [(last, floor), (last, known["loss"])], 3))
    return found


def _missing_charts(record: RunRecord) -> list[str]:
    """Why a curve, or a mark in it, is not there."""
    said = []
    if _minimum(record).get("floor") == 0:
        said.append(
            "The floor of the loss is 0, below every logarithmic axis: the gap is the loss."
        )
    if not record.history:
        said.append("Loss and accuracy by epoch: metrics.csv has no row.")
    else:
        if not any("train_accuracy" in row for row in record.history):
            said.append(f"Accuracy: not measured for the loss {record.config['loss']}.")
        elif not any("val_accuracy" in row for row in record.history):
            said.append(f"{record.held_out.capitalize()} accuracy: no validation data were given.")
        if not _taus([record]):
            said.append("tau: not marked, no epoch of a second phase is recorded.")
    if not record.curve:
        said.append("Guaranteed loss: no guarantee.csv, which goes with a claimed bound.")
    return said


def _epochs(record: RunRecord) -> dict[str, Any]:
    """The metrics as a table."""
    own = [f"{part}_{name}" for name in _metrics(record) for part in ("train", "val")]
    own = [name for name in own if any(name in row for row in record.history)]
    rows = [
        [
            f"{row['epoch']:g}",
            f"{row['phase']:g}",
            *(words.number(row.get(name), 6) for name in MEASURES),
            words.number(row.get("learning_rate"), 6),
            words.number(row["seconds"]),
            *(words.number(row.get(name), 6) for name in own),
        ]
        for row in thinned(record.history)
    ]
    return {"rows": rows, "total": len(record.history), "own": own}


def _bounds(record: RunRecord) -> dict[str, Any]:
    """The guarantee's curve as a table."""
    rows = [
        [f"{p['steps']:,.0f}", words.number(p["bound"], 6), words.number(p.get("loss"), 6)]
        for p in thinned(record.curve)
    ]
    return {"rows": rows, "total": len(record.curve), "name": words.bound_name(record)}


def _timings(record: RunRecord) -> list[tuple[str, str]]:
    """(stage, seconds); from metrics.csv where the run has not ended."""
    known = (record.result or {}).get("timings")
    if known is None:
        known = {}
        for row in record.history:
            stage = "first_phase" if row["phase"] == 1 else "second_phase"
            known[stage] = known.get(stage, 0.0) + row["seconds"]
    return [(STAGES.get(stage, stage), words.number(value)) for stage, value in known.items()]


def _groups(verdict: Verdict | None) -> list[str]:
    """Groups of samples that the verdict names, as text."""
    if verdict is None:
        return []
    lines = []
    for group in verdict.culprits[:ROWS]:
        more = f" and {len(group) - SAMPLES:,} more" if len(group) > SAMPLES else ""
        lines.append(f"{', '.join(map(str, group[:SAMPLES]))}{more}")
    left = len(verdict.culprits) - len(lines)
    return [*lines, f"... and {left:,} more groups in verdict.json"] if left else lines


def _picture(record: RunRecord) -> str | None:
    """culprits.png as a data URI."""
    if record.picture is None or record.verdict is None or not record.verdict.culprits:
        return None
    return f"data:image/png;base64,{base64.b64encode(record.picture).decode()}"


def _comparison(runs: Sequence[dict[str, Any]], records: Sequence[RunRecord]) -> dict[str, Any]:
    """Several runs side by side."""
    done = [r.result["status"] if r.result else "unfinished" for r in records]
    states = words.joined([f"{done.count(s)} {s}" for s in dict.fromkeys(done)])
    verdicts = [f"{run['name']} ({run['guarantee']})" for run in runs]
    final = [((r.result or {}).get("final") or {}).get("train_loss") for r in records]
    known = [(loss, run["name"]) for loss, run in zip(final, runs, strict=True) if loss is not None]
    answer = f"{len(runs)} runs, {states}. The guarantee: {', '.join(verdicts)}. "
    losses = list(dict.fromkeys(str(record.config["loss"]) for record in records))
    if len(losses) > 1:
        answer += f"Their losses differ and do not compare: {words.joined(losses)}."
    elif known:
        loss, name = min(known)
        answer += f"The lowest final training loss, {words.number(loss)}, is that of {name}."
    else:
        answer += "No run has a final loss yet."
    flat = [dict(run["configuration"]) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    differing = [key for key in keys if len({s.get(key, "not set") for s in flat}) > 1]
    figures = [
        chart(
            f"all-{column}",
            title,
            [
                Line.numbered(i, run["name"], _points(record, column))
                for i, (run, record) in enumerate(zip(runs, records, strict=True))
            ],
            xlabel="epoch",
            ylabel=ylabel,
            taus=_taus(records),
            percent=percent,
        )
        for column, title, ylabel, percent in (
            ("train_loss", "Training loss by epoch", "training loss", False),
            ("val_accuracy", "Test or validation accuracy by epoch", "accuracy", True),
        )
    ]
    return {
        "answer": answer,
        "rows": [_compared(run, record) for run, record in zip(runs, records, strict=True)],
        "settings": [(key, [s.get(key, "not set") for s in flat]) for key in differing],
        "charts": [figure for figure in figures if figure is not None],
    }


def _compared(run: dict[str, Any], record: RunRecord) -> list[str]:
    final = (record.result or {}).get("final") or {}
    last = record.curve[-1] if record.curve else {}
    seconds = sum(row["seconds"] for row in record.history)
    return [
        str(record.config["second_phase"]),
        run["guarantee"],
        bound_text(last["bound"], upper=True) if last else "no bound",
        words.number(final.get("train_loss")),
        words.number(final.get("val_loss")),
        words.share(final.get("val_accuracy")),
        run["status"],
        run["condition"],
        run["counts"] or "no audit",
        words.number(seconds),
    ]
