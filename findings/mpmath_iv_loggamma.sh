#!/usr/bin/env bash
# mpmath 1.4.1: iv.loggamma of a number below 1/2 is an interval whose ends are the wrong way
# round.
#
# Expected: an interval of mpmath's iv context has a lower end a, an upper end b and the value in
# between; iv.mpf([2, 1]) is refused with "endpoints must be properly ordered", and iv.gamma,
# iv.exp and iv.log enclose thousands of random points without one failure.
# Seen: iv.loggamma(0.3) has a > b: the two ends are rounded inwards, past one another. So it was
# for each of 300 points of (0, 1/2): nothing lies in such an interval, its width is negative, and
# proper intervals lose their ends, too (of [0.2, 0.3] the exact minimum lies outside). From 1/2 up
# no failure was found.
# Why it matters: log-Gamma is in every Beta, Dirichlet, Student-t or negative binomial likelihood;
# a check by "a <= x <= b" rejects the truth, and a bound carried on from such an interval is
# upside down by some ulps, silently.
# Way round: loggamma(x) = log(gamma(x)), where iv.gamma and iv.log both enclose.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check mpmath==1.4.1
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
from random import Random

import mpmath
from mpmath import iv, mpf


def encloses(interval, x):
    with mpmath.workprec(300):
        truth = mpmath.loggamma(mpf(x))
        return mpf(interval.a) <= truth <= mpf(interval.b)


print("mpmath", mpmath.__version__)
found = iv.loggamma(iv.mpf(0.3))
print("iv.loggamma(0.3).a =", found.a, " .b =", found.b, " a <= b:", bool(found.a <= found.b))
print("log(gamma(0.3))    =", iv.log(iv.gamma(iv.mpf(0.3))))
wide = iv.loggamma(iv.mpf([0.2, 0.3]))
with mpmath.workprec(200):
    least = mpmath.loggamma(mpf(0.3))
print("iv.loggamma([0.2, 0.3]).a =", wide.a.a, " its least value =", mpmath.nstr(least, 20))
random = Random(0)
failures = {}
for low, high in ((0.01, 0.49), (0.51, 0.99), (1.01, 50)):
    points = [random.uniform(low, high) for _ in range(300)]
    failures[low] = [
        sum(not encloses(function(iv.mpf(x)), x) for x in points)
        for function in (iv.loggamma, lambda i: iv.log(iv.gamma(i)))
    ]
    print(
        f"300 points of [{low}, {high}]: {failures[low][0]} not enclosed by loggamma,"
        f" {failures[low][1]} by log(gamma)"
    )
assert not found.a <= found.b
assert failures[0.01][0] == 300 and failures[0.51][0] == failures[1.01][0] == 0
assert not wide.a <= least
assert all(by_log == 0 for _, by_log in failures.values())
PYTHON
echo "as described"
