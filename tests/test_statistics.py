"""Statistics over seeds against mpmath, scipy.stats and exact enumeration."""

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from twophase.statistics import Summary, holm, paired_test

hundredths = st.integers(-3000, 3000)  # error rates and their differences, in units of 0.01


def two_sided(t: float, degrees: int) -> mpmath.mpf:
    """P(|T| > |t|) of Student's t."""
    with mpmath.workdps(50):
        x = mpmath.mpf(degrees) / (degrees + mpmath.mpf(t) ** 2)
        return mpmath.betainc(mpmath.mpf(degrees) / 2, 0.5, 0, x, regularized=True)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 31, 100])
def test_summary_is_mean_std_and_t_interval(n):
    sample = [1e6 + v for v in np.random.default_rng(n).normal(size=n)]
    summary = Summary.of(sample)
    exact = [Fraction(v) for v in sample]
    mean = sum(exact) / n
    with mpmath.workdps(50):
        variance = sum((v - mean) ** 2 for v in exact) / (n - 1)
        std = mpmath.sqrt(mpmath.mpf(variance.numerator) / variance.denominator)
    assert (summary.n, summary.values) == (n, tuple(sample))
    assert summary.mean == float(mean)
    assert summary.std == float(std)
    low, high = summary.ci95
    assert low + high == pytest.approx(2 * summary.mean, rel=1e-15)
    t = (high - low) / 2 * math.sqrt(n) / summary.std
    assert float(two_sided(t, n - 1)) == pytest.approx(0.05, rel=1e-8)  # 1e6 costs 6 digits


def test_summary_claims_nothing_that_the_sample_does_not_support():
    one, same = Summary.of([0.1]), Summary.of([0.1, 0.1, 0.1])
    assert (one.n, one.mean, one.std, one.ci95) == (1, 0.1, None, None)
    assert (same.n, same.mean, same.std, same.ci95) == (3, 0.1, 0.0, None)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], ValueError, "losses: expected at least one value, got none"),
        ([1.0, math.nan, 2.0], ValueError, "losses: expected finite values, got nan at index 1"),
        ([math.inf, 1, -math.inf], ValueError, "got inf at index 0, -inf at index 2"),
        ([1.0, "2"], TypeError, "losses: expected real numbers, got str at index 1"),
        ([1.0, None], TypeError, "got NoneType at index 1"),
        ([True], TypeError, "got bool at index 0"),
    ],
)
def test_summary_names_what_it_refuses(values, error, message):
    with pytest.raises(error, match=message):
        Summary.of(values, "losses")


@pytest.mark.parametrize("n", [2, 3, 5, 12, 40])
@pytest.mark.parametrize("shift", [0.0, 0.3, 8.0])
def test_paired_t_test(n, shift):
    rng = np.random.default_rng(n)
    b = rng.normal(size=n)
    a = b + shift + rng.normal(size=n)
    test, scipy_test = paired_test(a, b), scipy.stats.ttest_rel(a, b)
    interval = scipy_test.confidence_interval(0.95)
    assert test.n == n
    assert test.t == pytest.approx(scipy_test.statistic, rel=1e-10)
    assert test.p == pytest.approx(scipy_test.pvalue, rel=1e-9)
    assert test.p == pytest.approx(float(two_sided(test.t, n - 1)), rel=1e-11)
    assert test.ci95 == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert test.mean == pytest.approx(np.mean(a - b), rel=1e-12)
    assert test.std == pytest.approx(np.std(a - b, ddof=1), rel=1e-12)
    # the interval holds the shifts that the test does not reject
    assert paired_test(a - test.ci95[0], b).p == pytest.approx(0.05, rel=1e-9)


def test_the_sign_says_which_is_lower():
    test = paired_test([1.0, 2.0, 3.5], [2.0, 4.0, 5.0])
    assert test.mean == -1.5 and test.t < 0 and test.ci95[0] < -1.5 < test.ci95[1]


