"""Layers in 40-digit arithmetic (mpmath), on object arrays [b, ...]."""

import itertools

import mpmath
import numpy as np
import torch
from torch import nn

import twophase_ext as tp

mp = mpmath.mp.clone()
mp.dps = 40


def exactly(x: torch.Tensor) -> np.ndarray:
    """The tensor's numbers as they are."""
    flat = [mp.mpf(v) for v in x.detach().double().flatten().tolist()]
    return np.array(flat, dtype=object).reshape(tuple(x.shape))


def distances(computed: torch.Tensor, true: np.ndarray) -> list[float]:
    """||computed_i - true_i||_2 for each sample."""
    apart = (exactly(computed) - true).reshape(len(true), -1)
    return [float(mp.sqrt(sum(v * v for v in row))) for row in apart]


def _each(function):
    return lambda x: np.array([function(v) for v in x.flatten()], dtype=object).reshape(x.shape)


def softplus(beta: float):
    b = mp.mpf(beta)
    return _each(lambda v: mp.log1p(mp.exp(-b * abs(v))) / b + max(v, mp.mpf(0)))


def gelu(x):
    return _each(lambda v: v * (1 + mp.erf(v / mp.sqrt(2))) / 2)(x)


def sigmoid(x):
    return _each(lambda v: 1 / (1 + mp.exp(-v)))(x)


def linear(x, weight, bias):
    y = x @ exactly(weight).T
    return y if bias is None else y + exactly(bias)


def conv2d(x, weight, bias, stride, padding, dilation, groups):
    (sh, sw), (dh, dw) = stride, dilation
    w = exactly(weight)
    out, depth, kh, kw = w.shape
    margins = [(p, p) for p in padding]
    x = np.pad(x, [(0, 0), (0, 0), *margins], constant_values=mp.mpf(0))
    rows = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    columns = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = np.empty((len(x), out, rows, columns), dtype=object)
    for i, j, group in itertools.product(range(rows), range(columns), range(groups)):
        own = slice(group * out // groups, (group + 1) * out // groups)
        patch = x[:, group * depth : (group + 1) * depth]
        patch = patch[:, :, i * sh : i * sh + dh * kh : dh, j * sw : j * sw + dw * kw : dw]
        y[:, own, i, j] = patch.reshape(len(x), -1) @ w[own].reshape(out // groups, -1).T
    return y if bias is None else y + exactly(bias)[:, None, None]


def _windows(size, outputs):
    return [range(i * size // outputs, -(-(i + 1) * size // outputs)) for i in range(outputs)]


def adaptive(x, rows, columns):
    y = np.empty((*x.shape[:2], rows, columns), dtype=object)
    for i, a in enumerate(_windows(x.shape[2], rows)):
        for j, b in enumerate(_windows(x.shape[3], columns)):
            part = x[:, :, a.start : a.stop, b.start : b.stop]
            y[:, :, i, j] = part.sum((2, 3)) / (len(a) * len(b))
    return y


def batch_norm(x, m):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    root = _each(mp.sqrt)(exactly(m.running_var) + mp.mpf(m.eps))
    y = (x - exactly(m.running_mean).reshape(shape)) / root.reshape(shape)
    return y * exactly(m.weight).reshape(shape) + exactly(m.bias).reshape(shape)


def layer_norm(x, m):
    count = len(m.normalized_shape)
    axes = tuple(range(-count, 0))
    d = int(np.prod(m.normalized_shape))
    c = x - x.sum(axes, keepdims=True) / d
    y = c / _each(mp.sqrt)((c * c).sum(axes, keepdims=True) / d + mp.mpf(m.eps))
    return y * exactly(m.weight) + exactly(m.bias)


def run(m: nn.Module, x):
    """The module's function in evaluation mode."""
    match m:
        case nn.Sequential():
            for child in m:
                x = run(child, x)
            return x
        case nn.Linear():
            return linear(x, m.weight, m.bias)
        case nn.Conv2d():
            same = [d * (k - 1) // 2 for d, k in zip(m.dilation, m.kernel_size, strict=True)]
            padding = same if m.padding == "same" else m.padding
            return conv2d(x, m.weight, m.bias, m.stride, padding, m.dilation, m.groups)
        case nn.Conv1d():
            own = (1, *m.stride), (0, *m.padding), (1, *m.dilation), m.groups
            return conv2d(x[:, :, None], m.weight[:, :, None], m.bias, *own)[:, :, 0]
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            return batch_norm(x, m)
        case nn.LayerNorm():
            return layer_norm(x, m)
        case tp.nn.Softplus():
            return softplus(m.beta)(x)
        case nn.ReLU():
            return _each(lambda v: max(v, mp.mpf(0)))(x)
        case nn.Sigmoid():
            return sigmoid(x)
        case nn.Tanh():
            return _each(mp.tanh)(x)
        case nn.SiLU():
            return x * sigmoid(x)
        case nn.GELU():
            return gelu(x)
        case nn.AvgPool2d():
            k = m.kernel_size
            ones = torch.full((x.shape[1], 1, k, k), 1.0 / (k * k), dtype=torch.float64)
            assert (k * k) & (k * k - 1) == 0, "1 / k^2 has to be a double"
            return conv2d(x, ones, None, (m.stride,) * 2, (m.padding,) * 2, (1, 1), x.shape[1])
        case nn.AdaptiveAvgPool2d():
            size = m.output_size
            return adaptive(x, *((size, size) if isinstance(size, int) else size))
        case nn.Flatten():
            return x.reshape(len(x), -1)
        case nn.Identity() | nn.Dropout() | nn.Dropout2d():
            return x
    raise NotImplementedError(type(m).__name__)


def preact_features(m, x):
    """The head's input of twophase.models.PreActResNet18."""
    x = run(m.conv1, x)
    for b in m.blocks:
        z = run(b.act1, run(b.bn1, x))
        shortcut = x if b.shortcut is None else run(b.shortcut, z)
        x = shortcut + run(b.conv2, run(b.act2, run(b.bn2, run(b.conv1, z))))
    return adaptive(x, 1, 1)[:, :, 0, 0]
