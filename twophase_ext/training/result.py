"""What `Trainer.fit` returns."""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..core.notebook import folded, paragraph
from ..linalg.bounds import bound_text
from ..model.labels import Classes, decode
from ..model.losses import ConvexLoss, SoftmaxLoss
from ..model.probing import require_module
from .metrics import own_metrics
from .minimum import Minimum
from .predict import outputs_of, score_of

COLUMNS = 100  # of the printed paragraph


@dataclass
class Result:
    """The outcome of a run.

    history: one dict an epoch (epoch, phase, train_loss, train_accuracy, val_loss, val_accuracy,
    learning_rate, seconds; learning_rate is the first parameter group's, in the second phase that
    of the last layer's weight). train_loss is the mean over the epoch's batches of the loss before
    each update; train_accuracy is measured during the epoch in the first phase and at its end in
    the second; accuracies are None for losses other than cross-entropy, val_* without validation
    data; train_name and val_name of the Trainer's metrics. status: "completed", "interrupted",
    "diverged" or "stopped" (by a callback, then whole in all that is below; or because the second
    phase could not go on, lazy: the rank could not be shown any more). verdict: the expressivity
    Verdict at w^tau, or None. guarantee: a `Guarantee`, the premise audit and, for "gd" and "sgd",
    the bound of Theorem 1 beside the measured loss (`LazyGuarantee` for "lazy", None before its
    tau). divergence: of a run that diverged, {epoch, step, loss (a text), samples: the mini-batch's
    indices (None for a full gradient), inputs_not_finite: those of them whose inputs are not};
    model holds the broken weights, the last checkpoint is from before. final: losses, accuracies
    and metrics of the trained network over the whole sets; empty unless completed or stopped by a
    callback. timings: seconds by stage. hidden_hash: SHA-256 of the frozen hidden layers, the same
    before and after the second phase. stopped: which callback ended the run and why, "Class:
    reason", or why the second phase could not go on. minimum: how far the training loss is from the
    global minimum over all weights; its str is one sentence. loss: the one that was trained on;
    last_layer: the name of that layer. classes: of labels that were text, sorted: output c is
    classes[c].

    `tp.load_run` makes one of a run folder: model is None there where none is given, and loss
    where it was one of the user's own.
    """

    model: nn.Module  # typed as what fit returns
    history: list[dict[str, Any]]
    status: str
    run_dir: Path | None
    verdict: Any = None
    guarantee: Any = None
    divergence: dict[str, Any] | None = None
    final: dict[str, float | None] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    hidden_hash: str | None = None
    feature_cache: str | None = None
    minimum: Minimum | None = None
    loss: ConvexLoss | None = None
    last_layer: str | None = None
    classes: Classes | None = None
    stopped: str | None = None

    def predict(self, x: Any, *, labels: bool = False) -> Any:
        """The trained network's outputs [n, m_y] of inputs x, on its device, without gradients.

        Logits where it was trained on cross-entropy: `.argmax(1)` are the labels, `.softmax(1)` the
        probabilities. labels: these labels instead, int64 [n], or an array of text where it was
        trained on text. x: tensor or array [n, ...], uint8 scaled to [0, 1], or a dict or tuple of
        them, in the form that it was trained on. Evaluation mode, 256 samples at a time; the model
        keeps its mode. Raises ValueError for x empty, with NaN or infinity, or of a shape that the
        model does not take, without a model, and for labels of another loss.
        """
        outputs = outputs_of(self._model(), x)
        if not labels:
            return outputs
        if self.loss is not None and not isinstance(self.loss, SoftmaxLoss):
            raise ValueError(f"labels: expected False, {self.loss.name} has none")
        numbers = outputs.argmax(1)
        return numbers if self.classes is None else decode(numbers, self.classes)

    def score(self, data: Any) -> dict[str, float | None]:
        """{"loss": the mean over all samples, "accuracy": its share, None but for cross-entropy}.

        data: as `Trainer.fit` takes it. The trained network in evaluation mode, by the loss that it
        was trained on; over the training data these are `final`'s numbers. Raises as `fit` for
        unusable data, ValueError without a model or a loss.
        """
        model = self._model()
        if self.loss is None:
            raise ValueError(
                "loss: the run's own is not known, as a run folder keeps no function; set "
                "result.loss, a tp.ConvexLoss"
            )
        loss, accuracy = score_of(model, self.loss, data, self.last_layer, self.classes)
        return {"loss": loss, "accuracy": accuracy}

    def _model(self) -> nn.Module:
        if self.model is None:
            raise ValueError("model: expected one, got none: tp.load_run(folder, model)")
        require_module(self.model)
        return self.model

    @property
    def lead(self) -> str:
        """How far it is from the global minimum, what was run, and what is known of it."""
        first = [] if self.minimum is None else [str(self.minimum)]
        rest = [self._training(), *self._losses(), self._condition(), *self._bound()]
        return " ".join([*first, *rest])

    def _training(self) -> str:
        first, second = (sum(r["phase"] == phase for r in self.history) for phase in (1, 2))
        said = self.status.capitalize() + (f" ({self.stopped})" if self.stopped else "")
        what = "all layers in the second phase" if not self.hidden_hash else "the last layer alone"
        if second and not first:
            count = f"{second} epoch{'s' if second != 1 else ''}"
            return f"{said}: no first phase (tau = 0), {count} on {what}."
        said = f"{said}: {first} epoch{'s' if first != 1 else ''} on all layers"
        return f"{said}, then {second} on {what}." if second else f"{said}, no second phase."

    def _losses(self) -> list[str]:
        said = []
        for key, name in (("train", "training"), ("val", "validation")):
            loss, accuracy = self.final.get(f"{key}_loss"), self.final.get(f"{key}_accuracy")
            if loss is not None:
                shown = [] if accuracy is None else [f"accuracy {100 * accuracy:.2f} %"]
                shown += own_metrics(self.final, key)
                also = f" ({', '.join(shown)})" if shown else ""
                said.append(f"the {name} loss is {loss:.4g}{also}")
        return [f"At the end {' and '.join(said)}."] if said else []

    def _condition(self) -> str:
        known = "not verified" if self.verdict is None else self.verdict.summary
        return f"The expressivity condition, under which the minimum is global: {known}."

    def _bound(self) -> list[str]:
        """What Theorem 1 says of the loss, where a curve of it is claimed."""
        found = self.guarantee
        if not getattr(found, "curve", []):
            return []
        last = found.curve[-1]
        bound = f"{bound_text(last['bound'], upper=True)} after {last['steps']:g} steps"
        if found.refuted:
            return [f"The bound of Theorem 1, {bound}, is REFUTED by a measured loss."]
        what = "objective, loss and l2 term," if found.constants.get("l2") else "training loss"
        if found.in_expectation:
            what = "least training loss so far, on average over the draws,"
        weak = [
            f"{name} {'is not established' if status == 'not checked' else 'failed'}"
            for name, status, _ in found.premises
            if status != "held"
        ]
        weak += [] if found.rigorous else ["a constant was measured, not proved"]
        but = f", but no guarantee: {', '.join(weak)}" if weak else ""
        return [f"Theorem 1 bounds the {what} by {bound}{but}."]

    def _repr_html_(self) -> str:
        """For a notebook: the lead, everything else folded behind it."""
        return paragraph(self.lead) + folded("Evidence", "\n".join(self._details()))

    def __str__(self) -> str:
        """The lead, then a few lines of evidence for a person."""
        return "\n".join([textwrap.fill(self.lead, COLUMNS), *self._details()])

    def _details(self) -> list[str]:
        lines = [f"run {self.status} after {len(self.history)} epochs"]
        phases = {p: [r for r in self.history if r["phase"] == p] for p in (1, 2)}
        for phase, rows in phases.items():
            if rows:
                seconds = sum(row["seconds"] for row in rows)
                lines.append(
                    f"  phase {phase}: {len(rows)} epochs, {seconds:.1f} s, training loss "
                    f"{rows[0]['train_loss']:.5f} -> {rows[-1]['train_loss']:.5f}"
                )
        for name in ("train", "val"):
            loss, accuracy = self.final.get(f"{name}_loss"), self.final.get(f"{name}_accuracy")
            if loss is not None:
                shown = "" if accuracy is None else f", accuracy {100 * accuracy:.2f} %"
                shown = ", ".join([shown, *own_metrics(self.final, name)])
                lines.append(f"  final {name}: loss {loss:.5f}{shown}")
        if self.hidden_hash:
            known = "in phase 2: bit-identical" if self.final else "of tau, not compared again"
            lines.append(
                f"  hidden layers {known} (SHA-256 {self.hidden_hash[:12]}), "
                f"features cached: {self.feature_cache}"
            )
            if self.model is not None and not self.model.training:
                lines.append("  the model is in evaluation mode, the one that this is about")
        if self.verdict is not None:
            lines += ["  " + line for line in str(self.verdict).splitlines()]
        if self.guarantee is not None:
            lines += ["  " + line for line in str(self.guarantee).splitlines()]
        if self.run_dir is not None:
            lines.append(f"  run folder: {self.run_dir}")
        return lines
