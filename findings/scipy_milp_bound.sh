#!/usr/bin/env bash
# scipy 1.17.1 (HiGHS): "optimal" values and dual bounds of a mixed integer program are not bounds.
#
# Expected: milp's result has mip_dual_bound, "the MILP solver's final estimate of the lower bound
# on the optimal solution", and integrality=1 means that the variable "must be an integer". For the
# standard encoding of a ReLU network (y <= z + M (1 - d), y <= M d, d in {0, 1}) one reads a
# certified maximum of the output off it.
# Seen: constraints hold to 1e-7 and integers to 1e-6, HiGHS' tolerances, and d = 1e-7 times M =
# 1e7 is a neuron that is on and off at once. Without presolve the "optimum" 10.35 of a network of
# 8 neurons is nearly twice the true maximum 5.42, and the binaries are 4.7e-7 off. With all
# defaults and M = 1e8 the bound is 4e-9 *below* a value that the network attains: as a proof it is
# false. Status 0, no warning.
# Why it matters: this is how small networks are verified, and a loose M is what one writes first.
# Way round: the tightest M from interval bounds; evaluate the network at the solver's point; a
# margin of M times 1e-6 on each neuron, or exact rational arithmetic, before "proved" is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check numpy==2.4.6 \
  scipy==1.17.1
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import numpy as np
import scipy
from scipy.optimize import Bounds, LinearConstraint, milp


def network(seed, inputs, width):
    random = np.random.default_rng(seed)
    return random.standard_normal((width, inputs)), *random.standard_normal((2, width))


def output(x, weight, bias, last):
    return last @ np.maximum(weight @ x + bias, 0)


def maximum(weight, bias, last, big, bounded, presolve):
    """The largest output over [-1, 1]^inputs; variables x, z, y = relu(z), d."""
    width, inputs = weight.shape
    one, none = np.eye(width), np.zeros((width, width))
    no_x = np.zeros((width, inputs))
    rows = np.block(
        [
            [-weight, one, none, none],
            [no_x, -one, one, none],
            [no_x, -one, one, big * one],
            [no_x, none, one, -big * one],
        ]
    )
    zeros, full, inf = np.zeros(width), np.full(width, big), np.full(width, np.inf)
    end = full if bounded else inf
    result = milp(
        np.r_[np.zeros(inputs + width), -last, zeros],
        constraints=LinearConstraint(
            rows, np.r_[bias, zeros, -inf, -inf], np.r_[bias, inf, full, zeros]
        ),
        bounds=Bounds(
            np.r_[-np.ones(inputs), -end, zeros, zeros],
            np.r_[np.ones(inputs), end, end, np.ones(width)],
        ),
        integrality=np.r_[np.zeros(inputs + 2 * width), np.ones(width)],
        options={"presolve": presolve},
    )
    assert result.status == 0, result.message
    binaries = result.x[-width:]
    off = abs(binaries - binaries.round()).max()
    return -result.mip_dual_bound, output(result.x[:inputs], weight, bias, last), off


print("scipy", scipy.__version__)
net = network(3, 3, 8)
truth, attained, _ = maximum(*net, big=1e2, bounded=True, presolve=True)
claimed, at_point, off = maximum(*net, big=1e7, bounded=True, presolve=False)
print(f"M = 100: bound {truth:.8}, the network attains {attained:.8} there")
print(f"M = 1e7, no presolve: bound {claimed:.8}, the network has {at_point:.8} there,", end=" ")
print(f"binaries off by {off:.2g}")
assert abs(truth - attained) < 1e-6 and claimed > truth + 1 and 0 < off < 1e-6
net = network(1, 2, 4)
claimed, attained, _ = maximum(*net, big=1e8, bounded=False, presolve=True)
print(f"M = 1e8, all defaults: bound {claimed:.12}, the network attains {attained:.12}")
assert attained > claimed + 1e-10
PYTHON
echo "as described"
