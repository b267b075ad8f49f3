"""What is settled before the first step: samples and model looked at, the cache planned."""

import warnings
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.environment import environment_of_run
from ..expressivity import Verdict
from ..model.losses import ConvexLoss
from ..model.network import Network
from ..model.probing import unwrap
from ..theory.premises import FAILED, width_premise
from .batchnorm import batch_bounds
from .checks import check_single, check_trains
from .config import Config
from .context import Context
from .control.progress import Progress
from .data.samples import BATCH, Samples
from .declared import check_loss
from .distributed.ranks import Ranks
from .features.agreement import Agreement, agreement
from .features.cache import plan_for
from .metrics import Metrics, try_out
from .persistence.runfolder import create, describe_optimizer
from .steps.sharded import check_model


def open_sets(
    train: Any,
    val: Any,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    on_error: ExitStack,
) -> list[Samples]:
    """The training samples, and those of validation where there are some.

    on_error: ends their workers. ValueError where the validation data are of another form.
    """
    found = [Samples.of(train, name="train", device=device, dtype=dtype)]
    if val is not None:
        known = found[0].classes
        found.append(Samples.of(val, name="val", device=device, dtype=dtype, classes=known))
        _check_val(*found)
    for part in found:
        on_error.callback(part.close)
        if part.not_used:
            progress.say(f"{part.name}: not used of the DataLoader: {'; '.join(part.not_used)}")
    return found


def _check_val(train: Samples, val: Samples) -> None:
    """ValueError where the validation data are of another form."""
    if val.packing != train.packing:
        raise ValueError(
            f"val: expected inputs as those of train, {train.packing}, got {val.packing}"
        )
    if (val.classes is None) != (train.classes is None):
        kinds = ["numbers" if part.classes is None else "text" for part in (train, val)]
        raise ValueError(f"val: expected labels that are {kinds[0]} as train's, got {kinds[1]}")


def look_at(
    network: Network,
    loss: ConvexLoss,
    config: Config,
    sets: list[Samples],
    example: Tensor,
    ranks: Ranks,
    compare: bool,
    metrics: Metrics,
) -> Agreement:
    """Check every sample of the sets, training first, and the model on them.

    compare: whether h has to be the same in every batch. metrics: tried on some samples. Raises
    ValueError or TypeError for what would be found later: see `check_trains`, `check_loss`,
    `Samples.prepare`, `agreement`, `try_out`.
    """
    if ranks.size > 1:
        check_model(network.model)
    each = network.last.rows
    train = sets[0]
    if config.tau_epoch or config.second_phase == "none":  # a first phase, in training mode
        check_trains(network.model, example, network.outputs, each)
        offsets = batch_bounds(network.model, train.n, config.batch_size)
        if any(end - begin == 1 for begin, end in pairwise(offsets)):
            check_single(network.model, example)
    with train.held():
        train.prepare(loss, network.outputs, each)
        check_loss(loss, network.outputs, train, config)
        try_out(metrics, network, train)
        if train.random and config.augment_copies is None:
            compare = False  # nothing is cached or claimed
        fixed = Agreement()
        if compare:
            accumulate = config.accumulate
            fixed = agreement(network, train, config.batch_size, ranks, accumulate=accumulate)
    for samples in sets[1:]:
        samples.prepare(loss, network.outputs, each)
        try_out(metrics, network, samples)
    return fixed


def describe(network: Network, samples: Samples, progress: Progress) -> None:
    """Say which layers were found; warn where Theorem 1 cannot apply."""
    last = network.last
    progress.say(f"last layer: {last.name} (affine, {network.width} -> {network.outputs})")
    if network.analytic is None:
        progress.say("the last hidden layer is not affine + exact softplus")
    elif network.wide is None:
        kind = type(network.analytic.activation).__name__
        progress.say(f"the last hidden layer is affine + {kind}: separation can prove Assumption 1")
    if samples.each > 1 or samples.kept is not None:
        progress.say(f"outputs that count: {samples.rows}, of {samples.n} samples")
    if samples.drawn is not None:
        progress.say(
            "WeightedRandomSampler: the training loss is the expected loss of what it draws, the "
            "mean weighted by its weights; an epoch visits every sample once"
        )
    elif samples.weighted:
        progress.say("sample weights: the training loss is sum w_i l_i / sum w_i")
    width = width_premise(network, samples.rows, samples.distinct)
    if width.status == FAILED and not network.hidden_parameters():
        progress.say(
            f"only the last layer is trained, and {width.evidence}: its minimum is not that of all "
            f"weights. {width.advice}"
        )
    elif width.status == FAILED:
        warnings.warn(
            f"the last hidden layer has few units, {width.evidence}: Theorem 1's premise "
            f"{width.name} fails and no guarantee is claimed. {width.advice}",
            stacklevel=6,
        )


def plan(
    network: Network,
    sets: list[Samples],
    config: Config,
    progress: Progress,
    ranks: Ranks,
    fixed: Agreement,
) -> str:
    """The mode of the second phase's cache of features."""
    if config.second_phase in ("lazy", "none"):
        return "none"
    found = plan_for(
        network,
        sets,
        config.feature_cache,
        ranks=ranks,
        moving=fixed.evidence if config.fixed_statistics else "batch_norm='batch'",
        copies=config.augment_copies,
    )
    progress.say(f"feature cache in phase 2: {found.mode} ({found.reason})")
    return found.mode


def open_folder(
    run_dir: str | Path | bool | None, source: Path | None, reopen: bool
) -> Path | None:
    """The run folder, reopened where the checkpoint `source` comes from it or as asked."""
    if run_dir is False:
        return None
    folder = None if run_dir is True or run_dir is None else Path(run_dir)
    if folder is None and source is not None:
        folder = source.parent
    same = source is not None and source.parent.resolve() == Path(str(folder)).resolve()
    return create(folder, resuming=same or (reopen and source is None))


def begin_folder(context: Context, verdict: Verdict | None, found: dict[str, Any] | None) -> None:
    """What the run folder, where there is one, tells before the first epoch.

    found: the checkpoint from which the run goes on, maybe for another number of epochs.
    """
    folder, network = context.folder, context.network
    if folder is None:
        return
    if found is None or found["config"] != context.identity() or not folder.begun:
        resolved = {
            **context.identity(),
            "model": type(unwrap(network.model)).__name__,
            "last_layer": network.last.name,
            "width": network.width,
            "outputs": network.outputs,
            "optimizer": describe_optimizer(context.optimizer),
            "statistics_batch": BATCH,
            "own_loss": not context.loss.known,
            "compile": context.compiled is not None,
            "classes": context.train.classes,
        }
        folder.begin(resolved, environment_of_run(context.device, context.config.seed))
    if verdict is not None:
        folder.write_verdict(verdict)
    context.progress.say(f"run folder: {folder.path}")
