"""A loss is tried before it is believed; a bound that the measured loss refutes says so."""

import functools
import json
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import twophase_ext as tp
from helpers import quiet, toy_data, toy_mlp
from twophase.report import write_report
from twophase_ext.model.losses import counterexample
from twophase_ext.theory import comparators as family
from twophase_ext.theory.loss_rounding import rounding_of

BCE = F.binary_cross_entropy_with_logits


def gd(model, loss, folder=False, **settings):
    gd = {"steps": settings.pop("steps", 10)}
    return quiet(model, folder, loss=loss, second_phase="gd", gd=gd, **settings)


@pytest.mark.parametrize(
    ("loss", "smoothness", "message"),
    [
        (nn.BCEWithLogitsLoss(reduction="sum"), 0.25, "expected the mean over samples"),
        (nn.MSELoss(reduction="none"), 2.0, "expected the mean over samples"),
        (functools.partial(BCE, reduction="sum"), 0.25, "expected the mean over samples"),
        (nn.BCEWithLogitsLoss(), 0.001, "L_ell"),
        (BCE, 0.2, "L_ell"),
        (nn.CrossEntropyLoss(), 0.3, "L_ell"),
        (nn.MSELoss(), 1.0, "L_ell"),
        (nn.L1Loss(), 1.0, "L_ell"),
        (nn.PoissonNLLLoss(), 5.0, "L_ell"),
    ],
)
def test_torch_s_losses_are_tried_when_they_are_declared(loss, smoothness, message):
    with pytest.raises(ValueError, match=f"function: .*{message}"):
        tp.ConvexLoss(loss, smoothness)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("loss", "smoothness"),
    [
        (nn.BCEWithLogitsLoss(), 0.25),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0])), 0.5),
        (nn.CrossEntropyLoss(), 0.5),
        (nn.CrossEntropyLoss(label_smoothing=0.1), 0.5),
        (nn.MSELoss(), 2.0),
        (nn.HuberLoss(), 1.0),
        (F.smooth_l1_loss, 1.0),
        (nn.SoftMarginLoss(), 0.25),
        (nn.MultiLabelSoftMarginLoss(), 0.25),
    ],
)
def test_true_declarations_are_taken(loss, smoothness):
    assert tp.ConvexLoss(loss, smoothness).smoothness == smoothness


def test_a_function_of_one_s_own_is_not_called_when_it_is_declared():
    def never(outputs, targets):
        raise AssertionError

    tp.ConvexLoss(never, 1.0)


def weighted(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=torch.tensor([2.0, 1.0, 1.0]))


OWN = {
    "sum": (lambda q, y: F.cross_entropy(q, y, reduction="sum"), 0.5, "mean over samples"),
    "not convex": (lambda q, y: q.cos().mean(), 1.0, "convex"),
    "L": (lambda q, y: 4 * F.cross_entropy(q, y), 0.5, "L_ell"),
    "float32": (weighted, 1.0, "fails on float64 outputs"),
    "divisor": (
        lambda q, y: F.cross_entropy(q, y, weight=q.new_tensor([5.0, 1.0, 1.0])),
        5.0,
        "no weights in the divisor",
    ),
    "raises": (lambda q, y: q.sum(5), 0.5, "fails on outputs"),
    "shape": (lambda q, y: F.cross_entropy(q, y, reduction="none"), 0.5, "0-d tensor"),
}


class Steps:
    def __init__(self):
        self.seen = 0

    def on_epoch_end(self, run, record):
        self.seen += 1


def as_labels(function):
    """The toy data's labels come as a column to a loss of one's own, or as a vector."""
    return lambda q, y: function(q, y.flatten())


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("phase", ["gd", "sgd"])
def test_losses_of_one_s_own_are_tried_before_the_first_step(name, phase):
    function, smoothness, message = OWN[name]
    loss, watch = tp.ConvexLoss(as_labels(function), smoothness, "mine"), Steps()
    model = toy_mlp()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"loss: mine.*{message}"):
        quiet(model, loss=loss, second_phase=phase, callbacks=[watch]).fit(toy_data())
    assert watch.seen == 0
    assert all(map(torch.equal, before, model.parameters()))
    if name not in ("raises", "shape"):
        x, y = toy_data()
        with pytest.raises(ValueError, match=message):
            tp.guarantee((x, y), torch.zeros(3, 5), loss=loss, steps=[3])


def test_without_a_bound_the_audit_says_failed():
    loss = tp.ConvexLoss(as_labels(weighted), 1.0, "mine")
    with pytest.warns(UserWarning, match="fails on float64 outputs"):
        result = quiet(toy_mlp(), loss=loss).fit(toy_data())
    assert result.status == "completed"
    (row,) = (row for row in result.guarantee.premises if row[0] == "convex, smooth loss")
    assert row[1] == "failed" and "float64" in row[2]


