"""The two-phase method under transformers.Trainer. Needs the extra `transformers`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..expressivity import Verdict
from ..training.config import resolve_tau
from .transition import Transition, check_optimizer


class Logits(nn.Module):
    """A model of transformers as a function of its first argument: x -> logits [b, m_y]."""

    def __init__(self, model: nn.Module) -> None:
        """model: called without labels it gives a mapping with "logits", or the logits."""
        super().__init__()
        self.module = model  # a wrapper's name: parameters keep their own

    def forward(self, x: Tensor) -> Tensor:
        """The logits of inputs x (input_ids, pixel_values, ...)."""
        output = self.module(x)
        return output["logits"] if isinstance(output, Mapping) else output


class TwoPhaseCallback(TrainerCallback, ExportableState):
    """From epoch tau on transformers.Trainer trains only the last layer, after Algorithm 1.

    At tau: noise on the hidden layers, BatchNorm's statistics recomputed over the training data,
    hidden layers frozen (`tp.freeze`) until training ends, expressivity verified: `verdict`.

    tau: fraction of num_train_epochs or an epoch, at which the second phase begins.
    data: the training data (x, y) as `tp.Trainer.fit` takes them; x is the model's first argument,
        which has to do alone. None leaves BatchNorm's statistics as they are, verifies nothing and
        needs last_layer.
    noise_std, seed, verify, last_layer: as of `tp.Trainer`; last_layer is a module or its name in
        the model.

    Its state is in the Trainer's checkpoints, and is read from there whatever
    restore_callback_states_from_checkpoint says (True is refused: the Trainer would make a new
    callback, without the data). A run resumed after tau adds no second noise; `verdict` is None in
    it. After a Ctrl-C, `release()` gives the model back unfrozen; at the end it is in evaluation
    mode.

    Raises ValueError or TypeError that name what is wrong, when training begins:
    load_best_model_at_end, bf16 and fp16 with data, sharded parameters, weights in bfloat16 or
    float16, data that the model does not take, a last layer that is not found.
    """

    def __init__(
        self,
        tau: float | int = 0.6,
        *,
        data: Any = None,
        noise_std: float | dict[str, float] = 1e-3,
        seed: int = 1,
        last_layer: nn.Module | str | None = None,
        verify: str | bool = "auto",
    ) -> None:
        """See the class."""
        self._transition = Transition(
            tau, noise_std=noise_std, seed=seed, last_layer=last_layer, verify=verify
        )
        self.data = data
        self.tau_epoch = 0  # set when training starts

    @property
    def verdict(self) -> Verdict | None:
        """The expressivity condition at tau; None before, and with verify=False."""
        return self._transition.verdict

    @property
    def hidden_hash(self) -> str | None:
        """SHA-256 of the hidden layers' state at tau; None before."""
        return self._transition.hash

    def release(self) -> None:
        """Unfreeze the model of a run that did not come to its end."""
        self._transition.release()

    # --- transformers' hooks -----------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Refuse what cannot work; freeze again in a run that was resumed after tau."""
        if args.restore_callback_states_from_checkpoint:
            raise ValueError("restore_callback_states_from_checkpoint: expected False, got True")
        if args.fsdp or args.deepspeed:
            raise ValueError("fsdp, deepspeed: expected neither, the noise needs whole parameters")
        if args.world_size > 1 and not args.ddp_find_unused_parameters:
            raise ValueError(
                "ddp_find_unused_parameters: expected True with several processes, as "
                "DistributedDataParallel waits for the gradients of the frozen layers"
            )
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end: expected False, got True: the best checkpoint may be from "
                "before tau, or of other hidden layers; choose one after training"
            )
        if (args.bf16 or args.fp16) and self.data is not None:
            raise ValueError(
                "bf16, fp16: expected neither with data, as accelerate then replaces the model's "
                "forward, whose outputs are no affine layer's any more; train in float32, or pass "
                "data=None and last_layer, which verifies nothing"
            )
        model = objects["model"]
        check_optimizer(objects["optimizer"], model)
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        if saved.get("hash") is None:
            self.tau_epoch = resolve_tau(self._transition.tau, int(state.num_train_epochs), 1)
            self._transition.check(self._network(model), self.data)
            return
        self.tau_epoch = saved["tau_epoch"]
        self._transition.load({**saved, "verdict": None})
        self._transition.resume(model)

    def _network(self, model: nn.Module) -> nn.Module:
        return model if self.data is None else Logits(model)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """The switch at tau."""
        if self.hidden_hash is None and int(state.epoch + 1e-6) >= self.tau_epoch:
            self._transition.start(self._network(objects["model"]), self.data)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """RuntimeError where the hidden layers moved; the model is given back unfrozen."""
        self._transition.finish()

    def state(self) -> dict[str, Any]:
        """For the Trainer's checkpoint."""
        saved = {**self._transition.state(), "tau_epoch": self.tau_epoch}
        del saved["verdict"]
        return {"args": {}, "attributes": saved}
