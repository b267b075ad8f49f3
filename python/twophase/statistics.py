"""Statistics of runs over seeds: summary of a sample, paired tests, Holm's correction.

Nothing is reported that the sample does not support: where a value is undefined it is None, never
0, NaN or infinity. Means and standard deviations are computed in exact rational arithmetic and
rounded once.
"""

import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Self

import numpy as np
from scipy.special import stdtr, stdtrit

Interval = tuple[float, float]

LARGEST_EXACT = 12  # pairs up to which all 2^n sign patterns are enumerated


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one sample.

    std: sample standard deviation (ddof 1), None for n = 1. ci95: 95 % t interval of the mean
    (low, high); None for n = 1 and for a sample without spread, whose interval of width 0 would
    claim certainty. values: the sample; empty where only a mean and a std are known, as for
    printed results.
    """

    n: int
    mean: float
    std: float | None
    ci95: Interval | None
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Iterable[float], name: str = "values") -> Self:
        """The summary of a sample; `name` is the argument that errors speak of.

        Raises ValueError for an empty sample or non-finite values (named with their indices),
        TypeError for anything but real numbers.
        """
        sample = _finite(values, name)
        mean = statistics.mean(sample)
        std = statistics.stdev(sample) if len(sample) > 1 else None
        return cls(len(sample), mean, std, _interval(len(sample), mean, std), tuple(sample))


@dataclass(frozen=True)
class Paired:
    """Paired differences and two tests of the hypothesis that they are centred at 0.

    mean, std (ddof 1), ci95 (t interval): of the n differences. t, p: two-sided paired t-test.
    p_sign_flip: two-sided sign-flip permutation test, exact, for 2 <= n <= 12. It assumes only
    that each difference is as likely as its negative, and is never below 2^(1 - n).
    See `paired_test` for what is None and when.
    """

    n: int
    mean: float
    std: float | None
    ci95: Interval | None
    t: float | None
    p: float | None
    p_sign_flip: float | None


def paired_test(a: Iterable[float], b: Iterable[float]) -> Paired:
    """Test the differences a_i - b_i, one pair for each seed.

    - n = 1: nothing can be tested; std, ci95, t and both p are None.
    - All differences equal and not 0: std is 0, so t is infinite and its p of 0 would claim
      certainty from a few seeds. ci95, t and p are None; p_sign_flip, 2^(1 - n), is what holds.
    - All differences 0: t is 0 / 0 and None, ci95 is None, both p are 1: no evidence at all.

    Differences are compared up to the rounding of a and b: 0.3 - 0.2 equals 0.2 - 0.1. So
    decimal data, as error rates are, give neither a t of 1e16 nor a permutation that just misses
    its tie.

    Raises ValueError for empty samples, different lengths or non-finite values, differences
    included; TypeError for anything but real numbers.
    """
    first, second = _finite(a, "a"), _finite(b, "b")
    if len(first) != len(second):
        raise ValueError(
            f"a, b: expected one pair for each seed, got {len(first)} and {len(second)} values"
        )
    differences = _finite((x - y for x, y in zip(first, second, strict=True)), "a - b")
    n, mean = len(differences), statistics.mean(differences)
    if n == 1:
        return Paired(n, mean, None, None, None, None, None)
    # what a decimal loses as a float, and in the few operations that make an error rate of counts
    rounding = 16 * sys.float_info.epsilon * max(map(abs, first + second))
    flips = _sign_flip(differences, rounding) if n <= LARGEST_EXACT else None
    if max(map(abs, differences)) <= rounding:
        return Paired(n, 0.0, 0.0, None, None, 1.0, flips)
    if max(differences) - min(differences) <= rounding:
        return Paired(n, mean, 0.0, None, None, None, flips)
    std = statistics.stdev(differences)
    t = mean / (std / math.sqrt(n))
    p = 2 * float(stdtr(n - 1, -abs(t)))
    return Paired(n, mean, std, _interval(n, mean, std), t, p, flips)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjusted p-values, in the order given.

    A test is rejected at family-wise error alpha if and only if its adjusted p is <= alpha,
    whatever the dependence between the tests. None stands for a test that was not made: it stays
    None and does not count. Raises ValueError for a p outside [0, 1] (NaN included).
    """
    known = [(p, i) for i, p in enumerate(p_values) if p is not None]
    for p, i in known:
        if not 0 <= p <= 1:
            raise ValueError(f"p_values: expected numbers in [0, 1] or None, got {p} at index {i}")
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(sorted(known)):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def _finite(values: Iterable[float], name: str) -> list[float]:
    """The values as floats; the errors of Summary.of."""
    sample = list(values)
    for i, value in enumerate(sample):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(
                f"{name}: expected real numbers, got {type(value).__name__} at index {i}"
            )
    if not sample:
        raise ValueError(f"{name}: expected at least one value, got none")
    if wrong := [f"{v} at index {i}" for i, v in enumerate(sample) if not math.isfinite(v)]:
        raise ValueError(f"{name}: expected finite values, got {', '.join(wrong)}")
    return [float(value) for value in sample]


def _interval(n: int, mean: float, std: float | None) -> Interval | None:
    """The 95 % t interval of a mean; None without spread."""
    if not std:
        return None
    half = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
    return mean - half, mean + half


def _sign_flip(differences: Sequence[float], rounding: float) -> float:
    """Share of the 2^n sign patterns whose sum is at least as far from 0 as the one observed.

    rounding: error of one difference; sums closer than n of them are ties.
    """
    n = len(differences)
    signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)  # [2^n, n]; row 0 is all +1
    sums = np.abs(signs @ np.asarray(differences))
    return float(np.mean(sums >= sums[0] - n * rounding))