def test_a_refuted_bound_is_called_so(tmp_path):
    """The declaration is true near the origin, where it is tried, and not where the run goes."""

    def steep(q, y):
        far = (q.abs() - 30).clamp_min(0)
        return (q.square() / 2 + 2 * far.square()).sum(1).mean()

    loss = tp.ConvexLoss(steep, 1.0, "steep")
    assert counterexample(loss, 1, torch.zeros(4, 1)) == ""
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(4, 40), tp.nn.Softplus(), nn.Linear(40, 1))
    with torch.no_grad():
        model[2].bias += 200
    trainer = gd(
        model, loss, tmp_path / "run", steps=3, optimizer=lambda p: torch.optim.SGD(p, lr=1e-12)
    )
    result = trainer.fit((x, torch.zeros(30, 1)))
    found = result.guarantee
    assert found.refuted and "check that the loss is convex" in found.refuted
    text = str(found)
    assert "REFUTED" in text and "guaranteed" not in text and "L_ell" in text
    assert ("monotone descent", "failed") in [row[:2] for row in found.premises]
    known = json.loads((tmp_path / "run" / "result.json").read_text())["guarantee"]
    assert known["refuted"] == found.refuted
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "REFUTED" in page and "refuted bound" in page
    assert "guaranteed" not in page.lower().replace("not guaranteed", "")


def test_rounding_refutes_nothing():
    x, y = toy_data(30)
    weight = torch.zeros(3, 5)
    point = tp.guarantee((x, y), weight, steps=[0, 4], losses=[math.log(3), 0.5]).curve[1]
    for excess, refuted in ((1e-6, False), (1e-2, True)):
        losses = [math.log(3), point["bound"] + excess]
        found = tp.guarantee((x, y), weight, steps=[0, 4], losses=losses)
        assert bool(found.refuted) == refuted
    settings = {"mode": "sgd", "rates": [0.1] * 4}
    one_run = tp.guarantee((x, y), weight, steps=[0, 4], losses=[1.0, 99.0], **settings)
    assert not one_run.refuted  # a bound of the mean


@pytest.mark.parametrize("scale", [1.0, 1000.0, 1e9])
@pytest.mark.parametrize("shift", [0.0, -1.0, 1.0])
def test_bounds_of_losses_of_both_signs_are_above_them(scale, shift):
    """Squared error over 2 without its constant, minimised at the start: every step stays."""
    loss = tp.ConvexLoss(lambda q, y: (q.square() / 2 - q * y).sum(1).mean() + shift, 1.0)
    h = torch.eye(2).double()
    values = [scale, 3.3 * scale]
    weight = torch.tensor([values]).double()
    y = weight.T.contiguous()
    stored = [Fraction(v) for v in weight[0].tolist()]
    true = -sum(v**2 for v in stored) / 4 + Fraction(shift)
    for point in tp.guarantee((h, y), weight, loss=loss, steps=[0, 1, 1000]).curve:
        assert Fraction(point["bound"]) >= true
        assert point["bound"] <= float(true) + 1e-9 * (1 + abs(float(true)))


