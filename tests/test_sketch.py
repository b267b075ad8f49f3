"""The sketched metric, where neither side of M fits into memory: its steps, and a bound that holds
however good the sketch is."""

import mpmath
import pytest
import torch

from accelerated_problem import Problem, reference
from helpers import bits, quiet, same_bits, toy_data, toy_mlp
from twophase_ext.theory.accelerated import Point
from twophase_ext.training.phases import metric as phase
from twophase_ext.training.steps import metric
from twophase_ext.training.steps.accelerated import Iterate, weight_of
from twophase_ext.training.steps.sketch import PASSES, SketchSide, planned

SMALL = 100 << 20  # bytes: the panels of a factorization alone take more


def dense(side):
    """H."""
    return side.sketch @ side.sketch.T + side.damping * torch.eye(side.p).double()


def bad(problem, rank=3):
    """A sketch that leaves much more than its mu."""
    side = SketchSide(problem.posed(1e-3), rank, 0)
    side.remainder = 0.0
    side.refactor(1e-3)
    return side


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize(("n", "m"), [(30, 45), (45, 20)])
def test_steps_are_the_method_in_the_sketch(loss, n, m):
    cases = [(0.0, "moves"), (0.05, "moves"), (0.0, "none"), (0.05, "fixed")]
    for i, (l2, bias) in enumerate([*cases, *cases]):
        problem = Problem(3, loss, n=n, m=m, l2=l2, bias=bias, uneven=i >= len(cases))
        side = SketchSide(problem.posed(0.1), 10, 0)
        place = Iterate(side.zeros(), side.zeros())
        for x in reference(problem, side, 8, dense(side)):
            place.advance(side)
            torch.testing.assert_close(
                side.displacement(place.x)[0], x, rtol=0, atol=1e-9 * float(x.abs().max())
            )
        assert place.drift < 1e-6 and place.pull < 1e-8  # nothing was missing along the steps


def test_the_sketch_is_near_and_its_remainder_known():
    problem = Problem(4, "cross_entropy", n=90, m=120)
    m, shift = problem.rows(), 1e-9
    for rank in (8, 20, 40):
        done = []
        side = SketchSide(problem.posed(0.01), rank, 0, done.append)
        assert sum(done) == (PASSES + 1) * 90
        left = torch.linalg.eigvalsh(m.T @ m / 90 - side.sketch @ side.sketch.T)
        assert -shift <= left[0]
        assert 0.7 * float(left[-1]) <= side.remainder <= float(left[-1]) * (1 + 1e-9) + shift
        assert side.damping >= 1.05 * float(left[-1])
    spectrum = torch.linalg.eigvalsh(m.T @ m / 90)
    assert float(left[-1]) <= 3 * float(spectrum[-41])  # little more than the best of rank 40


def test_features_whose_squares_leave_float32_have_their_sketch():
    problem, size = Problem(4, "cross_entropy", n=90, m=60, bias="none"), 1e25
    problem.h = problem.h * size
    m = problem.rows() / size
    side = SketchSide(problem.posed(0.01), 20, 0)
    sketch = side.sketch / size
    left = torch.linalg.eigvalsh(m.T @ m / 90 - sketch @ sketch.T)
    spectrum = torch.linalg.eigvalsh(m.T @ m / 90)
    assert float(left[-1]) <= 3 * float(spectrum[-21]) < 0.1 * float(spectrum[-1])


@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_what_is_missing_is_bounded(l2):
    """Against 50 digits, where D is anywhere within `off` of the step."""
    problem = Problem(5, "cross_entropy", n=8, m=9, l2=l2, uneven=l2 > 0)
    with mpmath.workdps(50):
        for side, sound in ((bad(problem), False), (SketchSide(problem.posed(), 4, 0), True)):
            g = torch.Generator().manual_seed(1)
            m, b = (mpmath.matrix(t.tolist()) for t in (problem.rows(), side.sketch))
            mu = mpmath.mpf(side.damping) - mpmath.mpf(l2) / mpmath.mpf(side.curvature)
            for off in (0.0, 1e-12, 1e-3):
                step = torch.randn(side.zeros().shape, generator=g).double()
                turn = torch.randn(step.shape, generator=g).double()
                d = mpmath.matrix((step + turn * (off / side.size / float(turn.norm()))).tolist())
                squares = [sum(v**2 for v in a) for a in (m * d, b.T * d, d)]
                missing = squares[0] / 8 - squares[1] - mu * squares[2]
                found = side.excess(step, off)
                assert found >= missing and (missing < 0) == sound
                assert off == 1e-3 or found <= max(0, missing * (1 + mpmath.mpf(10) ** -9))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("broken", [False, True])
