"""Random transforms of image batches for the first phase, on the device of the images.

Each transform is called as transform(images, generator) with float32 or float64 images [b, c, h, w]
and returns new ones of the same shape, dtype and device. Every sample has its own draw. Draws are
made on the generator's device: one on the CPU gives the same draws for images on any device.
Without a generator, torch's default one of the images' device is used. Nothing is read back from an
accelerator. The `repr` of a transform makes it again.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from twophase_ext.core.arguments import integer

from .data import NAMES

Fill = float | tuple[float, ...]


def _numbers(
    name: str,
    value: Any,
    expected: str,
    allowed: Callable[[float], bool] = math.isfinite,
    counts: tuple[int, ...] = (1,),
) -> tuple[float, ...]:
    """One number or several, as `expected` says; TypeError or ValueError name the argument."""
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    if any(isinstance(number, bool) or not isinstance(number, Real) for number in numbers):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    numbers = tuple(map(float, numbers))
    if len(numbers) not in counts or not all(math.isfinite(n) and allowed(n) for n in numbers):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return numbers


def _interval(
    name: str,
    value: Any,
    expected: str,
    allowed: Callable[[float], bool] = math.isfinite,
    counts: tuple[int, ...] = (1, 2),
) -> tuple[float, float]:
    """(low, high), or a number d for (-d, d)."""
    numbers = _numbers(name, value, expected, allowed, counts)
    low, high = numbers if len(numbers) == 2 else (0.0 - numbers[0], numbers[0])  # no -0.0
    if low > high:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return low, high


def _fill(value: Any) -> Fill:
    length = len(value) if isinstance(value, tuple | list) else 1
    expected = "a finite number, or one for each channel"
    numbers = _numbers("fill", value, expected, counts=(max(length, 1),))
    return numbers if isinstance(value, tuple | list) else numbers[0]


def _filling(images: Tensor, fill: Fill) -> Tensor:
    """`fill` [c or 1, 1, 1] as the images' dtype and device."""
    values = torch.tensor(fill, dtype=images.dtype).view(-1, 1, 1)
    if len(values) not in (1, images.shape[1]):
        raise ValueError(f"fill: expected {images.shape[1]} numbers, one a channel, got {fill}")
    return values.to(images.device, non_blocking=True)


def _drawing_device(images: Tensor, generator: Generator | None) -> torch.device:
    return images.device if generator is None else generator.device


def _uniform(images: Tensor, count: int, generator: Generator | None) -> Tensor:
    """float64 [b, count] in [0, 1), on the generator's device."""
    device = _drawing_device(images, generator)
    size = (len(images), count)
    return torch.rand(size, generator=generator, dtype=torch.float64, device=device)


