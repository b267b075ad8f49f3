#!/usr/bin/env bash
# jsonargparse 4.53.0: the order of a Union decides what a word on the command line becomes.
#
# Python's typing calls int | float and float | int equal (==), and so str | bool and bool | str.
# jsonargparse takes the first member that accepts the word: under float | int the word 3 is 3.0, so
# that an option which means "an epoch" as an integer and "a fraction" as a float reads 3 as a
# fraction; under str | bool the words false and off are the texts "false" and "off", which are true.
# Under bool | str, off is False, too, by YAML 1.1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  "jsonargparse[signatures]==4.53.0" "PyYAML==6.0.3" >/dev/null 2>&1
cat > "$folder/orders.py" <<'PYTHON'
from jsonargparse import ArgumentParser

assert (int | float) == (float | int) and (str | bool) == (bool | str)


def parsed(kind, word):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--option", type=kind)
    return repr(parser.parse_args(["--option", word]).option)


for kind, word in (
    (int | float, "3"),
    (float | int, "3"),
    (bool | str, "false"),
    (str | bool, "false"),
    (bool | str, "off"),
    (str | bool, "off"),
):
    print(f"{kind}, --option {word}: {parsed(kind, word)}")
PYTHON
"$folder/venv/bin/python" "$folder/orders.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
int | float, --option 3: 3
float | int, --option 3: 3.0
bool | str, --option false: False
str | bool, --option false: 'false'
bool | str, --option off: False
str | bool, --option off: 'off'
SEEN
echo "as described"
