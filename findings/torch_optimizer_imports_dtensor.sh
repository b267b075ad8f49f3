#!/usr/bin/env bash
# torch 2.13.0: making any optimizer imports torch.distributed.tensor, so that "is it in
# sys.modules?" tells nobody whether a program uses DTensors.
#
# Expected: torch loads DTensor lazily, and code that must treat it specially asks first whether the
# module has been imported, which is free: isinstance(x, DTensor) by name imports what nobody uses.
# Seen: after torch.optim.SGD([p]) the module is there, with torch._dynamo, torch.fx's tracers and
# hundreds of others: the optimizer's base class wraps a method by torch._disable_dynamo.
# Why it matters: a guard of that kind is always open in training programs; one isinstance for each
# parameter, gradient and momentum then costs more than a small network's whole step.
# Way round: ask the types, once for a list: {*map(type, tensors)} <= {Tensor, Parameter}.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import sys
import time

import torch

NAME = "torch.distributed.tensor"
p = torch.nn.Parameter(torch.ones(3))
before, known = NAME in sys.modules, len(sys.modules)
start = time.perf_counter()
torch.optim.SGD([p], lr=0.1)
took, added = time.perf_counter() - start, len(sys.modules) - known
print("torch", torch.__version__)
print(f"{NAME} imported: {before} before the first optimizer, {NAME in sys.modules} after it")
print(f"the optimizer's first line took {took:.1f} s and imported {added} modules")
start = time.perf_counter()
torch.optim.SGD([p], lr=0.1)
print(f"its second {1e6 * (time.perf_counter() - start):.0f} us")
assert not before
assert NAME in sys.modules
assert "torch._dynamo" in sys.modules
assert added > 500
PYTHON
echo "as described"
