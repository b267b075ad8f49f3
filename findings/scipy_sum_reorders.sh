#!/usr/bin/env bash
# scipy 1.17.1: A.sum(), abs(A) or A.max() rewrites a sparse matrix, and others built on its
# pattern.
#
# Expected: a sum reads. Neither its page nor abs's says that the operand changes, and
# csr_matrix((data, A.indices, A.indptr)) is the usual way to put new values on the pattern of A.
# Seen: A @ B comes with unsorted indices; sum, abs, max, count_nonzero, power and norm first sort
# them *in place*. A itself stays the same matrix, but W, which shares A.indices and has values of
# its own, gets its values moved to other places, silently. Had the product come out sorted nothing
# would happen, so it depends on the numbers. A + A, A @ x, A.T and A * 2 do not sort.
# Why it matters: masks, gradients and preconditioners of sparse layers or Jacobians are kept as
# values on one common pattern; printing a norm in between scrambles them.
# Way round: A.sort_indices() before anything shares the arrays, or indices.copy().
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
from scipy import sparse


def product():
    a = sparse.random(6, 6, 0.4, random_state=0, format="csr") + sparse.eye(6, format="csr")
    return (a @ a.T).tocsr()


def scrambled(read):
    a = product()
    before = a.toarray()
    w = sparse.csr_matrix((np.arange(1.0, a.nnz + 1), a.indices, a.indptr), shape=a.shape)
    values = w.toarray()
    read(a)
    assert (a.toarray() == before).all()
    return bool((w.toarray() != values).any())


print("scipy", scipy.__version__, "product sorted:", bool(product().has_sorted_indices))
reads = {
    "a.sum()": lambda a: a.sum(),
    "abs(a)": abs,
    "a.max()": lambda a: a.max(),
    "a.count_nonzero()": lambda a: a.count_nonzero(),
    "sparse.linalg.norm(a)": sparse.linalg.norm,
    "a + a": lambda a: a + a,
    "a @ x": lambda a: a @ np.ones(6),
    "a.T": lambda a: a.T,
}
seen = {name: scrambled(read) for name, read in reads.items()}
for name, moved in seen.items():
    print(f"{name}: the other matrix is {'scrambled' if moved else 'kept'}")
assert [name for name, moved in seen.items() if moved] == list(reads)[:5]
a = product()
a.sort_indices()
w = sparse.csr_matrix((np.arange(1.0, a.nnz + 1), a.indices, a.indptr), shape=a.shape)
values = w.toarray()
a.sum()
assert (w.toarray() == values).all()
PYTHON
echo "as described"
