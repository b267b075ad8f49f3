#!/usr/bin/env bash
# ml_dtypes 0.6.0 + numpy 2.4.6: the sum of a thousand bfloat16 ones is 256, their mean 0.256.
#
# Expected: NumPy's sum works with "partial pairwise summation", and for float16 it is right: the
# sum of 4,096 ones is 4,096 and their mean 1 as "float16 results are computed using float32
# intermediates". ml_dtypes makes bfloat16 a NumPy type, and that is how JAX, safetensors and ONNX
# hand bfloat16 weights to NumPy.
# Seen: the sum adds one by one in bfloat16, which has 8 bits: at 256 it stands still. mean is
# 0.256 and var of a thousand ones is not 0. Dot products are right. No warning.
# Why it matters: weight statistics, norms by (w * w).sum(), averages of checkpoints and losses
# over a batch, taken in NumPy from bfloat16 tensors, are wrong by any factor; torch gives 1,000
# for its own bfloat16 ones.
# Way round: dtype=numpy.float32 in sum and mean, or astype first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check numpy==2.4.6 \
  ml_dtypes==0.6.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import ml_dtypes
import numpy as np

print("numpy", np.__version__, "ml_dtypes", ml_dtypes.__version__)
ones = np.ones(1000, ml_dtypes.bfloat16)
half = np.ones(4096, np.float16)
print("bfloat16: sum of 1000 ones", ones.sum(), "mean", ones.mean(), "var", ones.var())
wide = ones.sum(dtype=np.float32), ones.mean(dtype=np.float32)
print("bfloat16, dtype=float32: sum", wide[0], "mean", wide[1])
print("bfloat16: dot product of the ones", np.dot(ones, ones))
print("float16: sum of 4096 ones", half.sum(), "mean", half.mean())
assert ones.sum() == 256 and abs(float(ones.mean()) - 0.256) < 1e-3 and ones.var() > 0.1
assert wide == (1000, 1)
assert np.dot(ones, ones) == 1000
assert half.sum() == 4096 and half.mean() == 1
PYTHON
echo "as described"
