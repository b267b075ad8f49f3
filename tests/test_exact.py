"""second_phase="exact": the last layer's minimum, beside LAPACK and scikit-learn, and its gap."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

import twophase_ext as tp
from accelerated_problem import Problem
from helpers import bits, quiet, same_bits, toy_data, toy_mlp
from test_second_phases import AtTau, objective
from twophase_ext.training.steps.least_squares import least_squares
from twophase_ext.training.steps.quasi_newton import QuasiNewton, line_search
from twophase_ext.training.steps.sides import SampleSide

pytestmark = pytest.mark.filterwarnings("ignore:the last hidden layer has")


def fitted(data, loss="cross_entropy", exact=(), model=None, val=None, **settings):
    model, at_tau = model or toy_mlp(), AtTau()
    run = {"epochs": 12, "tau": 2, "precision": "float64", "exact": dict(exact), **settings}
    trainer = quiet(model, loss=loss, second_phase="exact", callbacks=[at_tau], **run)
    return trainer.fit(data, val), at_tau


def random_matrix(n, p, seed=0):
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(n, p, generator=g).double()
    return m * torch.logspace(0, -6, p).double(), torch.randn(n, 3, generator=g).double()


@pytest.mark.parametrize(("n", "p"), [(60, 25), (25, 60), (30, 30)])
@pytest.mark.parametrize("deficient", [False, True])
def test_least_squares_are_lapacks(n, p, deficient):
    m, wish = random_matrix(n, p)
    if deficient:
        m[:, 3], m[5] = m[:, 2], m[4]
    found, correction = least_squares(m, wish)
    known = torch.linalg.lstsq(m, wish, driver="gelsd").solution
    ours, theirs = ((m @ x - wish).square().sum() for x in (found, known))
    assert ours <= theirs * (1 + 1e-10) + 1e-20
    assert found.norm() <= known.norm() * (1 + 1e-6)  # of least norm
    assert correction <= 1e-12


@pytest.mark.parametrize("n", [60, 200])
def test_squared_error_reaches_the_minimum(n):
    x, y = toy_data(n)
    y = F.one_hot(y, 3).double()
    result, start = fitted((x, y), "squared_error")
    m = torch.cat([start.h, torch.ones(n, 1).double()], 1)
    solution = torch.linalg.lstsq(m, y, driver="gelsd").solution
    least = float((m @ solution - y).square().sum()) / n
    assert result.final["train_loss"] <= least + 1e-10
    rows = [row for row in result.history if row["phase"] == 2]
    assert len(rows) == 1 and result.status == "completed"
    found = result.guarantee.constants
    if n == 60:  # rank n: the infimum over all weights is reached
        assert found["floor"] == 0 and found["gap"] <= 1e-10 and "proved" in str(result)
    else:  # the least of this last layer is not that of all weights
        assert found["gap"] == pytest.approx(least, rel=1e-6)
        assert found["estimate"] <= 1e-12 and "is not proved" in str(result)


@pytest.mark.parametrize("n", [60, 200])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_cross_entropy_is_logistic_regression(n, precision):
    x, y = toy_data(n)
    model = toy_mlp()
    model[4] = nn.Linear(80, 3, bias=False)
    l2, h = 1e-3, []

    class Remember:
        def on_perturb(self, run):
            h.append(run.network.hidden(next(run.train.in_order(n))[0]).double())

    run = {"epochs": 12, "tau": 2, "precision": precision, "exact": {"l2": l2, "gap": 1e-8}}
    trainer = quiet(model, second_phase="exact", callbacks=[Remember()], **run)
    result = trainer.fit((x, y))
    weight = model[4].weight.detach().double()
    known = LogisticRegression(C=1 / (l2 * n), fit_intercept=False, tol=1e-10, max_iter=10000)
    known.fit(h[0].numpy(), y.numpy())
    theirs = torch.from_numpy(known.coef_)
    zero = torch.zeros(3).double()
    ours, least = (
        float(objective(w, zero, h[0], y, "cross_entropy", l2)) for w in (weight, theirs)
    )
    assert ours <= least + 1e-8
    found = result.guarantee.constants
    assert max(ours - least, 0) <= found["gap"] <= 1e-8 and "strong convexity" in str(result)
    assert float((weight - theirs).norm()) <= 2e-3 * float(theirs.norm())
    assert len(result.history) < 12


def test_the_proved_gap_is_above_the_true_one():
    """At every stage of the way, against a minimum found ten digits further."""
    data = toy_data(90)
    tight = fitted(data, exact={"l2": 0.01, "gap": 1e-13})[0].guarantee.constants
    least = tight["objective"] - tight["gap"]
    for steps in (1, 2, 3, 5):
        result, _ = fitted(data, exact={"l2": 0.01, "gap": 1e-12, "steps": steps}, epochs=3)
        found = result.guarantee.constants
        assert found["gap"] >= found["objective"] - least - 1e-12
        assert found["gap"] < 1e4 * (found["objective"] - least) + 1e-9


def test_repeated_inputs_have_their_floor():
    x, y = toy_data(60)
    x, y = torch.cat([x, x[:10]]), torch.cat([y, (y[:10] + 1) % 3])
    result, _ = fitted((x, y), exact={"gap": 1e-7}, epochs=6)
    found = result.guarantee.constants
    floor = 20 / 70 * math.log(2)
    assert found["floor"] == pytest.approx(floor, rel=1e-12)
    assert floor < result.final["train_loss"] <= floor + 1e-7 + 1e-12
    assert found["gap"] <= 1e-7


@pytest.mark.parametrize("loss", ["bce", nn.CrossEntropyLoss(label_smoothing=0.1), "huber"])
def test_other_losses(loss):
    x, y = toy_data(60)
    y = y if isinstance(loss, nn.Module) else F.one_hot(y, 3).double()
    result, _ = fitted((x, y), loss, exact={"gap": 1e-5})
    assert result.guarantee.constants["gap"] <= 1e-5
    own = tp.loss_floor(x, y, loss, outputs=3).lower
    assert own <= result.final["train_loss"] <= own + 1.01e-5


def test_a_declared_loss_without_a_floor_has_l2():
    custom = tp.ConvexLoss(lambda q, y: torch.sqrt(1 + (q - y).square()).sum(1).mean(), 1.0)
    x, y = toy_data(60)
    data = (x, F.one_hot(y, 3).double())
    result, _ = fitted(data, custom, exact={"l2": 0.1, "gap": 1e-9})
    assert result.guarantee.constants["gap"] <= 1e-9
    assert any("as declared" in line for line in result.guarantee.assumptions)


def test_resumed_runs_end_with_the_same_bits(tmp_path):
    data = toy_data(60)
    settings = {"epochs": 5, "tau": 1, "second_phase": "exact", "exact": {"steps": 3, "gap": 1e-12}}
    whole = toy_mlp()
    reference = quiet(whole, **settings).fit(data)

    class Stop:
        def on_epoch_end(self, run, record):
            if record["epoch"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(toy_mlp(), tmp_path, callbacks=[Stop()], **settings).fit(data)
    model = toy_mlp(seed=5)
    result = quiet(model, tmp_path, **settings).fit(data, resume=True)
    assert same_bits(bits(whole), bits(model))
    assert result.guarantee.constants == reference.guarantee.constants
    assert result.guarantee.notes == reference.guarantee.notes


def test_early_stopping_keeps_the_best_weights():
    held_out = toy_data(60, seed=9)
    exact = {"steps": 1, "early_stopping": 3, "gap": 1e-12}
    result, _ = fitted(toy_data(60), exact=exact, epochs=40, val=held_out)
    rows = [row for row in result.history if row["phase"] == 2]
    best = min(rows, key=lambda row: row["val_loss"])
    assert rows[-1]["epoch"] == best["epoch"] + 3
    assert result.final["val_loss"] == pytest.approx(best["val_loss"], rel=1e-9)
    assert result.guarantee.constants["objective"] == pytest.approx(best["objective"], rel=1e-9)
    with pytest.raises(ValueError, match="early_stopping: expected validation data"):
        fitted(toy_data(60), exact=exact)


@pytest.mark.parametrize("l2", [0.0, 0.05])
@pytest.mark.parametrize(("n", "m"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("bias", ["moves", "fixed", "none"])
def test_coordinates_are_displacements(n, m, bias, l2):
    """Inner products, images, gradients and H^-1 of them, in dense algebra."""
    problem = Problem(2, "cross_entropy", n=n, m=m, l2=l2, bias=bias)
    side = problem.side(0.1)
    assert isinstance(side, SampleSide) == (n < m)
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randn(side.zeros().shape, generator=g).double() for _ in "uv")
    (du, _), (dv, _) = side.displacement(u), side.displacement(v)
    rows = problem.h if bias != "moves" else torch.cat([problem.h, torch.ones(n, 1).double()], 1)
    image = side.image(v)
    torch.testing.assert_close(image[:n], rows @ dv.T)
    assert side.dot(u, v, image) == pytest.approx(float((du * dv).sum()), rel=1e-10)
    start = side.displacement(side.start_coordinates())[0]
    torch.testing.assert_close(start, problem.start())
    whole = (problem.start() + dv).requires_grad_()
    fixed = problem.layer.bias.detach() if bias == "fixed" else 0.0
    outputs = rows @ whole.T + fixed
    value = F.cross_entropy(outputs, problem.y)
    torch.testing.assert_close(side.outputs_at(image), outputs.detach())
    (gradient,) = torch.autograd.grad(value + l2 / 2 * whole.square().sum(), whole)
    loss, covector = side.covector(outputs.detach(), v)
    assert loss == pytest.approx(float(value.detach()), rel=1e-12)
    assert side.pair(covector, u, side.image(u)) == pytest.approx(float((gradient * du).sum()))
    metric = rows.T @ rows / n + side.damping * torch.eye(side.p).double()
    lifted = side.displacement(side.riesz(covector))[0]
    torch.testing.assert_close(lifted, torch.linalg.solve(metric, gradient.T).T)
    solver = QuasiNewton(side, v)
    assert solver.squared() == pytest.approx(float(gradient.square().sum()), rel=1e-9)
    assert solver.value() == pytest.approx(problem.value(whole.detach()), rel=1e-12)
    assert solver.run(40, lambda *_: False).value < solver.value() + 1e-12


def test_lines_are_searched_to_where_they_are_flat():
    for root, width in ((0.01, 1.0), (0.9, 0.1), (3.0, 1.0), (50.0, 10.0)):
        looks = []

        def look(t, root=root, width=width, looks=looks):
            looks.append(t)
            return math.sqrt(width**2 + (t - root) ** 2), (t - root) / math.hypot(width, t - root)

        value, slope = look(0.0)
        found = line_search(look, value, slope)
        assert abs(look(found)[1]) <= 0.1 * abs(slope) and len(looks) <= 12, (root, width)
    assert line_search(lambda t: (math.nan, math.nan), 1.0, -1.0) == 0
    assert line_search(lambda t: (1 + t, 1.0), 1.0, -1e-17) == 0  # rounding: nothing is lower


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, r"exact: expected gap in \(0, inf\), got 0", {"exact": {"gap": 0}}),
        (ValueError, r"exact: expected l2 in \(0, inf\), got -1", {"exact": {"l2": -1}}),
        (ValueError, "exact: steps: expected at least 1", {"exact": {"steps": 0}}),
        (ValueError, "agd: expected None with second_phase='exact'", {"agd": {}}),
    ],
)
def test_wrong_settings(error, message, settings):
    with pytest.raises(error, match=message):
        quiet(toy_mlp(), **{"second_phase": "exact", **settings})
