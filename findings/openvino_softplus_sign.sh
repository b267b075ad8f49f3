#!/usr/bin/env bash
# openvino 2026.4.1: SoftPlus(x) is negative or exactly 0 on the left.
#
# Expected: the operator's page gives SoftPlus(x) = ln(exp(x) + 1), which is positive for every x,
# and float32 holds its values down to x = -103. Seen (CPU plugin on x86-64, precision f32): at -18
# and -20 it is about -1.9e-6 (the truth is 1.5e-8 and 2.1e-9), at -30 exactly 0 (9.4e-14); at -10
# it is off by a hundredth of itself. The error is below 2e-6, small beside 1 and not beside the
# value.
# Why it matters: softplus is how networks make a variance, a rate or a scale positive. log, sqrt
# or a division behind it gives NaN or a change of sign at inputs where torch is right to six
# digits.
# Way round: clamp from below by what the model can bear, or build it of operators that are right
# on the left: max(x, 0) + 2 * atanh(t / (2 + t)) with t = exp(-|x|).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check numpy==2.4.6 \
  openvino==2026.4.1
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import numpy as np
import openvino
from openvino import opset13 as ops

x = np.array([-30, -20, -18, -10, 0, 10], np.float32)


def run(build):
    parameter = ops.parameter([x.size], np.float32)
    model = openvino.Model([build(parameter)], [parameter])
    return openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]


def composed(node):
    t = ops.exp(ops.negative(ops.abs(node)))
    tail = ops.atanh(ops.divide(t, ops.add(t, np.float32(2))))
    return ops.add(ops.relu(node), ops.multiply(tail, np.float32(2)))


truth = np.logaddexp(x.astype(np.float64), 0)
there, mended = run(ops.softplus), run(composed)
print("openvino", openvino.__version__)
print("x       ", x.tolist())
print("truth   ", truth.tolist())
print("SoftPlus", there.tolist())
print("composed", mended.tolist())
print("log of SoftPlus", np.log(there).tolist())
assert (there <= 0).sum() >= 2 and there.min() < 0
assert abs(there - truth).max() < 1e-5
assert (abs(mended - truth) <= 1e-5 * truth).all()
PYTHON
echo "as described"
