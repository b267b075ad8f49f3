"""The two-phase method under Lightning's own Trainer, by one callback.

At tau the callback adds the noise, verifies the condition and sets eta_t = eta * nu with nu = 0 for
the hidden layers: the mask of `tp.optim.SGD`, which is saved in Lightning's checkpoints with the
optimizer. The noise depends on seed and names alone, so every process of a distributed run adds the
same. The features are computed again at every step; `tp.Trainer` caches them. A network with
BatchNorm or dropout would also have to keep its hidden layers in eval mode from tau on.

Needs Lightning: pip install "lightning>=2.4,!=2.6.2,!=2.6.3"
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import twophase_ext as tp

try:
    import lightning as L
except ImportError:
    # 2.6.2 and 2.6.3 carry malicious code: GitHub advisory GHSA-w37p-236h-pfx3
    sys.exit('this example needs Lightning: pip install "lightning>=2.4,!=2.6.2,!=2.6.3"')


class Classifier(L.LightningModule):
    """A network whose optimizer has two named groups of parameters, "hidden" and "last"."""

    def __init__(self, n: int) -> None:
        """64 -> 32 -> ceil(1.1 n) -> 10, with exact softplus."""
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 32), tp.nn.Softplus())
        self.head = tp.nn.WideHead(32, tp.nn.wide_units(n), 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b, 10]."""
        return self.head(self.backbone(x))

    def hidden(self) -> dict[str, nn.Parameter]:
        """The parameters of all layers but the last, by name."""
        last = {id(p) for p in self.head.last_layer.parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) not in last}

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The batch's loss."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD, with the mask nu = 1 for both groups."""
        groups = [
            {"name": "hidden", "params": list(self.hidden().values())},
            {"name": "last", "params": list(self.head.last_layer.parameters())},
        ]
        return tp.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-5)


class TwoPhase(L.Callback):
    """The second phase from epoch tau on: noise, verdict, hidden layers fixed."""

    def __init__(self, tau: int, x: Tensor, noise_std: float = 1e-3, seed: int = 1) -> None:
        """x: the training inputs, for the verification. seed: of the noise."""
        self.tau, self.x, self.noise_std, self.seed = tau, x, noise_std, seed
        self.verdict: tp.Verdict | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        """The switch, once: a run resumed after tau finds nu = 0 in its optimizer."""
        (group,) = (g for g in trainer.optimizers[0].param_groups if g["name"] == "hidden")
        if trainer.current_epoch < self.tau or group["nu"] == 0:
            return
        tp.perturb_(module.hidden(), self.noise_std, seed=tp.stream_seed(self.seed, "noise"))
        group["nu"] = 0
        self.verdict = tp.verify_expressivity(module, self.x)
        print(self.verdict)


def main(n: int = 400, epochs: int = 20, tau: int = 12, **settings: Any) -> L.Trainer:
    """Train on the first n digits; settings: more arguments of Lightning's Trainer."""
    torch.manual_seed(1)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels[:n] / 16, dtype=torch.float32), torch.tensor(labels[:n])
    module = Classifier(n)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[TwoPhase(tau, x), *settings.pop("callbacks", [])],
        **dict.fromkeys(quiet, False) | settings,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    with torch.no_grad():
        accuracy = (module(x).argmax(1) == y).float().mean()
    print(f"training accuracy {accuracy:.3f}")
    return trainer


if __name__ == "__main__":
    main()
