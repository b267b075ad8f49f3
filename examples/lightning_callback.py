"""The two-phase method under Lightning's own Trainer, by one callback.

`TwoPhaseCallback` waits for epoch tau, adds the noise, recomputes BatchNorm's statistics, freezes
the hidden layers and verifies the condition; then the module's own steps train the last layer, or,
with cache=True, the epochs that remain are run over cached features in a second. Lightning's
checkpoints hold its state.

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

from twophase_ext.integrations.lightning import TwoPhaseCallback


class Classifier(L.LightningModule):
    """A module as anybody writes it; nothing in it knows of the two-phase method."""

    def __init__(self, n: int) -> None:
        """64 -> 32 -> ceil(1.1 n) -> 10, with BatchNorm and exact softplus."""
        super().__init__()
        hidden = [nn.Linear(64, 32), nn.BatchNorm1d(32), tp.nn.Softplus()]
        self.net = nn.Sequential(*hidden, tp.nn.WideHead(32, tp.nn.wide_units(n), 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b, 10]."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The batch's loss."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer of all parameters."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-5)


def main(
    n: int = 400, epochs: int = 20, tau: int = 12, cache: bool = False, **settings: Any
) -> tuple[nn.Module, TwoPhaseCallback]:
    """Train on the first n digits; settings: more arguments of Lightning's Trainer."""
    torch.manual_seed(1)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels[:n] / 16, dtype=torch.float32), torch.tensor(labels[:n])
    module, two_phase = Classifier(n), TwoPhaseCallback(tau, model="net", cache=cache)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[two_phase],
        **dict.fromkeys(quiet, False) | settings,
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=64, sampler=tp.EpochSampler(n))
    trainer.fit(module, loader)
    print(two_phase.verdict)
    module.eval()
    with torch.no_grad():
        accuracy = (module(x).argmax(1) == y).float().mean()
    print(f"training accuracy {accuracy:.3f}")
    return module, two_phase


if __name__ == "__main__":
    main()
