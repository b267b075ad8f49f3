"""Bounds of 2-norms against dense matrices, and the convolution they speak of."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from twophase_ext.expressivity.operator_norms import conv_norms, convolve, linear_norms

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=20)
@given(st.data())
def test_convolutions_and_their_norms(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    groups = draw(1, 2)
    kernel, stride, dilation = [(draw(1, 3), draw(1, 3)) for _ in range(3)]
    padding = [(draw(0, 2), draw(0, 2)) for _ in range(2)]
    whole = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [draw(max(1, w - sum(p)), 7) for w, p in zip(whole, padding, strict=True)]
    g = torch.Generator().manual_seed(draw(0, 1000))
    weight = torch.randn(
        2 * groups, draw(1, 2), *kernel, dtype=torch.float64, generator=g
    ) * 10.0 ** draw(-3, 3)
    if draw(0, 1):
        weight[:, :, 1:] *= 0.01  # one tap prevails
    shape = (weight.shape[1] * groups, *size)
    inputs = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    outputs = convolve(inputs, weight, None, stride, padding, dilation, groups)
    (top, bottom), (left, right) = padding
    padded = F.pad(inputs, (left, right, top, bottom))
    assert torch.equal(outputs, F.conv2d(padded, weight, None, stride, 0, dilation, groups))
    matrix = outputs.flatten(1)
    norms = conv_norms(weight, stride, dilation, groups)
    for bound, m in ((norms.plain, matrix), (norms.absolute, matrix.abs())):
        assert float(torch.linalg.matrix_norm(m, 2)) <= bound


def test_every_group_of_a_convolution_counts():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, generator=g, dtype=torch.float64)
    whole = conv_norms(weight, (1, 1), (1, 1), 1)
    weight = torch.cat([weight, weight / 100])  # the large group first, then the small one first
    for both in (weight, weight.flip(0)):
        norms = conv_norms(both, (1, 1), (1, 1), 2)
        assert norms.plain == pytest.approx(whole.plain, rel=1e-4)
        assert norms.absolute == pytest.approx(whole.absolute, rel=1e-4)


@pytest.mark.parametrize("taps", [1, 9])
def test_norms_of_convolutions_are_close(taps):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 8, 3, 3, generator=g, dtype=torch.float64)
    if taps == 1:
        weight[:, :, 1:] = 0
        weight[:, :, :, 1:] = 0
    eye = torch.eye(8 * 36, dtype=torch.float64).reshape(-1, 8, 6, 6)
    matrix = convolve(eye, weight, None, (1, 1), ((1, 1), (1, 1)), (1, 1), 1).flatten(1)
    true = float(torch.linalg.matrix_norm(matrix, 2))
    assert true <= conv_norms(weight, (1, 1), (1, 1), 1).plain <= (1.2 if taps == 1 else 2.5) * true


def test_norm_of_a_matrix_is_close():
    g = torch.Generator().manual_seed(0)
    for shape in ((30, 200), (200, 30), (1, 5), (7, 7)):
        weight = torch.randn(shape, generator=g, dtype=torch.float64)
        norms = linear_norms(weight)
        for bound, m, near in ((norms.plain, weight, 1.05), (norms.absolute, weight.abs(), 1.5)):
            true = float(torch.linalg.matrix_norm(m, 2))
            assert true <= bound <= near * true