def test_the_bound_is_above_the_loss_at_every_step(loss, broken):
    for seed in range(8):
        odd, uneven = seed % 2, seed >= 4
        problem = Problem(seed, loss, l2=0.05 * odd, bias=("moves", "fixed")[odd], uneven=uneven)
        side = bad(problem) if broken else SketchSide(problem.posed(0.1), 8, 0)
        start, h = problem.start(), dense(side)
        own = side.outputs.clone()
        wish = problem.aims if loss == "squared_error" else torch.eye(3).double()[problem.aims] * 5
        family = [(problem.value(start), 0.0)]
        for share in (0.1, 0.3, 1.0):
            moved = share * side.displacement(side.towards(wish - own))[0]
            true = float(((moved @ h) * moved).sum())
            square = side.squared_above(moved)
            assert true * (1 - 1e-12) <= square <= true * (1 + 1e-5)
            assert side.squared(moved.T, side.image(moved.T)) == pytest.approx(true, rel=1e-9)
            family.append((problem.value(start + moved), square))
        place = Iterate(side.zeros(), side.zeros())
        for t in range(1, 41):
            place.advance(side)
            value = problem.value(start + side.displacement(place.x)[0])
            if not value < 1e6:  # a metric this wrong may diverge, and its bound with it
                break
            point = Point(t, value, weight_of(t), place.drift, place.pull, 0.0)
            assert value <= min(point.bound(side.curvature, *pair) for pair in family)
        assert (place.drift > 1e-3) == broken


def run(**settings):
    settings = {"epochs": 12, "tau": 2, "second_phase": "agd", **settings}
    return quiet(toy_mlp(), **settings)


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(metric, "available_memory", lambda device: SMALL)


@pytest.mark.parametrize("uneven", [False, True])
def test_runs_with_little_memory_have_their_bound(little, uneven):
    data = toy_data()
    if uneven:
        data = *data, torch.logspace(-2, 1, len(data[0]), dtype=torch.float64)
    result = run(precision="float64").fit(data)
    curve = result.guarantee.curve
    assert all(p["loss"] <= p["bound"] for p in curve) and not result.guarantee.refuted
    assert min(p["bound"] / p["loss"] for p in curve[1:]) < 10
    held = {name: (state, why) for name, state, why in result.guarantee.premises}
    state, why = held["steps H^-1 grad / L_ell, H >= M^T M / n"]
    assert state == "held" and "a sketch of rank 30 + mu I" in why
    exact = run(second_phase="exact", exact={"l2": 0.01}, precision="float64").fit(data)
    assert exact.guarantee.constants["gap"] <= 1e-6


def test_a_resumed_run_has_the_sketch_that_it_began_with(tmp_path, monkeypatch):
    data, whole = toy_data(), toy_mlp()
    settings = {"epochs": 6, "tau": 2, "second_phase": "agd"}

    class Stop:
        def on_epoch_end(self, run, record):
            if record["epoch"] == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metric, "available_memory", lambda device: SMALL)
        reference = quiet(whole, **settings).fit(data)
        for folder in "ab":
            with pytest.raises(KeyboardInterrupt):
                quiet(toy_mlp(), tmp_path / folder, callbacks=[Stop()], **settings).fit(data)
    model = toy_mlp(seed=5)  # there is memory now
    result = quiet(model, tmp_path / "a", **settings).fit(data, resume=True)
    assert same_bits(bits(whole), bits(model))
    assert result.guarantee.curve == reference.guarantee.curve != []
    monkeypatch.setattr(phase, "tensors_hash", lambda tensors: "another")
    with pytest.warns(UserWarning, match="nothing is claimed: the metric's sketch is another"):
        other = quiet(toy_mlp(seed=5), tmp_path / "b", **settings).fit(data, resume=True)
    assert other.status == "completed" and not other.guarantee.curve


def test_the_rank_is_what_fits(monkeypatch):
    cpu = torch.device("cpu")
    for free, expected in ((1 << 50, 0), (4 << 30, 320), (1 << 30, 109)):
        monkeypatch.setattr(metric, "available_memory", lambda device, free=free: free)
        assert planned(60000, 66001, 10, cpu, "agd") == expected, free
    monkeypatch.setattr(metric, "available_memory", lambda device: 256 << 20)
    with pytest.raises(ValueError, match=r"second_phase: 'agd' factors .* 60000 x 66001"):
        planned(60000, 66001, 10, cpu, "agd")
