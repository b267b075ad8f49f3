#!/usr/bin/env bash
# linear_operator 0.6.1: from 801 rows on solve and logdet of a dense kernel matrix are off by tens
# of %.
#
# Expected: solve "computes a linear solve", A^{-1} R, and logdet "computes the log determinant".
# Both docstrings name no approximation, and at 800 rows the relative residual is 4e-11.
# Seen: with more rows than max_cholesky_size (800) solve becomes conjugate gradients whose
# relative tolerance, cg_tolerance, is 1 by default: the residual of a kernel matrix with 1e-4 on
# its diagonal is 0.4 of the right side, and logdet, now a random estimate, is off by about a
# hundred. No warning: the tolerance *was* met.
# Why it matters: who fits a kernel or NTK regression on 800 samples and then on 801 goes from an
# exact fit to no fit, and a likelihood jumps, without a line of code changed.
# Way round: the settings max_cholesky_size(n) for n rows, or cg_tolerance(1e-6) and a
# preconditioner; and the residual, which costs one product.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 \
  numpy==2.4.6 linear-operator==0.6.1
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import warnings

import linear_operator
import torch
from linear_operator.operators import DenseLinearOperator


def residual_and_logdet(rows):
    torch.manual_seed(0)
    x = torch.linspace(0, 1, rows, dtype=torch.float64)
    kernel = torch.exp(-((x[:, None] - x) ** 2) / 0.02)
    kernel += 1e-4 * torch.eye(rows, dtype=torch.float64)
    right = torch.randn(rows, 1, dtype=torch.float64)
    operator = DenseLinearOperator(kernel)
    residual = (kernel @ operator.solve(right) - right).norm() / right.norm()
    truth = 2 * torch.linalg.cholesky(kernel).diagonal().log().sum()
    return float(residual), float(operator.logdet() - truth)


print("linear_operator", linear_operator.__version__, "torch", torch.__version__)
with warnings.catch_warnings():
    warnings.simplefilter("error", linear_operator.utils.warnings.NumericalWarning)
    found = {rows: residual_and_logdet(rows) for rows in (800, 801)}
with linear_operator.settings.max_cholesky_size(1000):
    exact = residual_and_logdet(801)
for rows, (residual, off) in found.items():
    print(f"{rows} rows: relative residual {residual:.1e}, logdet off by {off:.1e}")
print(f"801 rows, max_cholesky_size(1000): {exact[0]:.1e}, {exact[1]:.1e}")
assert found[800][0] < 1e-8 and abs(found[800][1]) < 1e-6
assert found[801][0] > 0.05 and abs(found[801][1]) > 10
assert exact[0] < 1e-8 and abs(exact[1]) < 1e-6
PYTHON
echo "as described"
