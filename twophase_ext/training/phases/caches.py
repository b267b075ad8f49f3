"""A run's caches of features, filled at tau."""

import warnings

from ..features.agreement import agreement, cache_disagreement
from ..features.cache import Features, smaller_mode
from ..run import Run
from ..steps.sharded import cached


def fill(run: Run) -> None:
    """Fill the run's caches, in a smaller mode where memory runs out; empty where h is not fixed.

    What is cached is compared with what the model itself gives, for every sample.
    """
    run.context.network.model.train(not run.context.config.fixed_statistics)
    if run.unfixed:
        run.state.cache_mode = "none"
    _fill(run)
    known = run.state.cache_mode == "none" and run.unfixed
    if run.context.config.second_phase == "lazy" or known:
        return
    evidence = run.unfixed or _compare(run)
    if evidence is None:
        return
    if run.context.ranks.size > 1:
        raise RuntimeError(f"features are not fixed, which several processes need: {evidence}")
    run.state.second.unfixed, run.state.cache_mode = evidence, "none"
    warnings.warn(f"nothing is cached and nothing claimed: {evidence}", stacklevel=2)
    _fill(run)


def _compare(run: Run) -> str | None:
    """`cache_disagreement` of the training samples; known of branches with the same features.

    Where nothing is cached, the comparison from before the first step again: what was zero then
    (a gate, a scale) may be another number now.
    """
    key = (run.state.hidden_hash, f"compared {run.state.cache_mode}")
    shared = {} if run.branch_cache is None else run.branch_cache
    features, context, config = run.train_features, run.context, run.context.config
    # rounded features and copies are no claim; on several ranks no process has all columns
    other = run.state.cache_mode == "hidden-bfloat16" or config.augment_copies is not None
    if other or context.ranks.size > 1 or features is None:
        return None
    if key not in shared:
        shared[key] = compare(run, features)
    return shared[key]


def compare(run: Run, features: Features) -> str | None:
    """Evidence where the user's own model gives other features or outputs now."""
    context, config = run.context, run.context.config
    with run.timed("features"):
        if features.mode != "none":
            stage = "features beside the model"
            context.progress.begin(stage, context.train.n)
            try:
                return cache_disagreement(
                    features,
                    context.network,
                    config.batch_size,
                    advance=lambda count: context.progress.advance(stage, count),
                )
            finally:
                context.progress.end(stage)
        if not config.fixed_statistics or context.train.random:
            return None  # nothing is claimed of these
        return agreement(
            context.network, context.train, config.batch_size, accumulate=config.accumulate
        ).evidence


def _fill(run: Run) -> None:
    while True:
        try:
            with run.timed("features"):
                return _fill_in(run, run.state.cache_mode)
        except (MemoryError, RuntimeError, OSError) as error:
            if run.context.ranks.size > 1:  # the others go on in this mode
                raise
            run.train_features = run.val_features = None
            run.state.cache_mode = smaller_mode(
                run.state.cache_mode,
                error,
                network=run.context.network,
                device=run.context.device,
                copies=run.context.config.augment_copies,
            )


def _fill_in(run: Run, mode: str) -> None:
    """Fill the caches in this mode, or take a branch's with the same hidden layers."""
    config = run.context.config
    shared = {} if run.branch_cache is None else run.branch_cache
    held_out = run.context.val if config.fixed_statistics else None
    total = run.context.train.rows * (config.augment_copies or 1)
    run.context.progress.begin("features", total + (held_out.rows if held_out is not None else 0))

    def advance(rows: int) -> None:
        run.context.progress.advance("features", rows)

    found: list[Features | None] = []
    for samples, name in ((run.context.train, "train_features"), (held_out, "val_features")):
        key = (run.state.hidden_hash, f"{name} {mode}")
        if samples is None:
            found.append(None)
            continue
        if key not in shared or mode == "none":
            copies = config.augment_copies if samples is run.context.train else None
            # what is measured on held-out samples is the network, not its rounded features
            exact = "hidden" if mode == "hidden-bfloat16" else mode
            kept = mode if samples is run.context.train else exact
            run.context.train.epoch = config.tau_epoch
            shared[key] = cached(
                samples, run.context.network, kept, advance, copies, run.context.ranks
            )
        features = shared[key]
        if (
            samples is run.context.val and samples.random and mode != "none"
        ):  # seen while it was filled
            features = Features(samples, run.context.network, "none")
        found.append(features)
    run.train_features, run.val_features = found
    run.context.progress.end("features")
