"""tau: noise on the hidden layers, BatchNorm fixed, the condition verified, features cached."""

from contextlib import nullcontext

from ..core.hashing import tensors_hash
from . import batchnorm
from .callbacks import call
from .phases import SecondPhase
from .run import Run
from .tau import perturb


def enter_second_phase(run: Run, second: SecondPhase) -> None:
    """Noise, proof and caches, as far as they are not done; each sample is fetched once."""
    train, val = run.context.train, run.context.val
    if run.state.hidden_hash is not None and run.train_features is not None:
        return
    with train.held(), nullcontext() if val is None else val.held():
        if run.state.hidden_hash is None:
            _perturb(run, second)
            run.save()  # the verification may have taken hours
        if run.train_features is None:
            second.fill_caches()


def _perturb(run: Run, second: SecondPhase) -> None:
    """w_(1:H) + sigma xi, xi ~ N(0, I); then everything that the second phase rests on."""
    context, state = run.context, run.state
    network, config = context.network, context.config
    hidden = network.hidden_parameters()
    with run.timed("perturbation"):
        seed = config.seed if config.noise_seed is None else config.noise_seed
        perturb(hidden, config.noise_std, seed)
    if config.batch_norm == "frozen":
        with run.timed("batch_norm"):
            batchnorm.recalibrate_over(network, context.train, context.ranks)
    if config.fixed_statistics:
        network.model.eval()
    context.optimizer.zero_grad(set_to_none=True)  # no stale hidden gradient survives tau
    context.averaged.forget(hidden)
    state.hidden_hash = tensors_hash(second.frozen(context))
    context.ranks.agree("hidden layers after the noise", state.hidden_hash)
    count = len(hidden)
    noise = f"noise added to {count} hidden tensors" if count else "no noise, all before is frozen"
    context.progress.say(f"epoch {state.epoch}: {noise}; from here {second.moves} trained")
    call(run, "on_perturb")
    if config.verify:
        _verify(run, second)


def _verify(run: Run, second: SecondPhase) -> None:
    """The condition at w^tau, or what a branch with the same hidden layers has found of it."""
    context, state, config = run.context, run.state, run.context.config
    key = (state.hidden_hash, f"verdict {config.verify} {config.batch_norm}")
    known = {} if run.branch_cache is None else run.branch_cache
    if key not in known:
        known[key] = context.ranks.broadcast_object(second.verify)
    verdict = state.verdict = known[key]
    context.progress.say(str(verdict).splitlines()[0])  # whole in the result's summary
    if context.folder is not None:
        context.folder.write_verdict(verdict)
