"""The networks of the paper: equations 1-2 and section 7, in analytic form."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from twophase_ext.nn import Softplus

Activation = Callable[[], nn.Module]


def _softplus(beta: float) -> Activation:
    return lambda: Softplus(beta)


class MLP(nn.Sequential):
    """h^(l) = softplus(W^(l) h^(l-1) + b^(l)), l = 1..H, and an affine last layer.

    sizes: [m_x, m_1, ..., m_H, m_y], at least one hidden layer. Input [b, m_x], output [b, m_y].
    activation: factory of the activation, by default the exact softplus with `beta`.
    """

    def __init__(
        self, sizes: Sequence[int], beta: float = 100.0, activation: Activation | None = None
    ) -> None:
        """See the class."""
        if len(sizes) < 3 or any(size < 1 for size in sizes):
            raise ValueError(f"sizes: expected [m_x, m_1, ..., m_y], all >= 1, got {list(sizes)}")
        activation = activation or _softplus(beta)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes[:-1]):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))


class _Head(nn.Sequential):
    """The wide softplus layer where `wide` is given, then the last layer."""

    def __init__(self, features: int, wide: int | None, classes: int, act: Activation) -> None:
        if wide is not None and wide < 1:
            raise ValueError(f"wide: expected at least 1 unit or None, got {wide}")
        last = nn.Linear(wide or features, classes)
        super().__init__(*([nn.Linear(features, wide), act()] if wide else []), last)


class SmallConvNet(nn.Module):
    """Three 3 x 3 convolutions with softplus and average pooling, for 8 x 8 to 32 x 32 images.

    The features that enter the head are the last 2 x 2 averages, 16 * width numbers. wide: units of
    the added wide softplus layer, or None. batch_norm: after each convolution.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        *,
        width: int = 8,
        wide: int | None = None,
        batch_norm: bool = True,
        beta: float = 100.0,
        activation: Activation | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        act = activation or _softplus(beta)
        channels = [in_channels, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise(channels)):
            layers.append(nn.Conv2d(c_in, c_out, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(c_out))
            layers.append(act())
            layers.append(nn.AvgPool2d(2) if i == 0 else nn.Identity())
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        self.backbone = nn.Sequential(*(m for m in layers if not isinstance(m, nn.Identity)))
        self.head = _Head(16 * width, wide, num_classes, act)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b, num_classes] of images [b, in_channels, h, w]."""
        return self.head(self.backbone(x))


class PreActBlock(nn.Module):
    """norm, act, 3 x 3, norm, act, 3 x 3, plus the shortcut (He et al. 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int, act: Activation) -> None:
        """The shortcut is a 1 x 1 convolution of the pre-activation where the shape changes."""
        super().__init__()
        self.bn1, self.act1 = nn.BatchNorm2d(c_in), act()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(c_out), act()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, padding=1, bias=False)
        changes = stride != 1 or c_in != c_out
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in, h, w] -> [b, c_out, h / stride, w / stride]."""
        z = self.act1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(z)
        return shortcut + self.conv2(self.act2(self.bn2(self.conv1(z))))


class PreActResNet18(nn.Module):
    """The pre-activation ResNet-18 of section 7 in the common CIFAR form.

    `width` channels first, blocks [2, 2, 2, 2], no final BatchNorm, average pooling to one pixel
    (images of any size), then the wide softplus layer of `wide` units where given, then the last
    layer. PyTorch's default initialisation.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        *,
        width: int = 64,
        wide: int | None = None,
        beta: float = 100.0,
        activation: Activation | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        act = activation or _softplus(beta)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        c_in = width
        for stage in range(4):
            c_out = width * 2**stage
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(PreActBlock(c_in, c_out, stride, act))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.head = _Head(c_in, wide, num_classes, act)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b, num_classes] of images [b, in_channels, h, w]."""
        z = self.blocks(self.conv1(x))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(z, 1), 1))
