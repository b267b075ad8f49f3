"""Random networks of many operators, for the bounds of a model as it runs; float32 or float64."""

import random

import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp


class Does(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


class Product(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x) * self.second(x)


class RootMeanSquare(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * self.weight


class Attention(nn.Module):
    """mask: None, or how later tokens are hidden, by -inf or the least number."""

    def __init__(self, width, heads, mask=None):
        super().__init__()
        self.inner, self.heads, self.mask = nn.Linear(width, 3 * width), heads, mask

    def forward(self, x):
        b, t, d = x.shape
        each = d // self.heads
        q, k, v = self.inner(x).view(b, t, 3, self.heads, each).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-1, -2)) * each**-0.5
        hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
        if self.mask == "filled":
            scores = scores.masked_fill(hidden, float("-inf"))
        elif self.mask == "times":
            scores = scores + hidden.to(x.dtype) * torch.finfo(x.dtype).min
        elif self.mask == "added":
            scores = scores + torch.zeros(t, t, dtype=x.dtype).masked_fill(
                hidden, torch.finfo(x.dtype).min
            )
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d)


class Recurrent(nn.Module):
    def __init__(self, kind, layers, first, both):
        super().__init__()
        self.cells = kind(4, 6, layers, batch_first=first, bidirectional=both)
        self.first = first

    def forward(self, x):
        if self.first:
            return self.cells(x)[0][:, -1]
        return self.cells(x.transpose(0, 1))[0][-1]


class Stop(nn.Module):
    """A backbone and the layer whose input is bounded."""

    def __init__(self, backbone, width):
        super().__init__()
        self.backbone, self.stop = backbone, nn.Linear(width, 5)

    def forward(self, x):
        return self.stop(self.backbone(x))


ACTIVATIONS = [
    *(nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Mish, nn.ELU, nn.Hardswish),
    *(nn.Hardsigmoid, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.ReLU6, lambda: nn.GELU("tanh")),
    lambda: tp.nn.Softplus(10.0),
    lambda: Does(torch.sin),
    lambda: Does(lambda x: (x * x + 1).sqrt()),
    lambda: Does(lambda x: x / (1 + x.abs())),
    lambda: Does(lambda x: (0.1 * x).exp()),
    lambda: Does(lambda x: (x.square() + 1).log()),
    lambda: Does(lambda x: x.clamp(-1, 2)),
    lambda: Does(lambda x: 1 - x),
    lambda: Does(lambda x: 2 * x - 0.5),
    lambda: Does(lambda x: x**3),
    lambda: Does(lambda x: x.mul(0.5).add_(1).relu_()),
]


def activation():
    return random.choice(ACTIVATIONS)()


def convolutional():
    layers, channels = [], 3
    for _ in range(random.randint(1, 4)):
        kernel, out = random.choice([1, 3, 5]), random.choice([4, 8, 12])
        groups = 2 if channels % 2 == 0 and random.random() < 0.3 else 1
        mode = "reflect" if kernel == 3 and random.random() < 0.3 else "zeros"
        layers.append(
            nn.Conv2d(
                *(channels, out, kernel, random.choice([1, 2]), kernel // 2),
                groups=groups,
                bias=random.random() < 0.5,
                padding_mode=mode,
            )
        )
        channels = out
        if random.random() < 0.5:
            norm = random.choice([nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)])(channels)
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
            layers.append(norm)
        layers.append(activation())
        if random.random() < 0.3:
            inner = nn.Conv2d(channels, channels, 3, padding=1)
            layers.append(Residual(nn.Sequential(inner, activation())))
        if random.random() < 0.2:
            layers.append(nn.Upsample(scale_factor=2))
        if random.random() < 0.3:
            pools = [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)]
            layers.append(random.choice(pools))
    end = random.choice([nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(2), nn.Identity()])
    return nn.Sequential(*layers, end, nn.Flatten()), torch.randn(6, 3, 16, 16)


def sequence():
    d = 8
    kinds = [
        lambda: Residual(Attention(d, 2, random.choice([None, "filled", "added", "times"]))),
        lambda: nn.LayerNorm(d),
        lambda: RootMeanSquare(d),
        lambda: Residual(nn.Sequential(nn.Linear(d, 16), activation(), nn.Linear(16, d))),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(d, d)),
        lambda: Product(nn.Linear(d, d), nn.Sequential(nn.Linear(d, d), activation())),
        lambda: nn.TransformerEncoderLayer(
            d, 2, 16, batch_first=True, norm_first=random.random() < 0.5
        ),
        lambda: Does(lambda x: F.normalize(x, dim=-1, eps=1e-3)),
        lambda: Does(lambda x: torch.cat([x[..., :4], x[..., 4:].flip(-1)], -1)),
        lambda: Does(lambda x: x.roll(1, 1)),
        lambda: Does(lambda x: F.log_softmax(x, -1)),
        lambda: Does(lambda x: x - x.mean(1, keepdim=True)),
        lambda: Does(lambda x: x.softmax(1)),
    ]
    layers = [random.choice(kinds)() for _ in range(random.randint(1, 4))]
    ends = [
        lambda: Does(lambda x: x.mean(1)),
        lambda: Does(lambda x: x[:, 0]),
        nn.Flatten,
        lambda: Does(lambda x: x.amax(1)),
        lambda: Does(lambda x: x.sum(1)),
        lambda: Does(lambda x: x.logsumexp(1)),
        lambda: Does(lambda x: x.var(1)),
        lambda: Does(lambda x: x.cumsum(1)[:, -1]),
    ]
    return nn.Sequential(*layers, random.choice(ends)()), torch.randn(6, 5, d)


def recurrent():
    kind = random.choice([nn.LSTM, nn.GRU, nn.RNN])
    flags = random.randint(1, 2), random.random() < 0.5, random.random() < 0.5
    return Recurrent(kind, *flags), torch.randn(6, 5, 4)


def drawn(seed):
    """(a network with its stop, inputs), the same for a seed; float32, evaluation mode."""
    random.seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone, x = random.choice([convolutional, sequence, recurrent])()
        with torch.no_grad():
            if random.random() < 0.3:
                size = random.choice([0.1, 3.0, 10.0])
                for parameter in backbone.parameters():
                    parameter.mul_(size)
            x = x * random.choice([1, 1, 0.01, 30.0])
            width = backbone.eval()(x).shape[1]
        return Stop(backbone, width).eval(), x
