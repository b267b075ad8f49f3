#!/usr/bin/env bash
# scipy 1.17.1: svds(solver="propack", which="SM") says that a well conditioned matrix is singular.
#
# Expected: 'SM' finds the k smallest singular values ("Which k singular values to find: either the
# largest magnitude ('LM') or smallest magnitude ('SM')"), and a solver that did not converge says
# so, as lobpcg does by a warning and arpack by ArpackNoConvergence.
# Seen: for a random 60 x 40 matrix with singular values from 1.76 to 13.95, and for diag(1, ...,
# 100), the three smallest come back as exactly 0, 0, 0. No warning, no error. arpack is right on
# both.
# Why it matters: the smallest singular value of a feature matrix, a Jacobian or an NTK decides
# rank, identifiability and rate; this reads "rank deficient" off a matrix of condition 8.
# Way round: solver="arpack" (right here; it works on A^T A, so that nothing below 1e-8 of the
# largest is seen), numpy.linalg.svd where the matrix fits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check numpy==2.4.6 \
  scipy==1.17.1
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import warnings

import numpy as np
import scipy
from scipy.sparse.linalg import svds

print("scipy", scipy.__version__)
for name, matrix in {
    "random 60 x 40": np.random.default_rng(0).standard_normal((60, 40)),
    "diag(1, ..., 100)": np.diag(np.arange(1.0, 101.0)),
}.items():
    truth = np.linalg.svd(matrix, compute_uv=False)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in ("arpack", "propack"):
            found[solver] = np.sort(
                svds(matrix, k=3, which="SM", solver=solver, rng=0, return_singular_vectors=False)
            )
    print(f"{name}, largest {truth[0]:.4}, smallest", truth[-3:][::-1])
    print("  arpack ", found["arpack"])
    print("  propack", found["propack"])
    assert np.allclose(found["arpack"], truth[-3:][::-1])
    assert (found["propack"] == 0).all()
PYTHON
echo "as described"
