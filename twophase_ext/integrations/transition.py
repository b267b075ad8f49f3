"""The step from the first phase to the second under somebody else's trainer."""

from numbers import Integral
from typing import Any

import torch
from torch import nn

from ..core.arguments import integer
from ..expressivity import Verdict, verify_network
from ..expressivity.verify import METHODS
from ..model import layers
from ..model.network import Network
from ..ops.perturb import checked_tensors
from ..training import batchnorm
from ..training.config import resolve_noise, resolve_tau
from ..training.data.samples import BATCH, Samples
from ..training.freeze import Frozen, freeze, serving
from ..training.tau import perturb


class Transition:
    """Noise, frozen layers and verdict at tau, and what a checkpoint must remember of them."""

    def __init__(
        self,
        tau: float | int,
        *,
        noise_std: float | dict[str, float],
        seed: int,
        last_layer: nn.Module | str | None,
        verify: str | bool,
    ) -> None:
        """Check the arguments, which are those of the Trainer; see the callbacks."""
        resolve_tau(tau, int(tau) + 2 if isinstance(tau, Integral) else 2, 1)
        if verify is not False and verify not in METHODS:
            raise ValueError(f"verify: expected False or one of {METHODS}, got {verify!r}")
        self.tau, self.verify, self.last_layer = tau, verify, last_layer
        self.noise_std, self.seed = resolve_noise(noise_std), integer("seed", seed, -(2**63))
        self.frozen: Frozen | None = None
        self.verdict: Verdict | None = None
        self.hash: str | None = None  # of the hidden layers; set at tau
        self.name: str | None = None  # of the last layer

    def check(self, model: nn.Module, data: Any) -> None:
        """Refuse, before the first step, what `start` would refuse at tau; arguments as of it."""
        if data is None:
            last = self._named(model)
        else:
            with serving(model, data, "data") as samples:
                last = self._network(model, samples).last
        batchnorm.check_freezable(model)
        hidden = checked_tensors(layers.hidden_parameters(model, last))
        if isinstance(self.noise_std, dict):
            wrong = sorted(set(hidden) ^ set(self.noise_std))
            if wrong:
                raise ValueError(
                    f"noise_std: expected one sigma per hidden parameter, missing or unknown: "
                    f"{', '.join(wrong[:3])}"
                )

    def _named(self, model: nn.Module) -> layers.LastLayer:
        if self.last_layer is None:
            raise ValueError("last_layer: expected a module or a name where data is None")
        return layers.named_last_layer(model, self.last_layer)

    def _network(self, model: nn.Module, samples: Samples) -> Network:
        return Network(model, samples.example(), self.last_layer)

    @torch.inference_mode(False)
    def start(self, model: nn.Module, data: Any) -> None:
        """At tau: noise on the hidden layers, BatchNorm's statistics over `data`, freeze, verify.

        data: as of `tp.freeze`; None leaves the statistics as they are and verifies nothing.
        """
        if data is None:
            last = self._named(model)
        else:
            with serving(model, data, "data") as samples:
                last = self._network(model, samples).last
        hidden = layers.hidden_parameters(model, last)
        perturb(hidden, self.noise_std, self.seed)
        self.frozen = freeze(model, train=data, last_layer=last.module)
        self.hash, self.name = self.frozen.hash, last.name
        if data is None or not self.verify:
            return
        with serving(model, data, "data") as samples:
            self.verdict = verify_network(
                self._network(model, samples),
                samples.in_order(BATCH),
                n=samples.n,
                method=str(self.verify),
                training=True,
            )

    def resume(self, model: nn.Module) -> None:
        """Freeze again what a checkpoint from after tau holds: no noise, no new statistics.

        Raises ValueError where these are not the hidden layers that were frozen at tau.
        """
        if self.name is None:
            raise ValueError("state: expected that of a run after tau")
        self.release()
        self.frozen = freeze(model, last_layer=self.name)
        if self.frozen.hash != self.hash:
            self.release()
            raise ValueError(
                "the hidden layers are not those that were frozen at tau: the weights were not "
                "restored from the same checkpoint, or the callback has served another run"
            )

    def finish(self) -> None:
        """Prove that the hidden layers did not move, and give the model back unfrozen.

        It stays in evaluation mode, where it was frozen: in training mode a forward pass would move
        the statistics that the verdict is about.
        """
        model = None if self.frozen is None else self.frozen.model
        try:
            if self.frozen is not None:
                self.frozen.verify()
        finally:
            self.release()
        if model is not None:
            model.eval()

    def release(self) -> None:
        """Unfreeze without a proof."""
        if self.frozen is not None:
            self.frozen.unfreeze()
            self.frozen = None

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        verdict = None if self.verdict is None else self.verdict.as_dict()
        return {"hash": self.hash, "last_layer": self.name, "verdict": verdict}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.hash, self.name = state["hash"], state["last_layer"]
        self.verdict = None if state["verdict"] is None else Verdict(**state["verdict"])


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """ValueError where the optimizer trains parameters outside of the model."""
    own = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strange = sum(id(p) not in own for p in held)
    if strange:
        raise ValueError(
            f"model: the optimizer trains {strange} parameters outside of it, which would go on "
            "moving after tau; expected a model that holds them all"
        )