class _PerSample:
    """A transform that draws parameters for every sample of a batch and applies them."""

    def draw(self, images: Tensor, generator: Generator | None = None) -> tuple[Tensor, ...]:
        """Parameters for each of the images: [b, ...], on the generator's device."""
        raise NotImplementedError

    def apply(self, images: Tensor, *parameters: Tensor) -> Tensor:
        """The images transformed with parameters as `draw` returns them."""
        raise NotImplementedError

    def __call__(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """The images transformed at random.

        Raises TypeError where they are not float32 or float64, ValueError where they are not
        [b, c, h, w] or have another number of channels than `fill`.
        """
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        if got not in (torch.float32, torch.float64):
            raise TypeError(f"images: expected a float32 or float64 tensor, got {got}")
        if images.dim() != 4:
            raise ValueError(f"images: expected [b, c, h, w], got shape {list(images.shape)}")
        return self.apply(images, *self.draw(images, generator))

    def __repr__(self) -> str:
        """The call that makes this transform."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class RandomCrop(_PerSample):
    """The image padded by `padding` pixels on each side, cut to its size at a random offset.

    All (2 padding + 1)^2 offsets are equally likely. fill: the padding's value, one number or one
    for each channel: what black is in the images, 0 where they are in [0, 1], -mean / std where
    they are normalised.
    """

    def __init__(self, padding: int, fill: Fill = 0.0) -> None:
        """Raises TypeError or ValueError for a padding that is no integer >= 0, or a wrong fill."""
        self.padding = integer("padding", padding, 0)
        self.fill = _fill(fill)

    def draw(self, images: Tensor, generator: Generator | None = None) -> tuple[Tensor, ...]:
        """(row, column), int64 [b] each: where the crop starts in the padded image."""
        offset = torch.randint(
            2 * self.padding + 1,
            (len(images), 2),
            generator=generator,
            device=_drawing_device(images, generator),
        )
        return offset.unbind(1)

    def apply(self, images: Tensor, *parameters: Tensor) -> Tensor:
        """The images cut at (row, column)."""
        row, column = (part.to(images.device, non_blocking=True) for part in parameters)
        b, c, h, w = images.shape
        pad = self.padding
        padded = images.new_empty(b, c, h + 2 * pad, w + 2 * pad)
        padded[:] = _filling(images, self.fill)
        padded[:, :, pad : pad + h, pad : pad + w] = images
        crops = padded.unfold(2, h, 1).unfold(3, w, 1)  # a view [b, c, row, column, h, w]
        return crops[torch.arange(b, device=images.device), :, row, column]


class RandomHorizontalFlip(_PerSample):
    """The image mirrored left to right with probability p."""

    def __init__(self, p: float = 0.5) -> None:
        """Raises ValueError for p outside [0, 1], TypeError for what is not a number."""
        (self.p,) = _numbers("p", p, "a probability in [0, 1]", lambda v: 0 <= v <= 1)

    def draw(self, images: Tensor, generator: Generator | None = None) -> tuple[Tensor, ...]:
        """(mirrored,), bool [b]."""
        return (_uniform(images, 1, generator).squeeze(1) < self.p,)

    def apply(self, images: Tensor, *parameters: Tensor) -> Tensor:
        """The images mirrored where so drawn."""
        mirrored = parameters[0].to(images.device, non_blocking=True)
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)


class RandomAffine(_PerSample):
    """A random affine map about the image's centre, sampled bilinearly.

    What is at p, in pixels from the centre, x to the right and y down, comes to

        shift + scale R(angle) [[1, tan(shear)], [0, 1]] p,

    R a clockwise rotation. Drawn uniformly: the angle in `degrees`; the shift within translate[0]
    times the width to the left and right, translate[1] times the height up and down; the scale; the
    shear, in degrees. degrees, shear: (low, high), or d for (-d, d). scale: (low, high).
    fill: the value outside of the image, as in RandomCrop. A sample that draws the identity keeps
    its bits.
    """

    def __init__(
        self,
        degrees: float | tuple[float, float],
        translate: tuple[float, float] = (0.0, 0.0),
        scale: tuple[float, float] = (1.0, 1.0),
        shear: float | tuple[float, float] = 0.0,
        fill: Fill = 0.0,
    ) -> None:
        """Raises ValueError for a range that is reversed or too wide, TypeError for no numbers."""
        angles = "degrees as (low, high), or d >= 0 for (-d, d)"
        self.degrees = _interval("degrees", degrees, angles)
        self.translate = _numbers(
            "translate",
            translate,
            "two fractions in [0, 1], of the width and the height",
            lambda v: 0 <= v <= 1,
            (2,),
        )
        self.scale = _interval("scale", scale, "(low, high), both > 0", lambda v: v > 0, (2,))
        self.shear = _interval("shear", shear, f"{angles}, below 90", lambda v: abs(v) < 90)
        self.fill = _fill(fill)

    def draw(self, images: Tensor, generator: Generator | None = None) -> tuple[Tensor, ...]:
        """(angle, shift in x, shift in y, scale, shear), float64 [b] each; degrees and pixels."""
        x, y = self.translate[0] * images.shape[3], self.translate[1] * images.shape[2]
        ranges = (self.degrees, (-x, x), (-y, y), self.scale, self.shear)
        drawn = _uniform(images, len(ranges), generator).unbind(1)
        return tuple(low + (high - low) * u for (low, high), u in zip(ranges, drawn, strict=True))

    def apply(self, images: Tensor, *parameters: Tensor) -> Tensor:
        """The images moved by (angle, shift in x, shift in y, scale, shear)."""
        angle, shift_x, shift_y, scale, shear = parameters
        h, w = images.shape[2:]
        cos, sin = angle.deg2rad().cos() / scale, angle.deg2rad().sin() / scale
        tan = shear.deg2rad().tan()
        # Where a pixel comes from: the inverse map [[1, -tan], [0, 1]] R(-angle) / scale, and, as
        # grid_sample wants it, in halves of the width and the height from the centre.
        xx, xy, yx, yy = cos + tan * sin, sin - tan * cos, -sin, cos
        x0, y0 = -(xx * shift_x + xy * shift_y), -(yx * shift_x + yy * shift_y)
        rows = (xx, xy * h / w, x0 * 2 / w, yx * w / h, yy, y0 * 2 / h)
        theta = torch.stack(rows, 1).view(-1, 2, 3)
        moved = (theta != torch.eye(2, 3, dtype=theta.dtype, device=theta.device)).any(2).any(1)
        theta = theta.to(images.device, images.dtype, non_blocking=True)[..., None, None]
        x = torch.arange(1 - w, w, 2, dtype=images.dtype, device=images.device) / w
        y = torch.arange(1 - h, h, 2, dtype=images.dtype, device=images.device) / h
        # By hand: affine_grid multiplies matrices, on a GPU in TF32 where that is allowed.
        source = theta[:, :, 0] * x + theta[:, :, 1] * y[:, None] + theta[:, :, 2]  # [b, 2, h, w]
        grid = source.movedim(1, 3)
        fill = _filling(images, self.fill)
        sampled = F.grid_sample(images - fill, grid, align_corners=False) + fill
        moved = moved.to(images.device, non_blocking=True)[:, None, None, None]
        return torch.where(moved, sampled, images)  # the sampler's coordinates round


class Compose:
    """Transforms one after the other, drawing from the same generator."""

    def __init__(self, *transforms: Callable[[Tensor, Generator | None], Tensor]) -> None:
        """Raises TypeError for a transform that cannot be called."""
        for transform in transforms:
            if not callable(transform):
                raise TypeError(f"transforms: expected callables, got {transform!r}")
        self.transforms = transforms

    def __call__(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """The images after the last transform."""
        for transform in self.transforms:
            images = transform(images, generator)
        return images

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"Compose({', '.join(map(repr, self.transforms))})"


def for_dataset(name: str, fill: Fill = 0.0) -> Compose:
    """The augmentation of the paper's experiments for a data set of `data.NAMES`.

    Section 7 lists no transforms but follows the setting of Kawaguchi & Lu (Ordered SGD, 2020). The
    crops, flips and affine maps here are those of their published code (github.com/k9k2/qSGD,
    main.py), SVHN's flip included; it takes the nearest pixel where RandomAffine samples
    bilinearly. "digits" is in neither: it has MNIST's ranges in proportion to its 8 pixels.
    fill: as in RandomCrop. Raises ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {NAMES}, got {name!r}")
    if name == "mnist":
        return Compose(RandomCrop(2, fill), RandomAffine(15, scale=(0.85, 1.15), fill=fill))
    if name == "digits":
        return Compose(RandomAffine(15, (2 / 28, 2 / 28), scale=(0.85, 1.15), fill=fill))
    if name == "kmnist":
        return Compose(RandomCrop(2, fill))
    crop = RandomCrop(2 if name == "fashion-mnist" else 4, fill)
    return Compose(crop, RandomHorizontalFlip())