EXPANDED = {
    "expanded": (lambda q, y: (q.square() - 2 * q * y + y.square()).sum(1).mean(), 2.0),
    "of means": (
        lambda q, y: (q**2).mean() - 2 * (q * y).mean() + (y**2).mean(),
        2.0,
    ),
    "float32 inside": (lambda q, y: (q.float() - y.float()).square().sum(1).mean(), 2.0),
    "shifted": (lambda q, y: ((q - y).square() + 1e9).sum(1).mean() - 1e9, 2.0),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_a_loss_that_cancels_has_its_rounding_in_the_bound(name):
    loss = tp.ConvexLoss(*EXPANDED[name], name)
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        h = torch.ones(1, 1).double()
        weight = (torch.rand(1, 1, generator=g) * 1e4 + 1e4).double()
        y = weight + torch.rand(1, 1, generator=g).double() * 1e-4
        true = (Fraction(weight.item()) - Fraction(y.item())) ** 2
        value, _, error = rounding_of(loss, weight, y)
        assert abs(Fraction(value) - true) <= Fraction(error)
        objective = family.last_layer_objective(lambda h=h, y=y: [(h, y)], weight, None, loss)
        assert Fraction(objective) >= true
    if name == "expanded":
        found = tp.guarantee((h, y), weight, loss=loss, steps=[0, 1], smoothness=1e9)
        assert all(Fraction(point["bound"]) >= true for point in found.curve)
        assert "as declared" in str(found) and "each of its torch calls" in str(found)


def test_complex_numbers_are_refused_by_name():
    x, y = toy_data(20)
    weight = torch.zeros(3, 5)
    with pytest.raises(TypeError, match="features: expected real features"):
        tp.guarantee((torch.complex(x, x), y), weight, steps=[2])
    with pytest.raises(TypeError, match="weight: expected real"):
        tp.guarantee((x, y), torch.complex(weight, weight), steps=[2])
    aims = torch.randn(20, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"features\[1\]: expected real targets"):
        tp.guarantee((x, aims), weight, loss="squared_error", steps=[2])
    with pytest.raises(TypeError, match="train: expected real targets"):
        quiet(toy_mlp(), loss="squared_error").fit((x, aims))


def test_the_cheaper_side_gives_the_same_comparators():
    """Fewer columns than rows: M^T M; the same least loss as by M M^T."""
    x, y = toy_data(60)
    weight, bias = torch.zeros(3, 5).double(), torch.zeros(3).double()
    steps = [1, 10, 100, 10_000]
    narrow = tp.guarantee((x.double(), y), weight, bias, steps=steps)
    padded = torch.cat([x.double(), torch.zeros(60, 80).double()], 1)  # the same, with more columns
    wide = tp.guarantee((padded, y), torch.zeros(3, 85).double(), bias, steps=steps)
    for a, b in zip(narrow.curve, wide.curve, strict=True):
        assert a["bound"] == pytest.approx(b["bound"], rel=1e-6)
        assert a["comparator"] == b["comparator"]


def test_comparators_cost_what_they_may(monkeypatch):
    calls, own = [], family.last_layer_objective
    monkeypatch.setattr(
        family, "last_layer_objective", lambda *a, **k: (calls.append(1), own(*a, **k))[1]
    )
    x, y = toy_data(60)
    weight, bias = torch.zeros(3, 5), torch.zeros(3)
    bounds = {}
    for passes in (0, 3, 1000, math.inf):
        calls.clear()
        settings = {"candidates": [("last", weight + 0.01, bias)], "passes": passes}
        found = tp.guarantee((x, y), weight, bias, steps=[50], **settings)
        bounds[passes] = found.curve[0]["bound"]
        assert len(calls) <= max(2, passes)
    assert bounds[0] >= bounds[3] >= bounds[1000] == bounds[math.inf]


def test_a_comparator_that_raises_ends_no_run(monkeypatch):
    module = __import__("sys").modules["twophase_ext.training.phases.theorem"]

    def fails(*arguments, **settings):
        raise MemoryError("no room for G")

    monkeypatch.setattr(module, "guarantee", fails)
    result = gd(toy_mlp(), "cross_entropy").fit(toy_data())
    assert result.status == "completed" and result.guarantee.curve == []
    assert "not evaluated: MemoryError: no room for G" in str(result)


def test_noise_on_no_hidden_tensor_is_not_held():
    model = toy_mlp()
    for part in list(model)[:-1]:
        part.requires_grad_(False)
    result = quiet(model).fit(toy_data())
    (row,) = (row for row in result.guarantee.premises if row[0] == "Gaussian noise at tau")
    assert row[1] == "failed" and "no hidden tensor" in row[2] and "4 frozen" in row[2]
    model = toy_mlp()
    model[0].requires_grad_(False)
    result = quiet(model).fit(toy_data())
    (row,) = (row for row in result.guarantee.premises if row[0] == "Gaussian noise at tau")
    assert row[1] == "held" and "2 hidden tensors; 2 frozen: constants" in row[2]


def _weighted(weights):
    return lambda q, y: F.cross_entropy(q, y, weight=torch.tensor(weights).to(q))


LATE = {  # classes, loss: of labels that come in order
    "class weights": (2, _weighted([1.0, 50.0])),
    "one odd weight of many": (300, _weighted([1.0] * 299 + [1.5])),
    "an ignored label": (3, lambda q, y: F.cross_entropy(q, y, ignore_index=2)),
}


@pytest.mark.parametrize("kind", LATE)
@pytest.mark.parametrize("source", ["arrays", "dataset"])
def test_what_shows_at_the_end_of_sorted_labels(kind, source):
    classes, function = LATE[kind]
    x, y = torch.randn(700, 5), (torch.arange(700) * classes) // 700
    loss = tp.ConvexLoss(function, smoothness=60.0)
    model = toy_mlp()
    model[-1] = nn.Linear(model[-1].in_features, classes)
    data = (x, y) if source == "arrays" else Listed(x, y)
    with pytest.raises(ValueError, match=r"loss: .* expected the mean over samples"):
        quiet(model, loss=loss, second_phase="gd").fit(data)
    weight = torch.zeros(classes, 5)
    with pytest.raises(ValueError, match=r"loss: .* expected the mean over samples"):
        tp.guarantee((x, y), weight, torch.zeros(classes), loss=loss, mode="gd", steps=[1])


def test_means_over_any_targets_are_declared():
    x = torch.randn(700, 5)
    for y, function, outputs in (
        (torch.arange(700) // 300, lambda q, y: F.cross_entropy(q, y), 3),
        (torch.randn(700, 4), lambda q, y: (q - y).square().sum(1).mean(), 4),
        (torch.randn(700, 1), lambda q, y: F.huber_loss(q, y), 1),
    ):
        model = toy_mlp()
        model[-1] = nn.Linear(model[-1].in_features, outputs)
        loss = tp.ConvexLoss(function, smoothness=2.0)
        assert quiet(model, loss=loss, second_phase="gd").fit((x, y)).status == "completed"


class Listed(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]
