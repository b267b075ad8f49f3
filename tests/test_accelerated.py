"""Accelerated steps in the metric: the method, what bounds its rounding, the bound of the loss."""

import mpmath
import pytest
import torch
import torch.nn.functional as F

from accelerated_problem import CASES, Problem, Rows, reference
from twophase_ext.theory.accelerated import Point, distance2
from twophase_ext.training.steps.accelerated import Iterate, weight_of
from twophase_ext.training.steps.sides import SampleSide


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize(("n", "m"), [(30, 45), (45, 20)])
def test_steps_are_the_method(loss, n, m):
    for damping, l2, bias in CASES:
        problem = Problem(3, loss, n=n, m=m, l2=l2, bias=bias)
        side = problem.side(damping)
        assert isinstance(side, SampleSide) == (n < m and damping is not None)
        place = Iterate(side.zeros(), side.zeros())
        tolerance = 1e-9 if damping != 0 else 1e-3  # cond(H) times the unit roundoff
        for x in reference(problem, side, 8):
            place.advance(side)
            moved, off = side.displacement(place.x)
            assert off <= 1e-9 * float(moved.norm())
            torch.testing.assert_close(moved, x, rtol=0, atol=tolerance * float(x.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_the_bound_is_above_the_loss_at_every_step(loss, seed, dtype):
    damping = (0.1, 0.01, 0.0, None)[seed % 4]
    bias = ("moves", "none", "fixed")[seed % 3]
    problem = Problem(seed, loss, dtype, l2=0.05 * (seed % 5 == 4), bias=bias)
    side = problem.side(damping)
    start = problem.start()
    blocks = lambda: Rows(problem.h, problem.y).in_order(64)  # noqa: E731
    place, bounds = Iterate(side.zeros(), side.zeros()), []
    comparators = []
    own = problem.layer.double()(problem.h.double()).detach()
    problem.layer.to(dtype)
    for scale in (0.0, 0.5, 1.0, 3.0, 10.0):
        if loss == "cross_entropy":
            wish = scale * (F.one_hot(problem.y, 3).double() - 1 / 3) - own * (scale > 0)
        else:
            wish = (scale / 10) ** 0.5 * (problem.y - own)
        moved, _ = side.displacement(side.towards(wish))
        square = distance2(blocks, moved, side.damping, problem.ones, problem.loss)
        m = torch.cat([problem.h.double(), torch.ones(problem.n, 1).double()], 1)
        outputs = m[:, : moved.shape[1]] @ moved.T
        true = float(outputs.square().sum()) / problem.n + side.damping * float(
            moved.square().sum()
        )
        assert true * (1 - 1e-12) <= square <= true * (1 + 1e-5)
        comparators.append((problem.value(start + moved), square))
    for t in range(1, 41):
        place.advance(side)
        if t > 8 and t % 8:
            continue
        value = problem.value(start + side.displacement(place.x)[0])
        point = Point(t, value, weight_of(t), place.drift, place.pull, 0.0)
        found = [point.bound(side.curvature, *pair) for pair in comparators]
        assert value <= min(found) + 1e-14
        bounds.append(min(found) / value)
        # what rounding adds is small beside the bound
        plain = [
            Point(t, value, weight_of(t), 0, 0, 0).bound(side.curvature, *c) for c in comparators
        ]
        assert min(found) <= min(plain) * 1.01
        assert 1 / (2 * weight_of(t)) <= 2 / (t + 1) ** 2  # the bound as it is known
    assert min(bounds) < 10


def exact_direction(problem, side, at):
    """H^-1 g at the displacement of `at`, and H, in 50 digits."""
    matrix = mpmath.matrix(problem.h.double().tolist())
    n, width = problem.n, problem.h.shape[1]
    m = mpmath.matrix(n, side.p)
    for i in range(n):
        for j in range(side.p):
            m[i, j] = matrix[i, j] if j < width else 1
    h = m.T * m / n + mpmath.mpf(side.damping) * mpmath.eye(side.p)
    if side.factor is None:
        h = mpmath.mpf(side.damping) * mpmath.eye(side.p)
    d = mpmath.matrix(side.p, side.k)
    if isinstance(side, SampleSide):
        d = m.T * mpmath.matrix(at[:-1].tolist())
        for j in range(side.k):
            for i in range(side.p):
                d[i, j] += mpmath.mpf(float(at[-1, j])) * mpmath.mpf(float(side.moving[j, i]))
    else:
        d = mpmath.matrix(at.tolist())
    w = mpmath.matrix(side.moving.T.tolist()) + d
    outputs, delta = m * w, mpmath.matrix(n, side.k)
    for i in range(n):
        row = [
            outputs[i, j]
            + (mpmath.mpf(float(side.fixed[j])) if not side.ones and side.fixed is not None else 0)
            for j in range(side.k)
        ]
        if problem.loss.name == "cross_entropy":
            total = sum(mpmath.e**q for q in row)
            new = [mpmath.e**q / total - (j == int(problem.y[i])) for j, q in enumerate(row)]
        else:
            new = [2 * (q - mpmath.mpf(float(problem.y[i, j]))) for j, q in enumerate(row)]
        for j in range(side.k):
            delta[i, j] = new[j] / n
    g = m.T * delta + mpmath.mpf(problem.l2) * w
    return mpmath.lu_solve(h, g) if side.k == 1 else mpmath.inverse(h) * g, h, m


def h_norm(d, h):
    product = h * d
    return mpmath.sqrt(sum(d[i, j] * product[i, j] for i in range(d.rows) for j in range(d.cols)))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize(("n", "m"), [(5, 8), (7, 4)])
@pytest.mark.parametrize("broken", [False, True])
def test_the_error_of_a_direction_is_bounded(loss, n, m, broken):
    """Against 50 digits; where the factor is wrong, the bound says so."""
    for damping, l2, bias in [*CASES[:4], *CASES[8:10], CASES[13]]:
        if broken and damping is None:
            continue
        problem = Problem(1, loss, n=n, m=m, l2=l2, bias=bias)
        side = problem.side(damping)
        if broken:
            side.factor = side.factor * (1 + 1e-3)
        g = torch.Generator().manual_seed(0)
        at = torch.randn(side.zeros().shape, generator=g).double()
        if isinstance(side, SampleSide) and not l2:
            at[-1] = 0
        slope = side.slope(at)
        found = side.solve(slope.rhs)
        bound = slope.error + side.error(found, slope.rhs)
        with mpmath.workdps(50):
            exact, h, rows = exact_direction(problem, side, at)
            if isinstance(side, SampleSide):
                moved = rows.T * mpmath.matrix(found[:-1].tolist())
                for j in range(side.k):
                    for i in range(side.p):
                        moved[i, j] += mpmath.mpf(float(found[-1, j])) * mpmath.mpf(
                            float(side.moving[j, i])
                        )
            else:
                moved = mpmath.matrix(found.tolist())
            error, size = h_norm(moved - exact, h), h_norm(exact, h)
            coordinates = torch.randn(at.shape, generator=g).double()
        assert error <= bound and size <= slope.size
        if broken:
            assert error >= 1e-6 * size
        elif damping != 0:
            assert bound <= 1e-9 * slope.size
        d, _ = side.displacement(coordinates)
        with mpmath.workdps(50):
            length = h_norm(mpmath.matrix(d.T.tolist()), h)
        assert length <= side.size * float(coordinates.norm())
