"""Bounds by sample against bounds by number: which are smaller, for which networks.

By number, |error| passes through a map as through its absolute values: |W| e + gamma_k |W| |x|
(Higham 2002, section 3.1). By sample, the 2-norm passes through the map's own norm (docs/
certificate.md). Prints the medians over samples of both bounds of the features' error:

    python bench/elementwise_bounds.py
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from twophase.models import MLP, PreActResNet18, SmallConvNet
from twophase_ext.expressivity.running.features import bounded_features
from twophase_ext.linalg.bounds import UNIT_ROUNDOFF, gamma


class ByNumber(TorchDispatchMode):
    """A bound of the error of every number, for the operators of these networks alone."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        super().__init__()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def error(self, x: Tensor) -> Tensor:
        """Of x, in its shape: 0 where nothing is known."""
        found = self._kept.get(id(x))
        return torch.zeros_like(x) if found is None else found[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, then its rule."""
        out = func(*args, **(kwargs or {}))
        made, error = (out[0] if isinstance(out, tuple) else out), None
        x, name = args[0], func._schema.name.removeprefix("aten::")
        if name == "convolution":
            weight, bias, *rest = args[1:]
            bias = None if bias is None else bias.abs()
            sizes = func(x.abs(), weight.abs(), bias, *rest)
            error = func(self.error(x), weight.abs(), None, *rest)
            error += gamma(weight[0].numel() + 4) * sizes
        elif name == "addmm":
            bias, x, weight = args
            sizes = x.abs() @ weight.abs() + bias.abs()
            error = self.error(x) @ weight.abs() + gamma(len(weight) + 4) * sizes
        elif "batch_norm" in name:
            shape = (1, -1, 1, 1)
            weight, bias, mean = (t.abs().view(shape) for t in args[1:4])
            scale = weight / (args[4].view(shape) + args[-1]).sqrt()
            error = scale * self.error(x) + gamma(8) * (scale * (x.abs() + mean) + bias)
        elif "softplus" in name:  # of Lipschitz constant 1
            error = self.error(x) + 8 * UNIT_ROUNDOFF * made.abs()
        elif name in ("add", "add_"):
            error = self.error(x) + self.error(args[1]) + UNIT_ROUNDOFF * made.abs()
        elif "avg_pool2d" in name or name == "mean":
            error = func(self.error(x), *args[1:]) + gamma(64) * func(x.abs(), *args[1:])
        elif name in ("view", "_unsafe_view", "detach", "alias", "clone"):
            error = func(self.error(x), *args[1:])
        elif isinstance(x, Tensor) and id(x) in self._kept:
            raise ValueError(f"no rule for {name}")
        if error is not None:
            self._kept[id(made)] = made, error
        return out


def compare(name: str, model: nn.Module, stop: nn.Module, x: Tensor) -> None:
    """One line of the table."""
    model, x = model.double().eval(), x.double()
    by_sample = bounded_features(model, stop, [x], n=len(x))
    found: list[Tensor] = []
    handle = stop.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad(), ByNumber() as bounds:
        model(x)
    handle.remove()
    by_number = bounds.error(found[0]).norm(dim=1)
    ours, theirs = float(by_sample.error.median()), float(by_number.median())
    print(f"| {name} | {ours:.2g} | {theirs:.2g} | {theirs / ours:.2g} |", flush=True)


def main() -> None:
    """The table."""
    torch.manual_seed(0)
    images = torch.rand(8, 1, 28, 28)
    print("| network | by sample | by number | ratio |\n|---|---|---|---|")
    for hidden in ([64], [64] * 3, [256] * 8):
        model: Any = MLP([20, *hidden, 100, 3])
        compare(f"MLP, {len(hidden)} maps", model, model[-3], torch.rand(8, 20))
    model = SmallConvNet(width=8, wide=32)
    compare("SmallConvNet, width 8", model, model.head[0], images)
    for width in (8, 16):
        model = PreActResNet18(width=width, wide=32)
        compare(f"PreActResNet18, width {width}", model, model.head[0], images)
        with torch.no_grad():
            for block in model.blocks:
                block.conv2.weight.zero_()
        compare("the same, residual branches off", model, model.head[0], images)


if __name__ == "__main__":
    main()
