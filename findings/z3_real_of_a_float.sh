#!/usr/bin/env bash
# z3-solver 5.4.1.0: RealVal(0.1) is 1/10 and not the number that Python's 0.1 is.
#
# Expected: "val may be a Python int, long, float or string representing a number", and a float is
# one rational number: 0.1 is 3602879701896397 / 2**55. Z3's reals are exact, so one expects that
# number.
# Seen: the float goes through its shortest decimal text. RealVal(0.1) is 1/10, and
# RealVal(numpy.float32(0.1)) is 1/10 as well, although the two numbers differ by 1.5e-9;
# comparisons such as x == 0.1 do the same. sympy.Rational and fractions.Fraction take floats
# exactly.
# Why it matters: whoever encodes a network's weights into Z3 verifies exactly, but another
# network: each float32 weight is off by up to half a unit in its last place. Below "the output
# never exceeds 1" is proved, though it is false for the weights that are stored and run.
# Way round: RealVal(str(Fraction(float(w)))), or numerator and denominator by
# float.as_integer_ratio.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check numpy==2.4.6 \
  z3-solver==5.4.1.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
from fractions import Fraction

import numpy as np
import z3

print("z3", z3.get_version_string())
exact = Fraction(0.1)
print("0.1 is", exact)
print("RealVal(0.1) is", z3.RealVal(0.1))
print("RealVal(float32(0.1)) is", z3.RealVal(np.float32(0.1)))
assert z3.RealVal(0.1).as_fraction() == z3.RealVal(np.float32(0.1)).as_fraction() == Fraction(1, 10)
assert exact != Fraction(1, 10) != Fraction(float(np.float32(0.1)))


def largest(weights, encode):
    """Can sum w_i x_i exceed 1 for x in [0, 1]^n?"""
    x = z3.Reals([f"x{i}" for i in range(len(weights))])
    solver = z3.Solver()
    solver.add(*[z3.And(0 <= v, v <= 1) for v in x])
    solver.add(z3.Sum([encode(w) * v for w, v in zip(weights, x)]) > 1)
    return solver.check()


# As float32 the three weights sum to slightly more than 1.
weights = [np.float32(w) for w in (0.3, 0.3, 0.4)]
total = sum(Fraction(float(w)) for w in weights)
print("exact sum of the float32 weights minus 1:", float(total - 1))
by_value = largest(weights, z3.RealVal)
by_fraction = largest(weights, lambda w: z3.RealVal(str(Fraction(float(w)))))
print("can the output exceed 1? RealVal(w):", by_value, " RealVal(str(Fraction(w))):", by_fraction)
assert str(by_value) == "unsat" and str(by_fraction) == "sat" and total > 1
PYTHON
echo "as described"
