"""tp.Trainer: Algorithm 1 of the paper around any torch model and first-order optimizer."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import optim
from ..files import write_json
from ..memory import available_memory
from ..network import Network
from . import batchnorm, checkpoint, runfolder
from .config import resolve
from .data import Samples
from .engine import Run
from .features import plan_cache
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
    second_phase: "base", the base algorithm's own hyper-parameters on the last layer only.
    batch_norm: "frozen" (statistics recomputed once after the perturbation, then fixed) or "batch"
        (batch statistics go on moving: nothing is cached and Theorem 1's premise fails).
    feature_cache: "auto", "hidden", "backbone" or "none"; auto chooses by memory and says what.
    batch_size, seed; device: "auto" (where the model is) or that same device; precision: "float32"
        or "float64", to which model and data are converted.
    verify: "auto", "svd" or False: check the expressivity condition at w^tau.
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
        self.checkpoint_every = 1 if checkpoint_every is None else checkpoint_every
        if not isinstance(self.checkpoint_every, int) or self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every: expected epochs >= 1, got {checkpoint_every!r}")
        self.callbacks, self.progress = tuple(callbacks), progress

    def fit(
        self, train: Any, val: Any = None, *, resume: bool | str | Path | None = None
    ) -> Result:
        """Train the model in place and return the Result.

        train, val: (x, y) tensors or arrays (NumPy, CuPy, anything with DLPack; uint8 inputs are
        scaled to [0, 1]), a map-style Dataset, or a DataLoader over one (its dataset, collate
        function and batch size are used; the order of samples comes from the seed).
        resume: True continues the run in run_dir, a path the run in that folder or checkpoint file.
        A run resumed on the CPU ends with the same bits as one that was never interrupted.

        Ctrl-C finishes the step, saves, and returns status "interrupted". Raises ValueError or
        TypeError for unusable data before anything is trained, FileNotFoundError or ValueError for
        an unusable checkpoint.
        """
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
        network = Network(self.model, next(samples.in_order(2))[0][:2], self.last_layer)
        for part in (samples, held_out):
            if part is not None:
                part.prepare(self.loss, network.outputs)
        self._describe(network, samples, config, progress)
        mode = self._plan(network, samples, held_out, config, progress)
        optimizer = self._make_optimizer(network)

        state = None
        if resume:
            state, self._resumed_from = checkpoint.load(self._checkpoint_path(resume))
            checkpoint.check_matches(state, checkpoint.describe(network.state()), config.as_dict())
        folder = self._open_folder(resume, config, progress)
        run = Run(
            network,
            self.loss,
            optimizer,
            config,
            samples,
            held_out,
            mode,
            folder,
            progress,
            self.callbacks,
            self.checkpoint_every,
        )
        if state is not None:
            run.restore(state)
            progress.say(f"resumed from {self._resumed_from}: {run.epoch} epochs done")
        was_training = self.model.training
        try:
            status = run.execute()
        finally:
            self.model.train(was_training)
        result = Result(
            model=self.model,
            history=run.history,
            status=status,
            run_dir=folder,
            verdict=run.verdict,
            final={} if status == "diverged" else run.measure_all(),
            timings=run.timings,
            hidden_hash=run.hidden_hash,
            feature_cache=run.cache_mode if run.hidden_hash else None,
        )
        if folder is not None:
            write_json(
                folder / "result.json",
                {
                    "status": status,
                    "epochs_done": run.epoch,
                    "final": result.final,
                    "timings": result.timings,
                    "hidden_hash": result.hidden_hash,
                    "feature_cache": result.feature_cache,
                },
            )
        return result

    # --- parts of fit ------------------------------------------------------------------------

    def _describe(
        self, network: Network, samples: Samples, config: Any, progress: Progress
    ) -> None:
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
        config: Any,
        progress: Progress,
    ) -> str:
        wide = network.wide
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
        last = network.last_parameters()
        if not last:
            raise ValueError(f"last_layer: {network.last.name} has no trainable parameter")
        if isinstance(self.config.noise_std, dict):
            hidden = network.hidden_parameters()
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

    def _open_folder(self, resume: Any, config: Any, progress: Progress) -> Path | None:
        if self.run_dir is False:
            return None
        run_dir = self.run_dir
        if run_dir is None and resume:
            path = self._checkpoint_path(resume)
            run_dir = path if path.is_dir() else path.parent
        if run_dir is True:
            run_dir = None
        folder = runfolder.create(run_dir, resuming=bool(resume))
        if not (folder / "config.json").exists():
            resolved = {**config.as_dict(), "model": type(self.model).__name__}
            write_json(folder / "config.json", resolved)
            environment = runfolder.environment(self.device, config.seed)
            write_json(folder / "environment.json", environment)
        progress.say(f"run folder: {folder}")
        return folder


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
