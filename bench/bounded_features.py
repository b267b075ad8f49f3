"""Bounded features against a plain float64 pass: processor seconds, one thread, medians.

python bench/bounded_features.py [RUNS]; on batches of 128 images or sequences of each network,
with torchvision's ResNet-18, made analytic, where torchvision is.
"""

import statistics
import sys
import time

import torch
from torch import nn

import twophase_ext as tp
from twophase.models import PreActResNet18
from twophase_ext.expressivity.running.features import bounded_features

try:
    from torchvision.models import resnet18
except ImportError:
    resnet18 = None

RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 7
IMAGES = 128


class Vision(nn.Module):
    """ViT-Ti: patches of 8, 12 layers of 192 in 3 heads, the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 8, 8)
        self.places = nn.Parameter(torch.randn(64, 192) * 0.02)
        layer = nn.TransformerEncoderLayer(
            192, 3, 768, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(192, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, 3, 64, 64] -> [b, 10]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.layers(tokens).mean(1))


def resnet(width: int) -> tuple[nn.Module, torch.Tensor]:
    """PreActResNet18 and its inputs."""
    return PreActResNet18(3, 10, width=width), torch.rand(IMAGES, 3, 32, 32)


def torchvision_resnet() -> tuple[nn.Module, torch.Tensor]:
    """ResNet-18 of torchvision and its inputs."""
    model = resnet18(weights=None).eval()
    x = torch.rand(IMAGES, 3, 64, 64)
    tp.nn.analytic(model, example_input=x[:2])
    return model, x


NETWORKS = {
    "PreActResNet18, width 16": lambda: resnet(16),
    "PreActResNet18, width 64": lambda: resnet(64),
    "ViT-Ti, 64 tokens": lambda: (Vision(), torch.rand(IMAGES, 3, 64, 64)),
}
if resnet18 is not None:
    NETWORKS["ResNet-18 of torchvision"] = torchvision_resnet

torch.set_num_threads(1)
torch.manual_seed(0)
for name, make in NETWORKS.items():
    model, x = make()
    model, x = model.double().eval(), x.double()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    norms: dict = {}

    def plain() -> None:
        """As anybody would."""
        with torch.no_grad():
            model(x)  # noqa: B023

    def bounded() -> None:
        """With a bound of every sample's error; norms of weights are known by then."""
        bounded_features(model, last, [x, x], n=2 * IMAGES, norms=norms)  # noqa: B023

    bounded()
    seconds: dict[str, list[float]] = {"plain": [], "bounded": []}
    for _ in range(RUNS):
        for kind, work in (("plain", plain), ("bounded", bounded)):
            started = time.process_time()
            work()
            seconds[kind].append(time.process_time() - started)
    one, two = (statistics.median(v) for v in seconds.values())
    print(f"{name}: plain {one:.3f} s, bounded {two / 2:.3f} s, {two / 2 / one:.2f} x", flush=True)
