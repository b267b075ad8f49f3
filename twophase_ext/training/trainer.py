"""tp.Trainer: Algorithm 1 of the paper around any torch model and first-order optimizer."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..expressivity.attempts import require_memory
from ..model.calling import dismiss, serve
from ..model.losses import ConvexLoss, resolve_loss
from ..model.network import Network
from . import batchnorm, outset, saved
from .branches import branch
from .callbacks import call, listeners
from .checks import check_runs, model_device, unchanged_on_error
from .config import SETTINGS, compile_options, resolve
from .context import Context
from .control.cadence import Cadence
from .control.progress import Progress
from .data.samples import Augment
from .distributed.ranks import joined
from .features.agreement import Agreement
from .loop import Loop
from .metrics import Metrics, resolve_metrics
from .minimum import minimum
from .optimizer.averaged import Averaged
from .optimizer.factory import OptimizerFactory, make_optimizer, paper_optimizer
from .optimizer.schedule import SchedulerFactory, make_schedule
from .persistence import checkpoint
from .persistence.runfolder import RunFolder
from .phases import SECOND
from .result import Result
from .run import Run
from .settings import AcceleratedDescent, Exact, GradientDescent, Lazy, StochasticDescent
from .several import check_several
from .state import PhaseState, RunState
from .steps.base import BaseStep, check_autocast

Resume = bool | str | Path | None


class Trainer:
    """Two-phase training (Algorithm 1): base algorithm, perturbation at tau, last layer only.

    Args:
        model: any nn.Module whose output is an affine function of its last hidden layer.
        loss: "cross_entropy" (labels, or rows of probabilities), "squared_error" (the paper's
            ||q - y||^2, summed over outputs, averaged over samples), "mse" (torch's, averaged over
            outputs too), "bce" (with logits), "huber", "smooth_l1", "soft_margin",
            "multilabel_soft_margin"; such a loss of torch.nn or torch.nn.functional with its
            weight, pos_weight, label_smoothing, ignore_index, delta or beta; or a `ConvexLoss`.
            Class weights: torch divides by the weights of a mini-batch, which makes its gradient
            biased; here it is divided by their mean over the data set, so that over all samples
            the loss is torch's. Samples, tokens or pixels whose label is ignored do not count.
        optimizer: callable list of parameters -> torch.optim.Optimizer; default the paper's SGD.
        last_layer: module or its name; by default the last affine layer on the path to the output.
        epochs: epochs in all.
        tau: the second phase begins at epoch round(tau * epochs), or at epoch tau if an int. 0: no
            first phase, as over somebody else's backbone (docs/linear-probe.md).
        noise_std: sigma of the Gaussian noise on the hidden layers, one number or {parameter name:
            sigma}, all > 0. Frozen parameters (requires_grad=False) are constants and get none.
        noise_seed: of the noise alone, default `seed`.
        second_phase: "base", the base algorithm's own hyper-parameters on the last layer only;
            "gd", full gradient steps of 1 / L_H, and "sgd", eta_t = c / t^(1/2 + eps), on the last
            layer (Theorem 1, with its bound); "agd", accelerated steps in the metric of the
            features, with a bound that falls as 1 / t^2; "exact", the last layer's minimum to a
            stated gap, after which the run ends; "lazy", full gradient steps on all layers
            under Theorem 3, one an epoch, without momentum or weight decay, the rank verified again
            as it goes: the step is halved, and in the end the run stopped (status "stopped"), where
            the rank cannot be shown; "none", the base algorithm to the end, to compare with.
            result.guarantee tells what held.
        gd: settings of second_phase="gd", a `GradientDescent` or a dict.
        agd: settings of second_phase="agd", an `AcceleratedDescent` or a dict.
        exact: settings of second_phase="exact", an `Exact` or a dict.
        sgd: settings of second_phase="sgd", a `StochasticDescent` or a dict.
        lazy: settings of second_phase="lazy", a `Lazy` or a dict.
        batch_norm: "frozen" (statistics recomputed once after the perturbation over the training
            set in index order, 256 samples at a time, then fixed), "kept" (the statistics that the
            model comes with are constants in both phases) or "batch" (batch statistics go on
            moving: nothing is cached and Theorem 1's premise fails). None: "kept" with tau=0, or
            where the parameters of every BatchNorm layer are frozen; "frozen" otherwise.
        feature_cache: "auto", "hidden", "backbone", "disk" or "none"; auto chooses by memory and
            says what. "hidden-bfloat16": h rounded, half the memory, another function.
        augment: callable (x [b, ...], torch.Generator) -> x of the same shape, on training
            batches; its repr tells a run from another. BatchNorm's statistics at tau, the
            verification and the measured losses are those of the data as given.
        augment_copies: data transformed at random are visited so many times at tau and these
            copies cached, an approximation of new transforms in every epoch.
        batch_size: samples a step.
        accumulate: micro-batches that a step goes through the model in, during the first phase,
            for less memory: the same gradient, but for BatchNorm's statistics.
        seed: seed of every random stream.
        device: "auto" (where the model is) or that same device.
        precision: "float32" or "float64", to which model and data are converted; "bf16-mixed" and
            "fp16-mixed": float32, the first phase under autocast (float16 with a gradient scaler).
        compile: True, or a dict of torch.compile's arguments: the first phase runs the compiled
            model.
        scheduler: callable optimizer -> LRScheduler, stepped after every epoch of the base
            algorithm; ReduceLROnPlateau gets the epoch's training loss. It goes on in second_phase
            "base" and stops at tau in the others.
        scheduler_interval: "epoch", or "step": the scheduler is stepped after every update.
        verify: method of `verify_expressivity` at w^tau ("auto", "separation", "certificate",
            "svd"), or False.
        run_dir: the run's folder; None makes a new one under runs/, False writes nothing.
        checkpoint_every: epochs between checkpoints, or a text: "500 steps", "90 seconds", "10
            minutes", within epochs too. Default: every epoch, and every ten minutes within one.
            There is always one at tau, after the verification, and one at the end.
        callbacks: `Callback` objects, or any with methods on_fit_start(run), on_perturb(run),
            on_epoch_end(run, record) or on_fit_end(run), run a `RunView` (docs/callbacks.md).
        metrics: {name: fn(logits [n, m_y], y) -> number}, over all training and validation data as
            the network stands at each epoch's end, and at the end: rows train_name and val_name.
        logger: "tensorboard" or "wandb", into the run's folder, or an object with add_scalar
            (SummaryWriter), log_metrics (Lightning's) or log (wandb's run), which gets each
            epoch's row; every folder has its metrics.csv.
        progress: False prints nothing.

    Wrong arguments raise ValueError or TypeError that name them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str | ConvexLoss = "cross_entropy",
        optimizer: OptimizerFactory | None = None,
        last_layer: nn.Module | str | None = None,
        epochs: int = 100,
        tau: int | float = 0.6,
        noise_std: float | dict[str, float] = 1e-3,
        noise_seed: int | None = None,
        second_phase: str = "base",
        gd: GradientDescent | dict[str, Any] | None = None,
        agd: AcceleratedDescent | dict[str, Any] | None = None,
        exact: Exact | dict[str, Any] | None = None,
        sgd: StochasticDescent | dict[str, Any] | None = None,
        lazy: Lazy | dict[str, Any] | None = None,
        batch_norm: str | None = None,
        feature_cache: str = "auto",
        augment: Augment | None = None,
        augment_copies: int | None = None,
        batch_size: int = 64,
        seed: int = 1,
        device: str | torch.device = "auto",
        precision: str = "float32",
        compile: bool | Mapping[str, Any] = False,
        accumulate: int = 1,
        scheduler: SchedulerFactory | None = None,
        scheduler_interval: str = "epoch",
        verify: bool | str = "auto",
        run_dir: str | Path | bool | None = None,
        checkpoint_every: int | str | None = None,
        callbacks: Iterable[Any] = (),
        metrics: Metrics | None = None,
        logger: Any = None,
        progress: bool = True,
    ) -> None:
        """See the class."""
        given = {name: value for name, value in locals().items() if name not in ("self", "model")}
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if optimizer is not None and not callable(optimizer):
            raise TypeError(
                "optimizer: expected a callable parameters -> Optimizer, as in "
                f"lambda p: torch.optim.Adam(p, 1e-3), got {optimizer!r:.60}"
            )
        if scheduler is not None and not callable(scheduler):
            raise TypeError("scheduler: expected a callable optimizer -> LRScheduler")
        self.loss, self.metrics = resolve_loss(loss), resolve_metrics(metrics)
        self.config = resolve(given, SECOND, batchnorm.pretrained(model))
        self.model, self.last_layer = model, last_layer
        self.optimizer, self.scheduler = optimizer or paper_optimizer, scheduler
        self.compile = compile_options(compile, model)
        self.augment, self.device = augment, model_device(model, device)
        self.run_dir, self.checkpoint_every = run_dir, checkpoint_every
        Cadence(checkpoint_every)  # or an error now
        callbacks = tuple(callbacks)
        self.callbacks, self.progress = listeners(callbacks, logger), progress
        # whether h is compared before training, and what a branch's trunk found of it
        self.compares = second_phase != "none" and self.config.fixed_statistics
        self.known: Agreement | None = None
        self._arguments = {**given, "callbacks": callbacks}

    def _clone(self, model: nn.Module, **changes: Any) -> "Trainer":
        """A Trainer of `model` with the same arguments but for `changes`."""
        other = changes.get("second_phase", self.config.second_phase) != self.config.second_phase
        settings = dict.fromkeys(SETTINGS) if other else {}
        return Trainer(model, **{**self._arguments, **settings, **changes})

    @torch.inference_mode(False)
    def fit(self, train: Any, val: Any = None, *, resume: Resume = None) -> Result:
        """Train the model in place and return the Result.

        train, val: (x, y) tensors or arrays (NumPy, CuPy, anything with DLPack; uint8 inputs are
        scaled to [0, 1], a graph is left behind), x also a dict or tuple of them for a model of
        several inputs; a map-style Dataset (Hugging Face's too), or a DataLoader over one, also
        Fabric's, accelerate's or torchdata's: its dataset, the samples that its sampler draws,
        collate function, batch size and workers are used; the order comes from the seed, no sample
        is dropped, and the log says which arguments change nothing. Workers change no bit. Every
        sample is fetched once before training, to be checked, and compared whenever it is fetched
        again. Of (x, y, weight), also in a dataset, and of a WeightedRandomSampler the loss is
        sum_i w_i l_i / sum_i w_i; labels may be text, see result.classes (docs/data.md).
        resume: True continues the run in run_dir, "auto" continues it where there is a checkpoint
        and begins where there is none, a path continues the run in that folder or checkpoint file.
        A run resumed on the CPU, with the number of threads, instruction set and torch of before,
        ends with the same bits as one that was never interrupted (docs/determinism.md). A
        callback's own state is not saved, but what it sets in the optimizer is.

        Under torchrun every process calls it with the same arguments (docs/several-processes.md).
        Ctrl-C, or SIGTERM (SLURM, Kubernetes), finishes the step, saves, and returns status
        "interrupted". After tau the model is left in evaluation mode (but for batch_norm="batch"):
        a forward pass in training mode would move the BatchNorm statistics that the verdict is
        about; before tau in the mode that it came in. Raises ValueError or TypeError for unusable
        data, FileNotFoundError or ValueError for an unusable checkpoint, before the model has
        changed.
        """
        try:
            return self._execute(self._prepare(train, val, resume))
        finally:
            dismiss(self.model)

    @torch.inference_mode(False)
    def branch(
        self,
        branches: Mapping[str, Mapping[str, Any]],
        train: Any,
        val: Any = None,
        *,
        resume: bool = False,
    ) -> dict[str, Result]:
        """Several second phases from one first phase: {name: Result}, in the order given.

        branches: {name: the Trainer's arguments to change}, of second_phase and its settings,
        noise_std, noise_seed, optimizer (its own rates, the trunk's state), epochs, tau, verify,
        batch_norm, feature_cache and augment_copies. second_phase="none" is the base algorithm
        continued, so that base and two-phase share a trunk. Branches with the same noise share one
        cache of features. The trunk goes on to the last tau, where self.model ends; each
        result.model is a copy.

        run_dir gets a folder for the trunk and one for each branch. resume=True continues
        what is there and recomputes nothing that is finished. Ctrl-C saves and returns the branches
        so far, the last one "interrupted", or {"trunk": Result} within the first phase. Raises as
        `fit`; ValueError for a change that the first phase depends on.
        """
        try:
            results = branch(self, branches, train, val, resume)
        finally:
            dismiss(self.model)
        for result in results.values():
            dismiss(result.model)
        return results

    def _execute(self, loop: Loop, epochs: int | None = None) -> Result:
        """Train a prepared run to its end, or to an epoch; see `fit`."""
        context, state, config = loop.context, loop.state, loop.context.config
        modes = {module: module.training for module in self.model.modules()}
        if context.folder is not None:
            context.folder.hold()
        try:
            status = loop.execute(epochs)
            status, final, found = loop.conclude(status)
        finally:
            call(loop.run, "on_fit_end")
            for module, mode in modes.items():
                module.training = mode
            if state.hidden_hash is not None and config.fixed_statistics:
                self.model.eval()
            for part in loop.run.sets():
                part.close()
            if context.folder is not None:
                context.folder.release()
        path = None if context.folder is None else context.folder.path
        reported = context.ranks.broadcast_object(lambda: (state.history, state.timings, path))
        state.history, state.timings, folder = reported
        result = Result(
            model=self.model,
            history=state.history,
            status=status,
            run_dir=folder,
            verdict=state.verdict,
            final=final,
            timings=state.timings,
            guarantee=found,
            divergence=loop.fault,
            # in the lazy phase the hidden layers move: no claim that they did not
            hidden_hash=None if config.second_phase == "lazy" else state.hidden_hash,
            feature_cache=state.cache_mode if state.hidden_hash else None,
            minimum=minimum(
                *(context.network, context.train, final.get("train_loss")),
                None if loop.run.unfixed else state.verdict,  # is about other features then
                getattr(found, "constants", {}),
            ),
            loss=self.loss,
            last_layer=context.network.last.name,
            classes=context.train.classes,
            stopped=loop.run.stop or loop.second.stopped,
        )
        if context.folder is not None:
            context.folder.write_result(result, state.epoch)
        return result

    # --- parts of fit ------------------------------------------------------------------------

    def _prepare(self, train: Any, val: Any, resume: Resume) -> Loop:
        """The run of `fit` before its first step: everything that can be refused is refused."""
        with unchanged_on_error(self.model), ExitStack() as on_error:
            loop = self._build(train, val, resume, on_error)
            on_error.pop_all()
            return loop

    def _build(self, train: Any, val: Any, resume: Resume, on_error: ExitStack) -> Loop:
        config, ranks = self.config, joined()
        check_autocast(config, self.device)
        progress = Progress(self.progress and ranks.rank == 0)
        self.model.to(config.dtype)
        sets = outset.open_sets(train, val, self.device, config.dtype, progress, on_error)
        samples, held_out = sets[0], sets[1] if len(sets) > 1 else None
        form = serve(self.model, samples.packing, samples.example())
        if samples.batch_size is not None and samples.batch_size != config.batch_size:
            progress.say(f"batch_size: {samples.batch_size}, the DataLoader's")
            config = replace(config, batch_size=samples.batch_size)
        if config.fixed_statistics:
            batchnorm.check_freezable(self.model)
        for part in sets:
            part.seed, part.form = config.seed, form
        if self.augment is not None:
            samples.augment, samples.random = self.augment, True
        with config.autocast(self.device):
            examples = [check_runs(self.model, part) for part in sets]
        network = Network(self.model, examples[0], self.last_layer)
        compare = self.compares and self.known is None
        looked = (network, self.loss, config, sets, examples[0], ranks, compare, self.metrics)
        fixed = outset.look_at(*looked)
        fixed = self.known or fixed
        if config.second_phase != "none":
            require_memory(str(config.verify), samples.distinct, network.width + 1, self.device)
        outset.describe(network, samples, progress)
        mode = outset.plan(network, sets, config, progress, ranks, fixed)
        optimizer = make_optimizer(self.optimizer, network, config.noise_std)
        schedule = make_schedule(
            self.scheduler, optimizer, config.scheduler_interval, config.second_phase
        )
        per_epoch = len(batchnorm.batch_bounds(network.model, samples.n, config.batch_size)) - 1
        schedule.require_steps(config.epochs, config.tau_epoch, per_epoch)
        context = Context(
            network=network,
            loss=samples.objective,
            optimizer=optimizer,
            config=config,
            train=samples,
            val=held_out,
            progress=progress,
            callbacks=self.callbacks,
            cadence=Cadence(self.checkpoint_every),
            schedule=schedule,
            ranks=ranks,
            base_step=BaseStep(
                *(network, samples.objective, optimizer, config, schedule, self.compile),
                ignores=samples.kept is not None,
            ),
            averaged=Averaged(optimizer),
            fixed=fixed,
            metrics=self.metrics,
            compiled=self.compile,
        )
        return self._begin(
            context, RunState(cache_mode=mode, second=PhaseState(fixed.evidence)), resume
        )

    def _begin(self, context: Context, state: RunState, resume: Resume) -> Loop:
        """The loop at its beginning, or where a checkpoint stands; the run folder is opened."""
        ranks = context.ranks
        found, source = ranks.broadcast_object(lambda: checkpoint.find(resume, self.run_dir))
        check_several(context, state.cache_mode if found is None else found["cache_mode"])
        second = SECOND[context.config.second_phase]
        Loop(Run(context, state))  # or an error, before a folder is made
        folder = ranks.broadcast_object(
            lambda: outset.open_folder(self.run_dir, source, resume == "auto")
        )
        with ExitStack() as on_error:  # a kept traceback would keep the lock
            if folder is not None and ranks.rank == 0:
                kept = RunFolder(folder)
                kept.hold()
                on_error.callback(kept.release)
                context = replace(context, folder=kept)
            if found is not None:
                state = saved.restore(context, second.frozen(context), found)
                state.second.unfixed = context.fixed.evidence or state.second.unfixed
            loop = Loop(Run(context, state))
            context.base_step.after_first = lambda: saved.check_holds(context)
            context.base_step.withdraw = context.withdraw
            ranks.where = lambda: f"epoch {state.epoch}, step {state.batch}"
            outset.begin_folder(context, state.verdict, found)
            on_error.pop_all()
        if source is not None:
            context.progress.say(f"resumed from {source}: {state.epoch} epochs done")
        return loop
