#!/usr/bin/env bash
# torch 2.13.0: nn.TransformerEncoderLayer runs another activation in training than in evaluation
# once `layer.activation` has been assigned.
#
# The constructor notes in activation_relu_or_gelu that it was given relu. In evaluation mode without
# gradients a fused kernel goes by that note and not by the attribute: after
# `layer.activation = F.gelu` the layer still computes relu there, and gelu wherever gradients are on.
# Who swaps the activation of a trained encoder (for an analytic one, say) trains one function and
# evaluates another; nothing warns. Assigning activation_relu_or_gelu = 0 as well mends it.
#
# Seen (largest differences of the outputs; the second depends on the weights drawn):
#   torch 2.13.0+cpu
#   evaluation without gradients, from the relu layer:   0.0
#   evaluation without gradients, from with gradients:   0.109
#   the same with activation_relu_or_gelu = 0:           2.38e-07
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" torch==2.13.0 numpy==2.4.6 >/dev/null 2>&1
cd "$folder"
PYTHONPATH="$folder" python3 - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
relu = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
relu.load_state_dict(layer.state_dict())
x = torch.randn(2, 3, 8)
layer.activation = F.gelu
with_gradients = layer(x).detach()
with torch.no_grad():
    without = layer(x)
    from_relu = float((without - relu(x)).abs().max())
    from_itself = float((without - with_gradients).abs().max())
    layer.activation_relu_or_gelu = 0
    mended = float((layer(x) - with_gradients).abs().max())
print("torch", torch.__version__)
print(f"evaluation without gradients, from the relu layer:   {from_relu:.3}")
print(f"evaluation without gradients, from with gradients:   {from_itself:.3}")
print(f"the same with activation_relu_or_gelu = 0:           {mended:.3}")
assert torch.__version__.startswith("2.13.0")
assert from_relu < 1e-6 < 1e-2 < from_itself and mended < 1e-6
PYTHON
