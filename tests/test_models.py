"""The networks' shapes, parameter counts and their layers as the Trainer sees them."""

import pytest
import torch
from twophase import models

from twophase_ext.network import Network


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_mlp():
    model = models.MLP([5, 7, 11, 3])
    assert count(model) == 5 * 7 + 7 + 7 * 11 + 11 + 11 * 3 + 3
    assert model(torch.randn(4, 5)).shape == (4, 3)
    for bad in ([5, 3], [5, 0, 3]):
        with pytest.raises(ValueError, match="sizes: expected"):
            models.MLP(bad)


def test_preactresnet18_is_the_common_form():
    model = models.PreActResNet18(3, 10)
    # 11,171,146 of the common CIFAR form
    assert count(model) == 11_171_146
    wide = models.PreActResNet18(1, 10, wide=66_000 // 100)
    assert count(wide) == count(models.PreActResNet18(1, 10)) - 5130 + 513 * 660 + 661 * 10


@pytest.mark.parametrize("size", [8, 28, 32])
def test_image_models_take_any_size(size):
    x = torch.rand(3, 1, size, size)
    for model in (
        models.PreActResNet18(1, 10, width=4, wide=30),
        models.SmallConvNet(1, 10, width=4, wide=30),
        models.SmallConvNet(1, 10, width=4, wide=30, batch_norm=False),
    ):
        network = Network(model.eval(), x)
        assert network.outputs == 10 and network.width == 30
        assert network.wide is not None and network.wide.beta == 100.0
        torch.testing.assert_close(network.logits(network.widen(network.backbone(x))), model(x))
        torch.testing.assert_close(network.logits(network.hidden(x)), model(x))


def test_wide_units():
    assert models.wide_units(60_000) == 66_000
    assert models.wide_units(10) == 11 and models.wide_units(1) == 2
    with pytest.raises(ValueError, match="expected n >= 1"):
        models.wide_units(0)
