"""Data and model as the command line's options name them."""

import importlib
import math
import sys
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import twophase_ext as tp

from . import data, models
from .files import read_inputs, read_targets

DataName = Literal["digits", "mnist", "fashion-mnist", "kmnist", "cifar10", "cifar100", "svhn"]


def build_model(
    name: str, images: Tensor, classes: int, *, width: int, wide: int, seed: int
) -> nn.Module:
    """A built-in model ("mlp", "small", "preactresnet18"), or "package.module:callable" of yours.

    Your callable is called without arguments and returns an nn.Module; the wide softplus layer is
    then added by tp.nn.widen where wide > 0. The initialisation comes from the seed's own stream.
    """
    with torch.random.fork_rng():
        torch.manual_seed(tp.stream_seed(seed, "init"))
        if name == "mlp":
            size = math.prod(images.shape[1:])
            hidden = models.MLP([size, width, wide or width, classes])
            return nn.Sequential(nn.Flatten(), hidden)
        if name in ("small", "preactresnet18") and images.dim() != 4:
            raise ValueError(
                f"model: {name} expects images [n, c, h, w], got inputs {tuple(images.shape)}; "
                "mlp takes inputs of any shape"
            )
        channels = images.shape[1]
        if name == "small":
            return models.SmallConvNet(channels, classes, width=width, wide=wide or None)
        if name == "preactresnet18":
            return models.PreActResNet18(channels, classes, width=width, wide=wide or None)
        module, _, attribute = name.partition(":")
        if not attribute:
            raise ValueError(
                "model: expected mlp, small, preactresnet18 or package.module:callable, "
                f"got {name!r}"
            )
        sys.path.insert(0, str(Path.cwd()))
        model = getattr(importlib.import_module(module), attribute)()  # noqa: TID251  the user's
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: {name} returned {type(model).__name__}, not an nn.Module")
        if wide:
            tp.nn.widen(model, wide, ratio=1.0, example_input=data.as_float(images[:2]))
        return model


def load_inputs(
    data_name: str, n: int | None = None, x: str | None = None, y: str | None = None
) -> tuple[Tensor, int]:
    """(inputs [n, ...], number of classes) of a data set's training part, or of files of yours.

    x, y: as of `files.read_inputs` and `read_targets`; without y there are 10 classes. Raises
    ValueError for n < 1.
    """
    if x is None:
        images, labels = data.load(data_name, "train")
        return first(n, images, labels)[0], int(labels.max()) + 1
    inputs = read_inputs(x, y)
    count = 10 if y is None else outputs_for(read_targets(y, x)[0])
    return first(n, inputs, torch.empty(0))[0], count


def outputs_for(targets: Tensor) -> int:
    """How many outputs a model of these has: one a class, or a number of the targets."""
    if targets.is_floating_point():
        return int(math.prod(targets.shape[1:]))
    return int(targets.max()) + 1


def first(n: int | None, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The first n samples; all where n is None. ValueError for n < 1."""
    if n is not None and n < 1:
        raise ValueError(f"n: expected at least 1 sample, got {n}")
    return images[:n], labels[:n]
