"""A convolutional network of your own: made analytic, widened, trained in two phases, verified.

The network is written as anybody writes one, with ReLU and BatchNorm. Two calls make it one that
Theorem 1 speaks of: `tp.nn.analytic` puts exact softplus in the place of ReLU, `tp.nn.widen` adds
the wide last hidden layer. `tp.Trainer` then trains it on scikit-learn's digits and verifies the
condition at tau; a certificate at weights made for it gives sigma_min a proved lower bound.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import twophase_ext as tp


class ConvNet(nn.Module):
    """Two convolutions and a classifier; nothing in it knows of the two-phase method."""

    def __init__(self, classes: int = 10) -> None:
        """Inputs [b, 1, 8, 8]."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AvgPool2d(2),  # average pooling is analytic, max-pooling is not
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b, classes]."""
        return self.classifier(self.features(x))


def main(n: int = 500, epochs: int = 15) -> tuple[tp.Result, tp.Verdict]:
    """Train on the first n digits; the run, and the certificate for some weights."""
    torch.manual_seed(1)
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels)

    model = ConvNet()
    print(tp.nn.analytic(model))
    tp.nn.widen(model, n=n)
    print(tp.check_assumptions(model, x[:n]))

    trainer = tp.Trainer(model, epochs=epochs, tau=0.6, run_dir=False, progress=False)
    result = trainer.fit((x[:n], y[:n]), (x[n:], y[n:]))
    print(result)

    verdict = tp.verify_expressivity(model, x[:n], w="witness", method="certificate")
    print(verdict)
    return result, verdict


if __name__ == "__main__":
    main()
