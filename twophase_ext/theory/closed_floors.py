"""Infima over the outputs of each group of equal inputs, in closed form, with their rounding.

members: of each group, how many samples; rows of samples stand group by group. Every function
returns (value, error): the sum over the groups is within error of value, for sums in any order,
float64 to nearest and a logarithm within 4 units in the last place.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ..linalg.bounds import UNIT_ROUNDOFF

Array = NDArray[np.float64]
U2 = 2 * UNIT_ROUNDOFF
_TINY = 1e-300  # more than what underflows in one entry
_WIDER = 1 + 1e-9  # the rounding of the bounds themselves


def starts_of(members: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each group begins."""
    return np.concatenate([[0], members.cumsum()[:-1]])


def entropy(t: Array, members: NDArray[np.int64]) -> tuple[float, float]:
    """sum_g sum_c t_gc log(T_g / t_gc), T_g = sum_c t_gc.

    inf_q sum_c t_c (log sum_j e^(q_j) - q_c) is that (Gibbs' inequality): it is T times the entropy
    of t / T, and taken at q_c = log t_c. A group whose t has one entry has the infimum 0, exactly.
    t [groups, c] >= 0: sums over the members, in any order, of numbers within 8 units of exact.
    """
    mixed = (t > 0).sum(1) > 1
    t, members = t[mixed], members[mixed][:, None]
    if not len(t):
        return 0.0, 0.0
    logs = np.zeros_like(t)
    np.log(t.sum(1, keepdims=True) / np.where(t > 0, t, np.inf), out=logs, where=t > 0)
    logs[t <= 0] = 0.0
    value = math.fsum((t * logs).ravel().tolist())
    # of the quotient's relative error, which is an absolute one of its logarithm; of the product
    error = (2 * members + t.shape[1] + 16) * t + (members + 16) * t * np.abs(logs)
    return value, (U2 * float(error.sum()) + t.size * _TINY) * _WIDER


def squares(y: Array, c: Array, members: NDArray[np.int64]) -> tuple[float, float]:
    """sum_g sum_(i in g) c_i ||y_i - mean_g||^2, mean_g the mean weighted by c.

    y [rows, k]; c [rows] >= 0, not all 0 in a group. Shifted by each group's first row, which
    moves nothing: r = y - first has a relative error u, and equal rows have r = 0.
    """
    starts = starts_of(members)
    r = y - np.repeat(y[starts], members, axis=0)
    weight = c[:, None]
    whole = np.add.reduceat(c, starts)[:, None]
    mean = np.add.reduceat(weight * r, starts, axis=0) / whole
    off = r - np.repeat(mean, members, axis=0)
    value = np.add.reduceat(weight * off * off, starts, axis=0)
    size = np.add.reduceat(weight * r * r, starts, axis=0)
    largest = np.maximum.reduceat(np.abs(r), starts, axis=0)
    m = members[:, None]
    by_mean = whole * ((2 * m + 8) * U2 * largest) ** 2  # the mean's own error
    by_shift = 2 * U2 * np.sqrt(value * size) + 4 * U2**2 * size
    error = by_mean + by_shift + (m + 12) * U2 * value
    return math.fsum(value.ravel().tolist()), (float(error.sum()) + y.size * _TINY) * _WIDER


def huber(y: Array, c: Array, members: NDArray[np.int64], delta: float) -> tuple[float, float]:
    """sum_g sum_j min_q sum_(i in g) c_i H(q - y_ij), H the Huber function of width delta.

    The derivative is piecewise linear and grows: its root lies between two breakpoints
    y_i +- delta. For the value at any q, min >= value - |derivative| (max y - min y), by convexity,
    as a minimiser lies among the y.
    """
    values, errors = [], []
    ends = np.cumsum(members)
    for start, end in zip(ends - members, ends, strict=True):
        for column in y[start:end].T:
            value, error = _huber(column - column[0], c[start:end], delta)
            values.append(value)
            errors.append(error)
    return math.fsum(values), (math.fsum(errors) + y.size * _TINY) * _WIDER


def _huber(r: Array, c: Array, delta: float) -> tuple[float, float]:
    if not r.any():
        return 0.0, 0.0
    breaks = np.unique(np.concatenate([r - delta, r + delta, r]))

    def slope(q: float) -> float:
        return float((c * np.clip(q - r, -delta, delta)).sum())

    low, high = 0, len(breaks) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if slope(breaks[middle]) <= 0 else (low, middle)
    below, above = slope(breaks[low]), slope(breaks[high])
    share = min(max(-below / (above - below), 0.0), 1.0) if above > below else 0.0
    q = float(breaks[low] + share * (breaks[high] - breaks[low]))
    off = np.abs(q - r)
    values = c * np.where(off <= delta, off * off / 2, delta * (off - delta / 2))
    value, spread = float(values.sum()), float(r.max() - r.min())
    # a distance off by e moves a term by at most c delta e, a term of the derivative by c e
    place = U2 * (abs(q) + 2 * float(np.abs(r).max()))
    rounding = float((c * delta).sum()) * place + (len(r) + 16) * U2 * value
    steep = float((c * np.minimum(off, delta)).sum())
    tilt = abs(slope(q)) + float(c.sum()) * place + (len(r) + 8) * U2 * steep
    return value, rounding + tilt * spread * _WIDER
