"""Print the polynomial coefficients of csrc/math (needs mpmath): python csrc/math/fit.py.

Interpolation at Chebyshev nodes in 60-digit arithmetic, within a small factor of the minimax
polynomial; the printed error is the largest relative error of the unrounded polynomial on a grid.
"""

import mpmath as mp

mp.mp.dps = 60


def fit(function, low, high, degree):
    """Coefficients, constant first, of the interpolant of `function` on [low, high]."""
    low, high = mp.mpf(low), mp.mpf(high)
    nodes = [
        (low + high) / 2 + (high - low) / 2 * mp.cos(mp.pi * (2 * k + 1) / (2 * degree + 2))
        for k in range(degree + 1)
    ]
    matrix = mp.matrix(degree + 1, degree + 1)
    for row, node in enumerate(nodes):
        for column in range(degree + 1):
            matrix[row, column] = node**column
    coefficients = list(mp.lu_solve(matrix, mp.matrix([function(node) for node in nodes])))
    grid = [low + (high - low) * k / 997 for k in range(998)]
    error = max(abs(mp.polyval(coefficients[::-1], t) / function(t) - 1) for t in grid)
    return coefficients, error


def show(name, digits, result):
    """Print one C array."""
    coefficients, error = result
    print(f"// {name}: relative error {mp.nstr(error, 3)}")
    for value in coefficients:
        print(f"    {mp.nstr(value, digits, min_fixed=0, max_fixed=0)},")


def log1p_over_t(t):
    """log(1 + t) / t, continued to 1 at 0."""
    return mp.log1p(t) / t if t else mp.mpf(1)


def atanh_tail(z):
    """(atanh(sqrt z) / sqrt z - 1) / z, continued to 1/3 at 0."""
    s = mp.sqrt(z)
    return (mp.atanh(s) / s - 1) / z if z > mp.mpf(10) ** -30 else mp.mpf(1) / 3


def exp2m1_over_f(f):
    """(2^f - 1) / f, continued to ln 2 at 0."""
    return mp.expm1(f * mp.log(2)) / f if f else mp.log(2)


def exp2(f):
    """2^f."""
    return mp.power(2, f)


def log_tail(f):
    """(f - log(1 + f)) / f^2, continued to 1/2 at 0."""
    return (f - mp.log1p(f)) / f**2 if abs(f) > mp.mpf(10) ** -20 else mp.mpf(1) / 2


def sine_of_turns(z):
    """sin(2 pi r) / r, r = sqrt z, continued to 2 pi at 0."""
    r = mp.sqrt(z)
    return mp.sin(2 * mp.pi * r) / r if z else 2 * mp.pi


def cosine_of_turns_tail(z):
    """(cos(2 pi r) - 1) / z, r = sqrt z, continued to -2 pi^2 at 0."""
    return -2 * mp.sin(mp.pi * mp.sqrt(z)) ** 2 / z if z else -2 * mp.pi**2


if __name__ == "__main__":
    half = mp.mpf("0.50005")
    show("float 2^f on [-1/2, 1/2]", 10, fit(exp2, -half, half, 5))
    show("float (2^f - 1)/f", 10, fit(exp2m1_over_f, -half, half, 5))
    show("float log1p(t)/t on [0, 1]", 10, fit(log1p_over_t, 0, 1, 8))
    show("double 2^f", 19, fit(exp2, -half, half, 11))
    show("double (2^f - 1)/f", 19, fit(exp2m1_over_f, -half, half, 11))
    ninth = mp.mpf(1) / 9
    show("double (atanh(s)/s - 1)/z, z = s^2 in [0, 1/9]", 19, fit(atanh_tail, 0, ninth, 10))
    root = mp.sqrt(2)
    show("float (f - log(1 + f))/f^2", 10, fit(log_tail, 1 / root - 1, root - 1, 7))
    show("float sin(2 pi r)/r, z = r^2 in [0, 1/64]", 10, fit(sine_of_turns, 0, mp.mpf(1) / 64, 3))
    show("float (cos(2 pi r) - 1)/z", 10, fit(cosine_of_turns_tail, 0, mp.mpf(1) / 64, 3))
