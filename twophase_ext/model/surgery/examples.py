"""Inputs that may fit a model of which nothing but its modules is known."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SIZES = (32, 8, 16, 28, 64, 224)  # of images and sequences


def examples(model: nn.Module) -> Iterator[Tensor]:
    """Batches of two samples, the likeliest first: what the model's modules would take."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
    device = "cpu" if parameter is None else parameter.device
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = dict.fromkeys(shape for m in model.modules() for shape in _shapes(m))
    for shape in [*shapes, (2, 8), (2, 3, 32, 32), (2, 1, 28, 28)][:40]:
        if isinstance(shape[0], str):
            _, count, *sizes = shape
            tokens = torch.randint(count, (2, *sizes), generator=generator, device="cpu")
            yield tokens.to(device)
        else:
            yield torch.rand(*shape, generator=generator, device="cpu").to(device, dtype)


def _shapes(module: Any) -> Iterator[tuple[Any, ...]]:
    """Shapes that this module takes; ("tokens", how many, ...) for indices."""
    match module:
        case nn.Embedding() | nn.EmbeddingBag():
            yield ("tokens", module.num_embeddings, 8)
        case nn.Conv1d() | nn.ConvTranspose1d():
            yield from ((2, module.in_channels, size) for size in _SIZES)
        case nn.Conv2d() | nn.ConvTranspose2d():
            yield from ((2, module.in_channels, size, size) for size in _SIZES)
        case nn.Conv3d() | nn.ConvTranspose3d():
            yield (2, module.in_channels, 16, 16, 16)
        case nn.Linear():
            yield (2, module.in_features)
            yield (2, 5, module.in_features)
        case nn.RNNBase():
            yield (2, 5, module.input_size)
        case nn.RNNCellBase():
            yield (2, module.input_size)
        case nn.BatchNorm1d() | nn.InstanceNorm1d():
            yield (2, module.num_features)
            yield (2, module.num_features, 8)
        case nn.BatchNorm2d() | nn.InstanceNorm2d():
            yield (2, module.num_features, 8, 8)
        case nn.LayerNorm() | nn.RMSNorm():
            yield (2, *module.normalized_shape)
            yield (2, 5, *module.normalized_shape)
        case nn.MultiheadAttention():
            yield (2, 5, module.embed_dim)
        case nn.Unflatten(unflattened_size=tuple() | list() as sizes):
            known = [int(s) for s in sizes if not isinstance(s, tuple)]
            if known and math.prod(known) > 0:
                yield (2, math.prod(known))
