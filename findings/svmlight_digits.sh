#!/usr/bin/env bash
# scikit-learn 1.9.1: a data set changes on its way through an svmlight / libsvm file.
#
# Expected: dump_svmlight_file followed by load_svmlight_file gives the numbers back; the page
# names one loss only, that it "does not store zero valued features". 17 significant digits bring
# every float64 back (Python's repr and numpy.savetxt's default do).
# Seen: the writer prints %.16g. Of a million normal numbers 43 % come back changed, by one unit in
# the last place or a few, and two neighbouring numbers can come back as one: rows that were
# distinct become equal rows, here with different labels.
# Why it matters: hashes and caches of the data change; a run from the file is not the run from the
# arrays; and whether all samples are distinct, which decides whether a network can fit all labels
# (and what the least training loss is), changes in the file.
# Way round: float32 data survive (9 digits are enough) if load_svmlight_file gets
# dtype=numpy.float32; float64 data belong into numpy.save or safetensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check numpy==2.4.6 \
  scipy==1.17.1 scikit-learn==1.9.1
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import io

import numpy as np
import sklearn
from sklearn.datasets import dump_svmlight_file, load_svmlight_file


def through_the_file(x, y):
    file = io.BytesIO()
    dump_svmlight_file(x, y, file)
    file.seek(0)
    return load_svmlight_file(file, n_features=x.shape[1], dtype=x.dtype)[0].toarray()


print("scikit-learn", sklearn.__version__)
x = np.random.default_rng(0).standard_normal((200_000, 5))
y = np.zeros(len(x))
changed = (through_the_file(x, y) != x).mean()
single = x.astype(np.float32)
print(f"float64 numbers changed: {changed:.1%}")
print(f"float32 numbers changed: {(through_the_file(single, y) != single).mean():.1%}")
pair = np.array([[0.3, 1.0], [0.1 + 0.2, 1.0]])
back = through_the_file(pair, np.array([0, 1]))
print("two rows:", pair.tolist(), "labels 0 and 1; distinct:", len(np.unique(pair, axis=0)))
print("come back:", back.tolist(), "distinct:", len(np.unique(back, axis=0)))
assert 0.4 < changed < 0.5
assert (through_the_file(single, y) == single).all()
assert len(np.unique(pair, axis=0)) == 2 and len(np.unique(back, axis=0)) == 1
PYTHON
echo "as described"
