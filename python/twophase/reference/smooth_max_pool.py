"""log(sum exp(beta x)) / beta over the windows of max pooling, and its gradient."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth_max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
    beta: float = 100.0,
) -> Tensor:
    """A number of each sequence for each of x's last dimensions; padding is absent."""
    axes = len(kernel)
    places, pads = [], []
    for axis, (k, s, p, d) in enumerate(zip(kernel, stride, padding, dilation, strict=True)):
        size = x.shape[axis - axes]
        rounded = math.ceil if ceil_mode else math.floor
        count = rounded((size + 2 * p - d * (k - 1) - 1) / s) + 1
        if ceil_mode and (count - 1) * s >= size + p:
            count -= 1
        places.append([slice(t * d, t * d + (count - 1) * s + 1, s) for t in range(k)])
        pads = [p, p + s, *pads]
    padded = F.pad(x, pads, value=-math.inf)
    windows = torch.stack([padded[(..., *place)] for place in itertools.product(*places)])
    return torch.logsumexp(beta * windows, 0) / beta


def smooth_max_pool_backward(grad: Tensor, x: Tensor, *settings: object) -> Tensor:
    """A window's numbers share its gradient as their softmax; settings: as above."""
    return torch.func.vjp(lambda t: smooth_max_pool(t, *settings), x)[1](grad)[0]  # type: ignore
