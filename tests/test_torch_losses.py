"""torch's losses by their own names: values, targets, and constants L_ell."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import quiet, toy_data, toy_mlp
from twophase_ext.model.losses import (
    CROSS_ENTROPY,
    SQUARED_ERROR,
    counterexample,
    prepare_targets,
    resolve_loss,
)

K = 3
W = torch.tensor([2.0, 0.5, 3.0])


def labels(n, seed=0):
    return torch.randint(K, (n,), generator=torch.Generator().manual_seed(seed))


def ignoring(n):
    y = labels(n)
    y[::3] = -100
    return y


def soft(n):
    return torch.rand(n, K, generator=torch.Generator().manual_seed(1)).double().softmax(1)


def bits(n):
    return torch.randint(2, (n, K), generator=torch.Generator().manual_seed(2)).double()


def reals(n):
    return torch.randn(n, K, generator=torch.Generator().manual_seed(3)).double() * 3


CASES = {
    "cross-entropy": (nn.CrossEntropyLoss(), labels),
    "weights": (nn.CrossEntropyLoss(W), labels),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), labels),
    "weights, smoothed": (nn.CrossEntropyLoss(W, label_smoothing=0.2), labels),
    "ignored": (nn.CrossEntropyLoss(), ignoring),
    "weights, smoothed, ignored": (nn.CrossEntropyLoss(W, label_smoothing=0.3), ignoring),
    "another label ignored": (nn.CrossEntropyLoss(ignore_index=1), labels),
    "a class of weight 0": (nn.CrossEntropyLoss(W * torch.tensor([0.0, 1, 1])), labels),
    "probabilities": (nn.CrossEntropyLoss(), soft),
    "probabilities, weights, smoothed": (nn.CrossEntropyLoss(W, label_smoothing=0.2), soft),
    "mse": (nn.MSELoss(), reals),
    "bce": (nn.BCEWithLogitsLoss(), bits),
    "bce, weights": (nn.BCEWithLogitsLoss(W, pos_weight=torch.tensor([3.0, 0.1, 1.0])), bits),
    "bce, one weight": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(4.0)), soft),
    "huber": (nn.HuberLoss(delta=0.7), reals),
    "smooth l1": (nn.SmoothL1Loss(beta=0.3), reals),
    "soft margin": (nn.SoftMarginLoss(), lambda n: 2 * bits(n) - 1),
    "multi-label": (nn.MultiLabelSoftMarginLoss(W), bits),
}


def prepared(case, n):
    module, make = CASES[case]
    loss = resolve_loss(module)
    return module, loss, prepare_targets(loss, make(n), K, "y")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_value_is_torch_s_to_the_bit(case, dtype):
    module, loss, y = prepared(case, 40)
    q = torch.randn(40, K, generator=torch.Generator().manual_seed(4)).to(dtype)
    y = y.to(dtype) if y.is_floating_point() else y
    truth = module.to(dtype)(q, y)
    module.float()
    assert torch.equal(loss(q, y), truth)


@pytest.mark.parametrize("case", CASES)
def test_over_a_data_set_it_is_torch_s_value_and_a_mean_over_samples(case):
    module, loss, y = prepared(case, 41)
    q = torch.randn(41, K, generator=torch.Generator().manual_seed(4)).double() * 2
    over = loss.over(y, K)
    truth = module.double()(q, y)
    module.float()
    assert float(over(q, y)) == pytest.approx(float(truth), rel=1e-14)
    parts = [float(over(q[a:b], y[a:b])) * (b - a) for a, b in ((0, 1), (1, 20), (20, 41))]
    assert math.fsum(parts) / 41 == pytest.approx(float(truth), rel=1e-13)
    again = over.over(y, K)
    assert again.smoothness == over.smoothness and float(again(q, y)) == float(over(q, y))
    assert counterexample(over, K, y) == ""  # a mean, convex, and no steeper than L_ell


@pytest.mark.parametrize("case", CASES)
def test_the_constant_is_reached_and_not_exceeded(case):
    """The Hessian of one sample's function at the point where it bends most."""
    _, loss, y = prepared(case, 60)
    over = loss.over(y, K)
    largest = 0.0
    for i in range(60):
        # ties of two outputs far above the rest; residual 0 (a Huber loss bends only there)
        points = [torch.zeros(K), *(torch.eye(K)[[a, b]].sum(0) * 40 for a in (0, 1) for b in (2,))]
        aim = y[i].double() if y.dim() > 1 else torch.zeros(K).double()
        for q in [*(p.double() for p in points), aim]:
            hessian = torch.autograd.functional.hessian(
                lambda q, i=i: over(q[None], y[i : i + 1]), q
            )
            largest = max(largest, float(torch.linalg.eigvalsh(hessian).max()))
    assert largest <= over.smoothness
    assert over.smoothness <= 1.01 * largest or "soft" in case or "0" in case


SPELLINGS = {
    "mse": [nn.MSELoss(), F.mse_loss, "mse"],
    "bce_with_logits": [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits, "bce"],
    "huber": [nn.HuberLoss(), F.huber_loss, "huber"],
    "smooth_l1(beta=0.5)": [
        nn.SmoothL1Loss(beta=0.5),
        functools.partial(F.smooth_l1_loss, beta=0.5),
        functools.partial(functools.partial(F.smooth_l1_loss, beta=2.0), beta=0.5),
    ],
    "soft_margin": [nn.SoftMarginLoss(), F.soft_margin_loss, "soft_margin"],
    "multilabel_soft_margin": [nn.MultiLabelSoftMarginLoss(), F.multilabel_soft_margin_loss],
    "cross_entropy(weight=[2, 0.5, 3], label_smoothing=0.1)": [
        nn.CrossEntropyLoss(W, label_smoothing=0.1),
        functools.partial(F.cross_entropy, weight=W, label_smoothing=0.1, reduction="mean"),
    ],
    "squared_error": ["squared_error"],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_module_function_and_name_are_one_loss(name):
    found = [resolve_loss(given) for given in SPELLINGS[name]]
    assert [loss.name for loss in found] == [name] * len(found)
    assert len({loss.smoothness for loss in found}) == 1
    for plain in (nn.CrossEntropyLoss(), F.cross_entropy, "cross_entropy"):
        assert resolve_loss(plain) is CROSS_ENTROPY  # which has kernels
    assert resolve_loss("squared_error") is SQUARED_ERROR


def _hooked():
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda *a: None)
    return loss


