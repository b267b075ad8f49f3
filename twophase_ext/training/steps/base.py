"""One step of the base algorithm on all parameters: compiled, in mixed precision, accumulated."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.messages import first_line
from ...model.losses import ConvexLoss
from ...model.network import Network
from ...model.probing import main_output
from ..batchnorm import batch_norms
from ..config import Config
from ..data.rows import rows_that_count
from ..optimizer.factory import first_try, refused
from ..optimizer.schedule import Schedule


class BaseStep:
    """Forward, loss, backward and update; what is kept from step to step is the loss scale.

    Under "bf16-mixed" and "fp16-mixed" the model runs under autocast, loss, weights and update stay
    in float32. float16 gradients are scaled (torch.amp.GradScaler): where they overflow, the step
    is skipped and the scale halved.
    """

    def __init__(
        self,
        network: Network,
        loss: ConvexLoss,
        optimizer: torch.optim.Optimizer,
        config: Config,
        schedule: Schedule,
        compile_options: Mapping[str, Any] | None = None,
        *,
        ignores: bool = False,
    ) -> None:
        """compile_options: torch.compile's arguments; None runs the model as it is.

        ignores: whether there are rows that do not count (IGNORED, or of weight 0).
        """
        self.ignores = ignores
        self.model, self.tried = network.model, False
        self.after_first: Callable[[], None] = lambda: None  # may refuse it: no step is made then
        self.withdraw: Callable[[], None] = lambda: None  # called where it was refused
        self.forward, self.loss, self.optimizer = network.model, loss, optimizer
        self.config, self.schedule = config, schedule
        if compile_options is not None:
            # One graph for each size: which kernels a size gets does not depend on what ran before.
            self.forward = torch.compile(network.model, **{"dynamic": False, **compile_options})  # type: ignore[assignment]
        self.device = network.last.module.weight.device
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.autocast_dtype is torch.float16
        )
        # BatchNorm has no variance over one sample.
        self.least = 2 if batch_norms(network.model) else 1

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        forward: Callable[[Tensor], Tensor] | None = None,
        weight: float = 1.0,
        rows: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(mean loss before the update, outputs [b, m_y]) of a batch x [b, ...], y [b, ...].

        The batch goes through in config.accumulate parts as equal as can be, each weighted by its
        rows that count: the gradient is that of the whole batch. Of several outputs in training
        mode (auxiliary heads) the first one is trained. On several processes, forward:
        in place of the model; weight: a factor of the loss; rows: of the shortest of their parts.

        Raises ValueError where the first step fails in the optimizer, the model being as before.
        """
        if self.tried:
            return self._step(x, y, forward, weight, rows)
        try:
            with first_try(self.model):
                found = self._step(x, y, forward, weight, rows)
                self.after_first()
        except Exception:
            self.withdraw()
            raise
        self.tried = True
        return found

    def _step(
        self,
        x: Tensor,
        y: Tensor,
        forward: Callable[[Tensor], Tensor] | None,
        weight: float,
        rows: int | None,
    ) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        run = self.forward if forward is None else forward
        parts = max(1, min(self.config.accumulate, (rows or len(x)) // self.least))
        total, outputs = torch.zeros((), device=self.device, dtype=torch.float64), []
        whole = max(1, int(rows_that_count(self.loss, y).sum())) if self.ignores else len(y)
        own = y.unflatten(0, (len(x), -1)).tensor_split(parts)  # targets of each sample
        for inputs, targets in zip(
            x.tensor_split(parts), (t.flatten(0, 1) for t in own), strict=True
        ):
            with self.config.autocast(self.device):
                output = run(inputs)
            main = output if isinstance(output, Tensor) else main_output(output)
            if main is None:  # at this batch: `check_trains` saw one
                raise TypeError(f"model: expected logits, got {type(output).__name__}")
            output = main.to(self.config.dtype)
            scored, counts = output, len(targets)
            if self.ignores:
                kept = rows_that_count(self.loss, targets)
                scored, targets, counts = output[kept], targets[kept], int(kept.sum())
            share = weight * counts / whole
            loss = self.loss(scored, targets) if counts else scored.sum()  # of nothing: 0
            loss = loss if share == 1 else loss * share
            self.scaler.scale(loss).backward()
            total += loss.detach()
            outputs.append(output.detach())
        scale = self.scaler.get_scale()
        try:
            self.scaler.step(self.optimizer)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self.tried:
                raise
            raise refused(self.optimizer, error, "first step") from error
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # the step was not skipped
            self.schedule.end_step()
        return total, torch.cat(outputs)

    def state(self) -> dict[str, Any]:
        """The scaler's state, plain data; empty without one."""
        return self.scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`."""
        if state:
            self.scaler.load_state_dict(state)


def check_autocast(config: Config, device: torch.device) -> None:
    """ValueError where torch lacks such mixed precision there, or the caller is under autocast."""
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "precision: fit is called under torch.autocast; leave it, precision='bf16-mixed' or "
            "'fp16-mixed' puts the first phase alone under it"
        )
    if config.autocast_dtype is None:
        return
    reason = "autocast leaves a product in float32"
    try:
        with warnings.catch_warnings(), config.autocast(device):
            warnings.simplefilter("ignore")  # torch says there that it does nothing
            a = torch.ones(2, 2, device=device, requires_grad=True)
            product = a @ a
            product.sum().backward()
        if product.dtype == config.autocast_dtype:
            return
    except RuntimeError as error:
        reason = first_line(error)
    raise ValueError(f"precision: torch has no {config.precision!r} on {device}: {reason}")
