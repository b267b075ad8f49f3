"""The networks' shapes, parameter counts and their layers as the Trainer sees them."""

import pytest
import torch

import twophase_ext as tp
from twophase import models
from twophase_ext.model.network import Network


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_mlp():
    model = models.MLP([5, 7, 11, 3])
    assert count(model) == 5 * 7 + 7 + 7 * 11 + 11 + 11 * 3 + 3
    assert model(torch.randn(4, 5)).shape == (4, 3)
    # equations (1) and (2), written out in float64: some 20 roundings of numbers near 1
    h = x = torch.randn(4, 5, dtype=torch.float64)
    w = {name: p.detach() for name, p in model.double().named_parameters()}
    for layer in ("0", "2"):
        z = h @ w[layer + ".weight"].T + w[layer + ".bias"]
        h = torch.log1p(torch.exp(-100 * z.abs())) / 100 + z.clamp(min=0)
    torch.testing.assert_close(
        model(x), h @ w["4.weight"].T + w["4.bias"], rtol=0, atol=20 * 2.0**-53
    )
    for bad in ([5, 3], [5, 0, 3]):
        with pytest.raises(ValueError, match="sizes: expected"):
            models.MLP(bad)


def test_preactresnet18_is_the_common_form():
    model = models.PreActResNet18(3, 10)
    # 11,171,146 of the common CIFAR form
    assert count(model) == 11_171_146
    wide = models.PreActResNet18(1, 10, wide=66_000 // 100)
    assert count(wide) == count(models.PreActResNet18(1, 10)) - 5130 + 513 * 660 + 661 * 10


def test_activation_factory():
    make = lambda: torch.nn.Softplus(10.0)  # noqa: E731
    nets = [
        models.MLP([4, 6, 3], activation=make),
        models.SmallConvNet(activation=make, wide=5),
        models.PreActResNet18(activation=make, width=4, wide=5),
    ]
    for model, activations in zip(nets, (1, 4, 17), strict=True):
        assert sum(type(m) is torch.nn.Softplus for m in model.modules()) == activations
        assert not any(isinstance(m, tp.nn.Softplus) for m in model.modules())


def test_a_wide_layer_needs_units():
    for make in (models.SmallConvNet, models.PreActResNet18):
        with pytest.raises(ValueError, match=r"wide: expected at least 1 unit or None, got 0"):
            make(width=4, wide=0)


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