class _Mine(nn.MSELoss):
    def forward(self, q, y):
        return -super().forward(q, y)


REFUSED = {
    "sum": (nn.MSELoss(reduction="sum"), "expected reduction='mean' of MSELoss, got 'sum'"),
    "partial sum": (
        functools.partial(F.cross_entropy, reduction="none"),
        "expected reduction='mean' of cross_entropy, got 'none'",
    ),
    "Gaussian": (nn.GaussianNLLLoss(), "GaussianNLLLoss is refused: it is not convex in mean and"),
    "Gaussian function": (F.gaussian_nll_loss, "GaussianNLLLoss is refused"),
    "Poisson": (nn.PoissonNLLLoss(), "PoissonNLLLoss is refused: its gradient .* not Lipschitz"),
    "L1": (nn.L1Loss(), "L1Loss is refused: it is not differentiable everywhere"),
    "NLL": (nn.NLLLoss(), "NLLLoss is refused: it takes log-probabilities"),
    "BCE": (nn.BCELoss(), "BCELoss is refused: .* use nn.BCEWithLogitsLoss"),
    "no width": (nn.SmoothL1Loss(beta=0.0), r"expected beta > 0 \(at 0 it has a kink\)"),
    "negative": (nn.CrossEntropyLoss(torch.tensor([1.0, -1.0])), "expected weight >= 0"),
    "batch weights": (functools.partial(F.mse_loss, weight=W), "weight of mse_loss: expected"),
    "hooked": (_hooked(), "not declared convex"),
    "subclass": (_Mine(), "not declared convex"),
    "name": ("l2", "expected one of .*'bce'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(case):
    loss, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"loss: .*{message}"):
        tp.Trainer(toy_mlp(), loss=loss)


TARGETS = {
    "probabilities below 0": ("cross_entropy", -soft(4), "expected probabilities"),
    "bits beyond 1": ("bce", bits(4) + 1, "expected targets 0 to 1 for bce_with_logits, got 2"),
    "signs": ("soft_margin", bits(4), "expected targets 1 or -1"),
    "shape": ("mse", reals(4)[:, :2], r"expected targets of shape \[n, 3\] for mse, got \[4, 2\]"),
    "weights": (nn.CrossEntropyLoss(torch.ones(2)), labels(4), "a weight for each of 3 outputs"),
    "bce weights": (nn.BCEWithLogitsLoss(torch.ones(2)), bits(4), "a weight for each of 3"),
    "all ignored": ("cross_entropy", torch.full((4,), -100), "expected a sample that counts"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_do_not_fit_are_refused_by_name(case):
    given, y, message = TARGETS[case]
    loss = resolve_loss(given)
    with pytest.raises(ValueError, match=message):
        loss.over(prepare_targets(loss, y, K, "y"), K)


def test_labels_as_files_have_them():
    for y in (labels(9).double(), labels(9).float()[:, None], labels(9).to(torch.uint8)):
        assert torch.equal(prepare_targets(CROSS_ENTROPY, y, K, "y"), labels(9))
    with pytest.raises(TypeError, match=r"y: expected integer class labels, got torch\.float32"):
        prepare_targets(CROSS_ENTROPY, labels(9).float() + 0.5, K, "y")


@pytest.mark.parametrize("case", ["weights", "weights, smoothed, ignored", "probabilities", "mse"])
@pytest.mark.parametrize("phase", ["base", "gd", "sgd"])
def test_a_run_measures_and_bounds_torch_s_value(case, phase):
    module, make = CASES[case]
    x, _ = toy_data(60)
    y = make(60)
    y = y.float() if y.is_floating_point() else y
    model = toy_mlp()
    settings = {"gd": {"steps": 30}} if phase == "gd" else {}
    trainer = quiet(model, loss=module, second_phase=phase, **settings)
    result = trainer.fit((x, y), (x[:7], y[:7]))
    with torch.no_grad():
        for part, name in ((slice(0, 60), "train"), (slice(0, 7), "val")):
            truth = float(module(model(x[part]), y[part]))
            assert result.final[f"{name}_loss"] == pytest.approx(truth, rel=2e-5)
    held = {name: status for name, status, _ in result.guarantee.premises}
    assert held["convex, smooth loss"] == "held"
    assert (result.final["train_accuracy"] is None) == (case != "weights")
    if phase == "gd":
        assert not result.guarantee.refuted and held["monotone descent"] != "failed"
        assert all(point["bound"] >= point["loss"] for point in result.guarantee.curve)


def test_the_bound_takes_the_loss_over_its_data():
    x, y = toy_data(30)
    weight = torch.zeros(K, 5)
    module = nn.CrossEntropyLoss(W)
    found = tp.guarantee((x, y), weight, loss=module, steps=[0, 5])
    truth = float(module.double()(torch.zeros(30, K).double(), y))
    module.float()
    assert found.curve[0]["bound"] == pytest.approx(truth, rel=1e-9)
    assert "as declared" not in str(found)
