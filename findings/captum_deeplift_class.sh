#!/usr/bin/env bash
# captum 0.9.0: DeepLift's attributions stop adding up for a subclass of ReLU that changes nothing.
#
# Expected: DeepLift's attributions sum to f(x) - f(baseline), and the page promises the Rescale
# rule for "a limited number of non-linear activations". What isinstance(layer, nn.ReLU) holds for
# is a ReLU.
# Seen: the rule is looked up by the exact class. `class Named(nn.ReLU): pass` gets plain gradients
# instead, and the sum is off by 17 % of the output's change; so do GELU, SiLU, Mish, ReLU6, SELU
# and Hardtanh, by 4 to 28 %. No error and no warning says so.
# Why it matters: frameworks subclass activations (to fuse, to name, to quantize them), and the
# picture then changes although the network computes the same numbers to the bit.
# Way round: ask for return_convergence_delta=True and refuse what is not small; replace the layers
# by the plain classes before attributing; or integrated gradients, which need no list.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 \
  numpy==2.4.6 captum==0.9.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import captum
import torch
from captum.attr import DeepLift
from torch import nn


class Named(nn.ReLU):
    pass


def network(activation):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 2)).eval()


print("captum", captum.__version__, "torch", torch.__version__)
torch.manual_seed(0)
x = torch.randn(5, 4)
assert torch.equal(network(nn.ReLU())(x), network(Named())(x))
found = {}
for activation in (nn.ReLU(), Named(), nn.Tanh(), nn.GELU(), nn.ReLU6()):
    net = network(activation)
    _, delta = DeepLift(net).attribute(x, target=1, return_convergence_delta=True)
    change = (net(x) - net(torch.zeros_like(x)))[:, 1].abs().max()
    name = type(activation).__name__
    found[name] = float(delta.abs().max() / change)
    print(f"{name:6} sum of the attributions off by {found[name]:.1e} of the largest change")
assert max(found["ReLU"], found["Tanh"]) < 1e-5
assert min(found["Named"], found["GELU"], found["ReLU6"]) > 0.01
PYTHON
echo "as described"
