"""tp.Trainer: Algorithm 1 of the paper around any torch model and first-order optimizer."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import optim
from ..files import write_json
from ..memory import available_memory
from ..network import Network
from ..ops.perturb import checked_tensors
from ..probing import record
from . import batchnorm, checkpoint, runfolder
from .config import Config, Lazy, integer, resolve
from .data import Samples
from .engine import Run
from .features import BATCH, plan_cache
from .lazy import LazyRun
from .losses import ConvexLoss, resolve_loss
from .progress import Progress
from .result import Result

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def paper_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with the paper's settings: lr 0.01, momentum 0.9, weight decay 1e-5 (section 7.2)."""
    return optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-5)


class Trainer:
    """Two-phase training (Algorithm 1): base algorithm, perturbation at tau, last layer only.

    model: any nn.Module whose output is an affine function of its last hidden layer.
    loss: "cross_entropy" (integer labels), "squared_error" (the paper's ||q - y||^2, summed over
        outputs, averaged over samples) or a `ConvexLoss`.
    optimizer: callable list of parameters -> torch.optim.Optimizer; default the paper's SGD.
    last_layer: module or its name; by default the last affine layer on the path to the output.
    epochs, tau: the second phase begins at epoch round(tau * epochs), or at epoch tau if an int.
    noise_std: sigma of the Gaussian noise, one number or {parameter name: sigma}, all > 0.
    second_phase: "base", the base algorithm's own hyper-parameters on the last layer only; "lazy",
        full gradient steps on all layers under Theorem 3, one an epoch, without momentum or weight
        decay, the rank verified again as it goes: the step is halved, and in the end the run
        stopped (status "stopped"), where the rank cannot be shown. result.guarantee tells.
    lazy: its settings, a `Lazy` or a dict of {"smoothness", "eta_bar", "verify_every"}.
    batch_norm: "frozen" (statistics recomputed once after the perturbation over the training set in
        index order, 256 samples at a time, then fixed) or "batch"
        (batch statistics go on moving: nothing is cached and Theorem 1's premise fails).
    feature_cache: "auto", "hidden", "backbone" or "none"; auto chooses by memory and says what.
    batch_size, seed; device: "auto" (where the model is) or that same device; precision: "float32"
        or "float64", to which model and data are converted.
    verify: method of `verify_expressivity` at w^tau ("auto", "separation", ...), or False.
    run_dir: the run's folder; None makes a new one under runs/, False writes nothing.
    checkpoint_every: epochs between checkpoints, default 1.
    callbacks: objects with any of on_fit_start(run), on_perturb(run), on_epoch_end(run, record).
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
        tau: float | int = 0.6,
        noise_std: float | dict[str, float] = 1e-3,
        second_phase: str = "base",
        lazy: Lazy | dict[str, Any] | None = None,
        batch_norm: str = "frozen",
        feature_cache: str = "auto",
        batch_size: int = 64,
        seed: int = 1,
        device: str | torch.device = "auto",
        precision: str = "float32",
        verify: str | bool = "auto",
        run_dir: str | Path | bool | None = None,
        checkpoint_every: int | None = None,
        callbacks: Iterable[Any] = (),
        progress: bool = True,
    ) -> None:
        """See the class."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if optimizer is not None and not callable(optimizer):
            raise TypeError("optimizer: expected a callable parameters -> Optimizer")
        self.loss = resolve_loss(loss)
        self.config = resolve(
            loss=self.loss.name,
            epochs=epochs,
            tau=tau,
            noise_std=noise_std,
            second_phase=second_phase,
            lazy=lazy,
            batch_norm=batch_norm,
            feature_cache=feature_cache,
            batch_size=batch_size,
            seed=seed,
            precision=precision,
            verify=verify,
        )
        self.model, self.last_layer = model, last_layer
        self.optimizer = optimizer or paper_optimizer
        self.device = _model_device(model, device)
        self.run_dir = run_dir
        every = 1 if checkpoint_every is None else checkpoint_every
        self.checkpoint_every = integer("checkpoint_every", every, 1)
        self.callbacks, self.progress = tuple(callbacks), progress

    def fit(
        self, train: Any, val: Any = None, *, resume: bool | str | Path | None = None
    ) -> Result:
        """Train the model in place and return the Result.

        train, val: (x, y) tensors or arrays (NumPy, CuPy, anything with DLPack; uint8 inputs are
        scaled to [0, 1]), a map-style Dataset, or a DataLoader over one (its dataset, collate
        function and batch size are used; the order of samples comes from the seed, and no sample
        is dropped). Every sample of a Dataset is fetched once before training, to be checked.
        resume: True continues the run in run_dir, a path the run in that folder or checkpoint file.
        A run resumed on the CPU ends with the same bits as one that was never interrupted; a
        callback's own state is not saved, but what it sets in the optimizer is.

        Ctrl-C finishes the step, saves, and returns status "interrupted". Raises ValueError or
        TypeError for unusable data, FileNotFoundError or ValueError for an unusable checkpoint,
        before the model has changed.
        """
        with _unchanged_on_error(self.model):
            run = self._prepare(train, val, resume)
        modes = {module: module.training for module in self.model.modules()}
        try:
            status = run.execute()
            final = run.measure_all() if status == "completed" else {}
        finally:
            for module, mode in modes.items():
                module.training = mode
        result = Result(
            model=self.model,
            history=run.history,
            status=status,
            run_dir=run.folder,
            verdict=run.verdict,
            final=final,
            timings=run.timings,
            guarantee=run.guarantee() if isinstance(run, LazyRun) else None,
            # in the lazy phase the hidden layers move: no claim that they did not
            hidden_hash=None if isinstance(run, LazyRun) else run.hidden_hash,
            feature_cache=run.cache_mode if run.hidden_hash else None,
        )
        if run.folder is not None:
            write_json(
                run.folder / "result.json",
                {
                    "status": status,
                    "epochs_done": run.epoch,
                    "final": result.final,
                    "timings": result.timings,
                    "hidden_hash": result.hidden_hash,
                    "feature_cache": result.feature_cache,
                    "guarantee": result.guarantee and result.guarantee.as_dict(),
                },
            )
        return result

    # --- parts of fit ------------------------------------------------------------------------

    def _prepare(self, train: Any, val: Any, resume: bool | str | Path | None) -> Run:
        """Everything that can be refused is refused here."""
        config = self.config
        progress = Progress(self.progress)
        self.model.to(config.dtype)
        samples = Samples.of(train, name="train", device=self.device, dtype=config.dtype)
        held_out = (
            None
            if val is None
            else Samples.of(val, name="val", device=self.device, dtype=config.dtype)
        )
        if samples.batch_size is not None and samples.batch_size != config.batch_size:
            progress.say(f"batch_size: {samples.batch_size}, the DataLoader's")
            config = resolve(
                **{
                    **{k: v for k, v in config.as_dict().items() if k != "tau_epoch"},
                    "tau": config.tau_epoch,
                    "batch_size": samples.batch_size,
                }
            )
        if config.batch_norm == "frozen":
            batchnorm.check_freezable(self.model)
        for part in (samples, held_out):
            if part is not None:
                part.seed = config.seed
                _check_runs(self.model, part)
        network = Network(self.model, next(samples.in_order(2))[0][:2], self.last_layer)
        for part in (samples, held_out):
            if part is not None:
                part.prepare(self.loss, network.outputs)
        self._describe(network, samples, progress)
        mode = self._plan(network, samples, held_out, config, progress)
        optimizer = self._make_optimizer(network)
        run = (LazyRun if config.lazy else Run)(
            network,
            self.loss,
            optimizer,
            config,
            samples,
            held_out,
            mode,
            progress,
            self.callbacks,
            self.checkpoint_every,
        )
        state, source = None, None
        if resume:
            state, source = checkpoint.load(self._checkpoint_path(resume))
        run.folder = self._open_folder(source)
        if state is not None:
            run.restore(state)
        if run.folder is not None:
            self._describe_run(run, run.folder)
        if source is not None:
            progress.say(f"resumed from {source}: {run.epoch} epochs done")
        return run

    def _describe(self, network: Network, samples: Samples, progress: Progress) -> None:
        last = network.last
        progress.say(f"last layer: {last.name} (affine, {network.width} -> {network.outputs})")
        if network.wide is None:
            progress.say("the last hidden layer is not affine + exact softplus")
        if network.width < samples.n:
            warnings.warn(
                f"the last hidden layer has {network.width} units for n = {samples.n} samples: "
                "Theorem 1's premise m_H >= n fails and no guarantee is claimed. "
                "tp.nn.widen(model, n) adds such a layer",
                stacklevel=4,
            )

    def _plan(
        self,
        network: Network,
        samples: Samples,
        held_out: Samples | None,
        config: Config,
        progress: Progress,
    ) -> str:
        wide = network.wide
        if config.lazy:
            return "none"
        plan = plan_cache(
            config.feature_cache,
            n=samples.n + (held_out.n if held_out is not None else 0),
            width=network.width,
            backbone_width=None if wide is None else wide.linear.in_features,
            itemsize=config.dtype.itemsize,
            available=available_memory(self.device),
            random=samples.random or bool(held_out is not None and held_out.random),
            fixed_features=config.batch_norm == "frozen",
        )
        progress.say(f"feature cache in phase 2: {plan.mode} ({plan.reason})")
        return plan.mode

    def _make_optimizer(self, network: Network) -> torch.optim.Optimizer:
        parameters = network.parameters()
        if not network.last.module.weight.requires_grad:
            raise ValueError(
                f"last_layer: {network.last.name}.weight does not require a gradient, but the "
                "second phase trains it"
            )
        hidden = checked_tensors(network.hidden_parameters())  # what perturb_ refuses at tau
        if isinstance(self.config.noise_std, dict):
            given = self.config.noise_std
            missing = [name for name in hidden if name not in given]
            unknown = [name for name in given if name not in hidden]
            if missing or unknown:
                problem = f"missing {missing[:3]}" if missing else f"unknown {unknown[:3]}"
                raise ValueError(f"noise_std: expected one sigma per hidden parameter, {problem}")
        optimizer = self.optimizer(list(parameters.values()))
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer: LBFGS needs a closure and is not a mini-batch algorithm")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        absent = [name for name, p in parameters.items() if id(p) not in held]
        if absent:
            raise ValueError(f"optimizer: lacks {absent[0]} ({len(absent)} such parameters)")
        return optimizer

    def _checkpoint_path(self, resume: bool | str | Path) -> Path:
        if resume is not True:
            return Path(str(resume))
        if not isinstance(self.run_dir, str | Path):
            raise ValueError("resume: True needs run_dir, the folder of the run to continue")
        return Path(self.run_dir)

    def _open_folder(self, source: Path | None) -> Path | None:
        """The run folder, reopened where the checkpoint `source` comes from it."""
        if self.run_dir is False:
            return None
        run_dir = None if self.run_dir is True else self.run_dir
        if run_dir is None and source is not None:
            run_dir = source.parent
        same = source is not None and source.parent.resolve() == Path(str(run_dir)).resolve()
        return runfolder.create(run_dir, resuming=same)

    def _describe_run(self, run: Run, folder: Path) -> None:
        """What the folder tells about the run before its first epoch."""
        if not (folder / "config.json").exists():
            network = run.network
            resolved = {
                **run.identity(),
                "model": type(self.model).__name__,
                "last_layer": network.last.name,
                "width": network.width,
                "outputs": network.outputs,
                "optimizer": runfolder.describe_optimizer(run.optimizer),
                "statistics_batch": BATCH,
            }
            write_json(folder / "config.json", resolved)
            environment = runfolder.environment(self.device, run.config.seed)
            write_json(folder / "environment.json", environment)
        if run.verdict is not None:
            run.verdict.save(folder / "verdict.json")
        run.progress.say(f"run folder: {folder}")


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """The conversion to the training precision is undone where the arguments are refused."""
    parameters = [
        (p, p.data, p.grad, None if p.grad is None else p.grad.data) for p in model.parameters()
    ]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for parameter, data, grad, grad_data in parameters:
            parameter.grad = None
            parameter.data = data
            if grad is not None and grad_data is not None:
                grad.data = grad_data
                parameter.grad = grad
        for module, own in buffers:
            module._buffers.update(own)
        raise


def _check_runs(model: nn.Module, samples: Samples) -> None:
    """Run the model on two samples; ValueError where it does not take such inputs."""
    x: Tensor = next(samples.in_order(2))[0][:2]
    try:
        record(model, x, ())
    except Exception as error:  # whatever the user's own forward pass raises
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{samples.name}: the model does not run on inputs of shape "
            f"[n, {', '.join(map(str, x.shape[1:]))}] and {x.dtype}: {first_line}"
        ) from error


def _model_device(model: nn.Module, device: str | torch.device) -> torch.device:
    """The one device of the model's parameters; ValueError where it is not the one asked for."""
    devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    if len(devices) > 1:
        found = ", ".join(sorted(str(d) for d in devices))
        raise ValueError(f"model: expected all parameters on one device, got {found}")
    if not devices:
        raise ValueError("model: has no parameters")
    own = devices.pop()
    if device != "auto":
        asked = torch.device(device)
        if asked.type != own.type or (asked.index is not None and asked.index != own.index):
            raise ValueError(
                f"device: asked for {asked}, but the model is on {own}; move it first "
                f"(model.to({str(asked)!r})) or leave device='auto'"
            )
    return own
