#!/usr/bin/env bash
# nncf 3.4.0 + torch 2.13.0: quantizing an nn.Sequential fails, in torch's commonest container.
#
# Expected: nncf.quantize "applies post-training quantization to the provided model", a
# torch.nn.Module; an nn.Sequential of linear layers and ReLU is the simplest one there is.
# Seen: NotImplementedError: Module [HookStorage] is missing the required "forward" function. NNCF
# keeps its hooks in a module that it adds to the children of the copy that it works on, and an
# nn.Sequential calls every child that it has. The same layers in a module whose forward calls them
# are quantized; so is an nn.Sequential further down.
# Why it matters: the message names a class that the user has never seen and nothing that could be
# changed; probes, heads and MLPs are usually an nn.Sequential at the root.
# Way round: hold the model in a module with a forward of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 \
  nncf==3.4.0
cd "$folder"
# NNCF compiles a part of itself at first use
export TORCH_EXTENSIONS_DIR="$folder/extensions" NNCF_EXTENSION_LOAD_TIMEOUT=1200
venv/bin/python -W ignore - <<'PYTHON'
import logging

import nncf
import torch
from torch import nn

logging.disable(logging.INFO)
torch.manual_seed(0)
x = torch.randn(8, 20)


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def sequential():
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3)).eval()


def quantized(model):
    try:
        found = nncf.quantize(model, nncf.Dataset([x]), subset_size=1)(x)
    except NotImplementedError as error:
        return str(error)
    return tuple(found.shape)


print("nncf", nncf.__version__, "torch", torch.__version__)
root, held = quantized(sequential()), quantized(Holder(sequential()).eval())
print("an nn.Sequential:", root)
print("held in a module:", held)
assert "HookStorage" in root
assert held == (8, 3)
PYTHON
echo "as described"
