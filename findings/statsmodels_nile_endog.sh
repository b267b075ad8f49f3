#!/usr/bin/env bash
# statsmodels 0.15.0 + pandas 3.1.1: the target of the Nile's flow is NaN in all of its 100 years.
#
# Expected: `datasets.nile.load_pandas()` gives the yearly volumes as `endog`, the name under which
# every data set of the package gives its target, and `.data` the table that they come from.
# Seen: `.data["volume"]` has the hundred volumes, `endog` has its index and NaN everywhere; so has
# that of `load()`. No warning.
# Why it matters: `endog` is what a script over all data sets of the package takes; here everything
# that follows is NaN, or, where rows with missing values are dropped first, an empty set.
# Way round: `.data["volume"]`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check statsmodels==0.15.0 \
  pandas==3.1.1
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import pandas
import statsmodels
from statsmodels.datasets import nile, sunspots

print("statsmodels", statsmodels.__version__, "pandas", pandas.__version__)
found = nile.load_pandas()
volume = found.data["volume"]
print("data:", len(volume), "volumes, mean", volume.mean())
print("endog:", len(found.endog), "numbers,", int(found.endog.isna().sum()), "of them NaN")
print("endog of load():", int(nile.load().endog.isna().sum()), "NaN")
print("another set, sunspots:", int(sunspots.load_pandas().endog.isna().sum()), "NaN")
assert len(volume) == 100 and volume.notna().all()
assert len(found.endog) == 100 and found.endog.isna().all()
assert nile.load().endog.isna().all()
assert not sunspots.load_pandas().endog.isna().any()
PYTHON
echo "as described"
