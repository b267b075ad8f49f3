"""A run's caches of features, filled at tau."""

from typing import TYPE_CHECKING

from .columns import cached
from .features import smaller_mode

if TYPE_CHECKING:
    from .engine import Run


def fill(run: "Run") -> None:
    """Fill the run's caches, in a smaller mode where memory runs out."""
    run.network.model.train(run.config.batch_norm == "batch")
    while True:
        try:
            return run._fill_caches(run.cache_mode)
        except (MemoryError, RuntimeError) as error:
            if run.ranks.size > 1:  # the others go on in this mode
                raise
            run.train_features = run.val_features = None
            run.cache_mode = smaller_mode(
                run.cache_mode,
                error,
                network=run.network,
                device=run.device,
                copies=run.config.augment_copies,
            )


def fill_in(run: "Run", mode: str) -> None:
    """Fill the caches in this mode, or take a branch's with the same hidden layers."""
    config = run.config
    shared = {} if run.shared is None else run.shared
    held_out = run.val if config.batch_norm == "frozen" else None
    total = run.train.n * (config.augment_copies or 1)
    run.progress.begin("features", total + (held_out.n if held_out is not None else 0))

    def advance(rows: int) -> None:
        run.progress.advance("features", rows)

    for samples, name in ((run.train, "train_features"), (held_out, "val_features")):
        key = (run.hidden_hash, f"{name} {mode}")
        if samples is None:
            continue
        if key not in shared or mode == "none":
            copies = config.augment_copies if samples is run.train else None
            # what is measured on held-out samples is the network, not its rounded features
            exact = "hidden" if mode == "hidden-bfloat16" else mode
            kept = mode if samples is run.train else exact
            run.train.epoch = config.tau_epoch
            shared[key] = cached(samples, run.network, kept, advance, copies, run.ranks)
        setattr(run, name, shared[key])
    run.progress.end("features")