def test_one_pair_tests_nothing():
    test = paired_test([0.4], [0.1])
    assert (test.n, test.mean) == (1, pytest.approx(0.3))
    assert {test.std, test.ci95, test.t, test.p, test.p_sign_flip} == {None}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]),
        ([0.3, 0.2, 0.9], [0.2, 0.1, 0.8]),  # in floating point the three differ
        ([41.43, 41.32, 13.99], [40.78, 40.67, 13.34]),
    ],
)
def test_equal_differences_have_no_t_test(a, b):
    test = paired_test(a, b)
    assert test.mean == pytest.approx(a[0] - b[0])
    assert (test.std, test.ci95, test.t, test.p) == (0.0, None, None, None)
    assert test.p_sign_flip == 2 / 2**3


def test_no_difference_is_no_evidence():
    for b in ([0.3, 0.7, 0.6], [0.1 + 0.2, 0.7, 0.6]):
        test = paired_test([0.3, 0.7, 0.6], b)
        assert (test.mean, test.std, test.ci95, test.t) == (0.0, 0.0, None, None)
        assert (test.p, test.p_sign_flip) == (1.0, 1.0)


def test_a_small_true_spread_is_not_taken_for_rounding():
    test = paired_test([1.0 + 1e-12, 1.0, 1.0 - 1e-12], [0.0, 0.0, 0.0])
    assert test.std == pytest.approx(1e-12, rel=1e-3) and 0 < test.p < 1e-20


@given(st.lists(st.tuples(hundredths, hundredths), min_size=2, max_size=8))
def test_sign_flips_are_counted_exactly(pairs):
    """The reference counts in integers; the test sees a / 100 and b / 100, with their rounding."""
    differences = [a - b for a, b in pairs]
    flipped = itertools.product((1, -1), repeat=len(pairs))
    sums = [abs(sum(s * d for s, d in zip(f, differences, strict=True))) for f in flipped]
    expected = sum(s >= abs(sum(differences)) for s in sums) / len(sums)
    test = paired_test([a / 100 for a, _ in pairs], [b / 100 for _, b in pairs])
    assert test.p_sign_flip == expected


def test_sign_flips_against_scipy_and_up_to_twelve_pairs():
    a, b = np.random.default_rng(1).normal(size=(2, 13))
    for n in (5, 12):
        reference = scipy.stats.permutation_test(
            (a[:n] - b[:n],), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert paired_test(a[:n], b[:n]).p_sign_flip == pytest.approx(reference.pvalue, rel=1e-12)
    test = paired_test(a, b)
    assert test.p is not None and test.p_sign_flip is None


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], "a, b: expected one pair for each seed, got 2 and 1 values"),
        ([], [], "a: expected at least one value"),
        ([1.0], [math.nan], "b: expected finite values, got nan at index 0"),
        ([1e308], [-1e308], "a - b: expected finite values, got inf at index 0"),
    ],
)
def test_paired_test_names_what_it_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_test(a, b)


probabilities = st.sampled_from([0.0, 1e-9, 0.01, 0.01, 0.04, 0.3, 1.0]) | st.floats(0, 1)


@given(st.lists(probabilities | st.none(), max_size=7))
def test_holm_is_the_closure_of_bonferroni(p_values):
    """A test's adjusted p is the largest Bonferroni p of a set of tests that it belongs to."""
    made = [i for i, p in enumerate(p_values) if p is not None]
    subsets = [s for k in range(1, len(made) + 1) for s in itertools.combinations(made, k)]
    adjusted = holm(p_values)
    assert len(adjusted) == len(p_values)
    for i, value in enumerate(adjusted):
        if i not in made:
            assert value is None
            continue
        bounds = [len(s) * min(p_values[j] for j in s) for s in subsets if i in s]
        assert value == min(1.0, max(bounds))


def test_holm_by_hand():
    # 4 * 0.01, 3 * 0.02, 2 * 0.03 and, not to fall, again 0.06
    assert holm([0.03, 0.01, None, 0.05, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])
    assert holm([]) == [] and holm([None]) == [None]


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=rf"p_values: .* got {p} at index 1"):
        holm([None, p])
