"""The two-phase method under Lightning's Trainer. Needs the extra `lightning`."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, WeightedRandomSampler

from ..core.loaders import chosen
from ..expressivity import Verdict
from ..model.losses import ConvexLoss, resolve_loss
from ..model.probing import unwrap
from ..training.config import resolve_tau
from ..training.own_loop import FeatureCache, fit_last_layer
from .transition import Transition, check_optimizer

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback  # type: ignore[assignment]


class TwoPhaseCallback(Callback):
    """From epoch tau on only the last layer of a LightningModule is trained, after Algorithm 1.

    At tau: noise on the hidden layers, BatchNorm's statistics recomputed over the training data,
    hidden layers frozen (`tp.freeze`) until the fit ends, expressivity verified: `verdict`.
    The module has one optimizer, any; its groups need no names.

    tau: fraction of max_epochs or an epoch, at which the second phase begins.
    data: the training data as `tp.Trainer.fit` takes them, for the statistics, the verification and
        the cache; by default the samples that the train dataloader's sampler draws in every epoch.
    noise_std, seed, verify, last_layer: as of `tp.Trainer`.
    model: the name of the submodule that maps inputs to outputs, where that is not the module's own
        forward; names of parameters (the noise depends on them) are relative to it.
    cache: False: the module's own training_step goes on, epoch by epoch. True: at the end of epoch
        tau - 1 all epochs that remain are run over cached features (`tp.FeatureCache`,
        `tp.fit_last_layer`) in the order of `seed`, then the fit ends: seconds, without validation
        or logging in between; `losses` has the mean loss of each. loss: the one that training_step
        computes, "cross_entropy", "squared_error" or a `tp.ConvexLoss`; for the cache alone.

    Its state is in Lightning's checkpoints: a run resumed after tau adds no second noise. Ctrl-C
    during the cached epochs ends the one in progress and reaches Lightning; a run resumed from a
    checkpoint of that moment (ModelCheckpoint(save_on_exception=True)) goes on with the next.

    Raises ValueError or TypeError that name what is wrong, at the beginning of the fit where
    possible: several optimizers, sharded parameters, and with a cache learning-rate schedulers,
    gradient clipping or accumulation, manual optimization, several processes.
    """

    def __init__(
        self,
        tau: float | int = 0.6,
        *,
        data: Any = None,
        noise_std: float | dict[str, float] = 1e-3,
        seed: int = 1,
        model: str | None = None,
        last_layer: nn.Module | str | None = None,
        verify: str | bool = "auto",
        cache: bool = False,
        loss: str | ConvexLoss = "cross_entropy",
    ) -> None:
        """See the class."""
        self._transition = Transition(
            tau, noise_std=noise_std, seed=seed, last_layer=last_layer, verify=verify
        )
        self.data, self.model, self.cache, self.loss = data, model, cache, resolve_loss(loss)
        self.tau_epoch = 0  # set when the fit starts
        self.losses: list[float] = []  # of the epochs over the cache

    @property
    def verdict(self) -> Verdict | None:
        """The expressivity condition at tau; None before, and with verify=False."""
        return self._transition.verdict

    @property
    def hidden_hash(self) -> str | None:
        """SHA-256 of the hidden layers' state at tau; None before."""
        return self._transition.hash

    # --- Lightning's hooks -------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what cannot work."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"configure_optimizers: expected one optimizer, got {len(trainer.optimizers)}"
            )
        epochs = trainer.max_epochs
        if epochs in (None, -1):
            if self.cache or isinstance(self._transition.tau, float):
                raise ValueError("max_epochs: expected a number of epochs, got none")
            self.tau_epoch = self._transition.tau
        elif self.hidden_hash is None:
            self.tau_epoch = resolve_tau(self._transition.tau, epochs, 1)
        _check_strategy(trainer.strategy.model, pl_module)
        check_optimizer(trainer.optimizers[0], self._network(pl_module))
        if self.cache:
            self._check_cache(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what cannot work with these data; freeze again in a run resumed after tau."""
        network, data = self._network(pl_module), self._data(trainer)
        if self.hidden_hash is not None:
            self._transition.resume(network)
        else:
            self._transition.check(network, data)
        if self.cache and trainer.current_epoch >= self.tau_epoch:
            self._train_on_cache(trainer, pl_module)

    # Not on_train_epoch_start: a run resumed after the last batch of an epoch skips that hook.
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """The switch at tau, without a cache."""
        if not self.cache and self.hidden_hash is None and trainer.current_epoch >= self.tau_epoch:
            self._start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The switch and the whole second phase, with a cache."""
        if self.cache and trainer.current_epoch + 1 >= self.tau_epoch:
            self._train_on_cache(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """RuntimeError where the hidden layers moved; the model is given back unfrozen."""
        self._transition.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The model is given back unfrozen."""
        self._transition.release()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return {
            **self._transition.state(),
            "tau_epoch": self.tau_epoch,
            "losses": list(self.losses),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint."""
        self._transition.load(state_dict)
        self.tau_epoch, self.losses = state_dict["tau_epoch"], list(state_dict["losses"])

    # --- parts -------------------------------------------------------------------------------

    def _network(self, module: Any) -> nn.Module:
        return module if self.model is None else module.get_submodule(self.model)

    def _data(self, trainer: Any) -> Any:
        if self.data is not None:
            return self.data
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"data: expected the training data, as the train dataloader is a "
                f"{type(loader).__name__}"
            )
        sampler, dataset = loader.sampler, loader.dataset
        used, batches = trainer.num_training_batches, len(loader)
        if used < batches:
            raise ValueError(
                f"limit_train_batches, overfit_batches: expected all {batches} batches of the "
                f"train dataloader, got {used}; pass data, the samples that are trained on"
            )
        # Lightning's own for several processes, which all samples are divided among.
        divided = isinstance(sampler, DistributedSampler) and trainer.world_size > 1
        part = None if divided else chosen(loader, "train dataloader")
        # In index order, whatever the sampler's, whose weights stay those of the samples.
        return DataLoader(
            dataset if part is None else Subset(dataset, part),
            batch_size=1,
            sampler=sampler if isinstance(sampler, WeightedRandomSampler) else None,
            collate_fn=loader.collate_fn,
        )

    def _start(self, trainer: Any, module: Any) -> None:
        network = self._network(module)
        with torch.no_grad():
            self._transition.start(network, self._data(trainer))

    def _train_on_cache(self, trainer: Any, module: Any) -> None:
        """The switch, and the epochs that remain over the cache; then Lightning is told to stop."""
        if self.hidden_hash is None:
            self._start(trainer, module)
        network, optimizer = self._network(module), trainer.optimizers[0]
        first = self.tau_epoch + len(self.losses)
        if first < trainer.max_epochs:
            batch_size = self._batch_size(trainer)
            name = self._transition.name
            cache = FeatureCache(network, self._data(trainer), last_layer=name, loss=self.loss)
            counts = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer

            def count(_: int, loss: float) -> None:
                self.losses.append(loss)
                steps = -(-cache.n // batch_size)
                for progress in (counts.step.total, counts.step.current):
                    progress.ready += steps
                    progress.completed += steps

            fit_last_layer(
                network,
                cache,
                epochs=trainer.max_epochs - first,
                first_epoch=first,
                batch_size=batch_size,
                seed=self._transition.seed,
                optimizer=optimizer,
                on_epoch=count,
            )
        trainer.should_stop = True

    def _batch_size(self, trainer: Any) -> int:
        size = getattr(trainer.train_dataloader, "batch_size", None)
        if size is None:
            raise ValueError("cache: expected a train dataloader with a batch_size")
        return int(size)

    def _check_cache(self, trainer: Any, module: Any) -> None:
        wrong = {
            "learning-rate schedulers": bool(trainer.lr_scheduler_configs),
            "gradient clipping": bool(trainer.gradient_clip_val),
            "gradient accumulation": trainer.accumulate_grad_batches != 1,
            "manual optimization": not module.automatic_optimization,
            "several processes": trainer.world_size != 1,
            "max_steps": trainer.max_steps != -1,
            f"min_epochs > {self.tau_epoch}": (trainer.min_epochs or 0) > self.tau_epoch,
        }
        found = [name for name, present in wrong.items() if present]
        if found:
            raise ValueError(f"cache: expected False with {', '.join(found)}")


def _check_strategy(wrapped: nn.Module, module: nn.Module) -> None:
    """ValueError for a model whose parameters are sharded, or DDP that waits for every gradient."""
    if unwrap(wrapped) is not unwrap(module):
        raise ValueError(
            "strategy: expected one device or DistributedDataParallel, got "
            f"{type(wrapped).__name__}: the noise needs whole parameters"
        )
    if isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters:
        raise ValueError(
            "strategy: expected 'ddp_find_unused_parameters_true', as DistributedDataParallel "
            "waits for the gradients of the frozen layers"
        )
