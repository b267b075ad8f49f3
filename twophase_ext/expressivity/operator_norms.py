"""Upper bounds of the 2-norms of linear layers, and the convolution that they speak of.

A convolution with zero padding is op = sum over taps t of W_t S_t: S_t moves the image by the tap's
offset and keeps every stride-th pixel, ||S_t||_2 <= 1, and W_t [out, in] acts on channels. Pixels
whose position agrees with a tap modulo the stride meet no other residue class of taps. Hence, with
any stride, dilation and zero padding, for each group of channels,

(a) ||op||_2 <= sqrt(sum over classes (sum over t in the class of ||W_t||_2)^2),
(b) ||op||_2 <= sqrt(largest class) ||[W_t, all t side by side]||_2: no pixel is in more patches,
(c) ||op||_2 <= sqrt(||op||_1 ||op||_inf), Schur's test: absolute row sums and, within one class,
    column sums.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.bounds import SLACK
from ..linalg.norms import norm_upper, norms_upper

PATCH_BYTES = 1 << 26  # of patches at a time


@dataclass(frozen=True)
class OperatorNorms:
    """Upper bounds of ||op||_2 (plain) and of || |op| ||_2 (absolute), entry by entry |op|."""

    plain: float
    absolute: float


def linear_norms(weight: Tensor) -> OperatorNorms:
    """Bounds for x -> W x, weight [out, in] float64."""
    sizes = weight.abs()
    schur = float(_schur(sizes.sum(1), sizes.sum(0)))  # near || |W| ||: its entries have one sign
    return OperatorNorms(min(norm_upper(weight), schur), schur)


def conv_norms(
    weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> OperatorNorms:
    """Bounds for a convolution, weight [out, in / groups, kh, kw] float64."""
    taps = weight.reshape(groups, -1, *weight.shape[1:]).flatten(3)  # [group, out, in, kh kw]
    classes = list(_classes(weight.shape[2:], stride, dilation))
    rows = taps.flatten(2)
    many = math.sqrt(max(map(len, classes))) * SLACK
    sums = taps.abs().sum(1)  # [group, in, kh kw]
    columns = torch.stack([sums[..., members].sum(-1) for members in classes], 1)
    schur = _schur(rows.abs().sum(2), columns.flatten(1))
    best = torch.minimum(many * norms_upper(rows), schur)
    # (a) takes a norm for each tap: only where an estimate says that it is smaller
    some = (_by_taps(_estimates(taps), classes) < best).nonzero()[:, 0]
    if len(some):
        chosen = taps[some].permute(0, 3, 1, 2)  # [group, kh kw, out, in]
        norms = norms_upper(chosen.flatten(0, 1)).view(chosen.shape[:2])
        best[some] = torch.minimum(best[some], _by_taps(norms, classes))
    # near (b) for |W|, whose entries have one sign
    return OperatorNorms(float(best.max()) * SLACK, float(schur.max()) * SLACK)


def _by_taps(norms: Tensor, classes: list[list[int]]) -> Tensor:
    """(a) [group] of norms [group, kh kw]."""
    sums = torch.stack([norms[:, taps].sum(1) for taps in classes], 1)
    return sums.square().sum(1).sqrt() * SLACK


def _estimates(taps: Tensor) -> Tensor:
    """About ||W_t||_2 [group, t] for taps [group, out, in, t], by some power iterations."""
    matrices = taps.permute(0, 3, 1, 2).contiguous()
    v = matrices.new_ones(*matrices.shape[:2], matrices.shape[3], 1)
    for _ in range(4):
        v = matrices.mT @ (matrices @ v)
        v = v / v.norm(dim=2, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
    return (matrices @ v).norm(dim=(2, 3))


def _classes(
    kernel: Iterable[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterable[list[int]]:
    """Indices of taps (row-major) whose offsets agree modulo the stride."""
    residues = [
        [tap * d % s for tap in range(k)] for k, s, d in zip(kernel, stride, dilation, strict=True)
    ]
    classes: dict[tuple[int, ...], list[int]] = {}
    for index, residue in enumerate(itertools.product(*residues)):
        classes.setdefault(residue, []).append(index)
    return classes.values()


def _schur(rows: Tensor, columns: Tensor) -> Tensor:
    """sqrt(largest row sum * largest column sum), of the last dimension; non-negative numbers."""
    return rows.amax(-1).sqrt() * columns.amax(-1).sqrt() * SLACK


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution as products of matrices, patches by weights: sums of products in some order.

    x [b, c, h, w] and weight [out, c / groups, kh, kw] float64; padding: zeros before and after, an
    axis each. Result [b, out, h', w'], channels last in memory. cuDNN may
    choose an algorithm that is no plain sum.
    """
    b, c, h, w = x.shape
    out, depth, kh, kw = weight.shape
    (top, bottom), (left, right) = padding
    images = x.permute(0, 2, 3, 1)
    if top or bottom or left or right:
        padded = x.new_zeros(b, h + top + bottom, w + left + right, c)
        padded[:, top : top + h, left : left + w] = images
        images = padded
    else:
        images = images.contiguous()
    rows = (images.shape[1] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (images.shape[2] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    if rows < 1 or columns < 1:
        raise ValueError(f"x: images of {h} x {w} are smaller than the kernel {kh} x {kw}")
    sb, sh, sw, _ = images.stride()
    patches = images.as_strided(
        (b, rows, columns, kh, kw, c),
        (sb, sh * stride[0], sw * stride[1], sh * dilation[0], sw * dilation[1], 1),
    )
    result = x.new_empty(b, rows, columns, out)
    matrices = weight.permute(0, 2, 3, 1).reshape(groups, out // groups, kh * kw * depth)
    step = max(1, PATCH_BYTES // (8 * rows * columns * kh * kw * depth))
    for start in range(0, b, step):
        part, target = patches[start : start + step], result[start : start + step]
        for group in range(groups):
            own = part[..., group * depth : (group + 1) * depth]
            product = own.reshape(-1, kh * kw * depth) @ matrices[group].T
            own_out = slice(group * (out // groups), (group + 1) * (out // groups))
            target[..., own_out] = product.view(*target.shape[:3], -1)
    if bias is not None:
        result += bias
    return result.permute(0, 3, 1, 2)
