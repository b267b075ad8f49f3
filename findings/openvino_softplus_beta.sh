#!/usr/bin/env bash
# openvino 2026.4.1 + torch 2.13.0: a softplus' beta is lost on one of two ways into OpenVINO.
#
# Expected: convert_model "converts the model from original framework to OpenVino Model"; given a
# torch module and an example input, or given the exported program of that module, it should arrive
# at one function.
# Seen: from the module (traced with TorchScript) nn.Softplus(beta=100) becomes SoftPlus(x), beta
# dropped: at 0 it says 0.693 where torch says 0.00693. From torch.export.export(module, ...) the
# beta is kept. Neither warns, and every other activation that it took (ELU's and CELU's alpha,
# LeakyReLU's slope, GELU's approximation, ...) was right on both ways.
# Why it matters: implicit surfaces, physics-informed networks and smoothed ReLUs live on beta = 10
# to 100; the deployed network is another function, smooth enough to look plausible.
# Way round: convert the exported program, or write softplus(beta * x) / beta.
# (The exported way imports packaging, which openvino does not install by itself.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 \
  numpy==2.4.6 openvino==2026.4.1 packaging==26.4
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import openvino
import torch
from torch import nn

CPU = {"INFERENCE_PRECISION_HINT": "f32"}


def difference(model, module, x):
    there = openvino.compile_model(model, "CPU", CPU)(x.numpy())[0]
    return abs(there - module(x).numpy()).max()


print("openvino", openvino.__version__, "torch", torch.__version__)
x = torch.linspace(-1, 1, 9)[None]
found = {}
for name, module in {
    "Softplus(beta=100)": nn.Softplus(beta=100),
    "Softplus()": nn.Softplus(),
    "ELU(alpha=0.5)": nn.ELU(alpha=0.5),
}.items():
    traced = difference(openvino.convert_model(module, example_input=x), module, x)
    program = torch.export.export(module, (x,))
    found[name] = traced, difference(openvino.convert_model(program), module, x)
    print(f"{name}: off by {found[name][0]:.2g} from the module, {found[name][1]:.2g} exported")
assert abs(found["Softplus(beta=100)"][0] - 0.686) < 0.001
assert found["Softplus(beta=100)"][1] < 1e-6
assert max(*found["Softplus()"], *found["ELU(alpha=0.5)"]) < 1e-6
PYTHON
echo "as described"
