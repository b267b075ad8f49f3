"""What `Trainer.fit` returns."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .minimum import Minimum


@dataclass
class Result:
    """The outcome of a run.

    history: one dict an epoch (epoch, phase, train_loss, train_accuracy, val_loss, val_accuracy,
    learning_rate, seconds; learning_rate is the first parameter group's, in the second phase that
    of the last layer's weight). train_loss is the mean over the epoch's batches of the loss before
    each update; train_accuracy is measured during the epoch in the first phase and at its end in
    the second; accuracies are None for losses other than cross-entropy, val_* without validation
    data. status: "completed", "interrupted", "diverged" or "stopped" (the second phase could not
    go on: the reason is in the guarantee; lazy: the rank could not be
    shown any more). verdict: the expressivity Verdict at w^tau, or None. guarantee: a `Guarantee`,
    the premise audit and, for "gd" and "sgd", the bound of Theorem 1 beside the measured loss
    (`LazyGuarantee` for "lazy", None before its tau).
    divergence: of a run that diverged, {epoch, step, loss (a text), samples: the mini-batch's
    indices (None for a full gradient), inputs_not_finite: those of them whose inputs are not};
    model holds the broken weights, the last checkpoint is from before. final: losses
    and accuracies of the trained network over the whole sets; empty unless completed. timings:
    seconds by stage. hidden_hash: SHA-256 of the frozen hidden layers, the same before and after
    the second phase. minimum: how far the training loss is from the global minimum over all
    weights; its str is one sentence.
    """

    model: nn.Module
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

    def __str__(self) -> str:
        """A few lines for a person; the first says how far from the global minimum the run is."""
        lines = [] if self.minimum is None else [str(self.minimum)]
        lines += [f"run {self.status} after {len(self.history)} epochs"]
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
                lines.append(f"  final {name}: loss {loss:.5f}{shown}")
        if self.hidden_hash:
            lines.append(
                f"  hidden layers in phase 2: bit-identical (SHA-256 {self.hidden_hash[:12]}), "
                f"features cached: {self.feature_cache}"
            )
            if not self.model.training:
                lines.append("  the model is in evaluation mode, the one that this is about")
        if self.verdict is not None:
            lines += ["  " + line for line in str(self.verdict).splitlines()]
        if self.guarantee is not None:
            lines += ["  " + line for line in str(self.guarantee).splitlines()]
        if self.run_dir is not None:
            lines.append(f"  run folder: {self.run_dir}")
        return "\n".join(lines)
