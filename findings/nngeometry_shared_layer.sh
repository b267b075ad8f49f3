#!/usr/bin/env bash
# nngeometry 0.4: the Fisher matrix of a network that uses a layer twice is silently another
# matrix.
#
# Expected: FIM(model=..., loader=..., representation=PMatDense) is "the Fisher Information Matrix
# using closed form expressions". What it cannot do it says: LayerCollection.from_model raises for
# a PReLU, say.
# Seen: for a network that applies one linear layer twice it raises nothing and returns a matrix
# whose trace is wrong by a fifth (per-sample Jacobians by torch.func are the judge). With two
# layers of their own in the same places the matrices agree to 1e-15.
# Why it matters: weight sharing (recurrent cells, tied embeddings, Siamese and implicit networks)
# is common; natural gradient, pruning scores, NTK eigenvalues and Laplace posteriors built on it
# are then those of no network.
# Way round: torch.func.jacrev with functional_call, or curvlinops' GGNLinearOperator, which
# agrees.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 \
  numpy==2.4.6 nngeometry==0.4
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import importlib.metadata

import torch
from nngeometry.metrics import FIM
from nngeometry.object import PMatDense
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

torch.set_default_dtype(torch.float64)


def by_jacobians(net, inputs):
    weights = dict(net.named_parameters())
    size = sum(p.numel() for p in weights.values())
    fisher = torch.zeros(size, size)
    for x in inputs:
        def logits(parameters, x=x):
            return functional_call(net, parameters, (x[None],))[0]

        jacobians = jacrev(logits)(weights).values()
        jacobian = torch.cat([j.detach().flatten(1) for j in jacobians], 1)
        p = logits(weights).detach().softmax(0)
        fisher += jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian / len(inputs)
    return fisher


torch.manual_seed(0)
inputs = torch.randn(20, 4)
loader = DataLoader(TensorDataset(inputs, torch.zeros(20, dtype=torch.long)), batch_size=20)
shared = nn.Linear(4, 4)
print("nngeometry", importlib.metadata.version("nngeometry"), "torch", torch.__version__)
found = {}
for name, first, second in (
    ("a layer used twice", shared, shared),
    ("two layers", nn.Linear(4, 4), nn.Linear(4, 4)),
):
    net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(4, 3))
    theirs = FIM(
        model=net, loader=loader, representation=PMatDense, variant="classif_logits"
    ).to_torch()
    truth = by_jacobians(net, inputs)
    found[name] = float((theirs - truth).norm() / truth.norm())
    print(f"{name}: trace {theirs.trace():.6f}, by Jacobians {truth.trace():.6f},", end=" ")
    print(f"relative difference {found[name]:.1e}")
assert found["two layers"] < 1e-10 and found["a layer used twice"] > 0.01
PYTHON
echo "as described"
