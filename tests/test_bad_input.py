"""Bad input ends in an error that names the argument, before anything is changed."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_data, toy_mlp


def nan_at(index: int):
    x, y = toy_data()
    x[index, 1] = float("nan")
    return x, y


def swapped(y_value: int, index: int):
    x, y = toy_data()
    y[index] = y_value
    return x, y


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


def weighted_loader():
    dataset = TensorDataset(*toy_data())
    return DataLoader(
        dataset, sampler=WeightedRandomSampler(torch.ones(60), 60, False), batch_size=8
    )


DATA = {
    "nan": (lambda: nan_at(17), ValueError, r"train: NaN or infinity in the input of sample 17"),
    "nan in a dataset": (
        lambda: TensorDataset(*nan_at(17)),
        ValueError,
        r"train: NaN or infinity in the input of sample 17 \(1 such",
    ),
    "label too large": (
        lambda: swapped(3, 5),
        ValueError,
        r"train: expected labels in 0..2 \(the last layer has 3 outputs\), got 3 at sample 5",
    ),
    "negative label": (lambda: swapped(-1, 9), ValueError, r"got -1 at sample 9"),
    "float labels": (
        lambda: (toy_data()[0], toy_data()[1] + 0.5),
        TypeError,
        "train: expected integer class labels, got torch.float32",
    ),
    "wrong length": (
        lambda: (toy_data()[0], toy_data()[1][:50]),
        ValueError,
        r"train: expected as many targets as inputs \(60\), got 50",
    ),
    "empty": (
        lambda: (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)),
        ValueError,
        "train: the data set is empty",
    ),
    "scalar": (lambda: (torch.tensor(1.0), torch.tensor(1)), ValueError, "sample dimension"),
    "not data": (
        lambda: "mnist",
        TypeError,
        r"train: expected \(x, y\), \(x, y, weight\), a Dataset or a DataLoader",
    ),
    "strings": (lambda: (["a"], [1]), TypeError, r"train\[0\]: "),
    "stream": (Stream, ValueError, "expected a map-style dataset"),
    "sampler": (
        weighted_loader,
        ValueError,
        "WeightedRandomSampler without replacement cannot be honoured",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, tmp_path):
    make, error, message = DATA[case]
    model = toy_mlp()
    before = bits(model)
    with pytest.raises(error, match=message):
        quiet(model, tmp_path / "run").fit(make())
    if case != "nan in a dataset":  # such samples are only seen when they are fetched
        assert same_bits(before, bits(model))
        assert not (tmp_path / "run").exists()


def test_validation_data_are_checked_before_training():
    model = toy_mlp()
    before = bits(model)
    with pytest.raises(ValueError, match=r"val: expected labels in 0\.\.2"):
        quiet(model).fit(toy_data(), swapped(7, 0))
    assert same_bits(before, bits(model))


def test_squared_error_targets():
    x, y = toy_data()
    with pytest.raises(ValueError, match=r"expected targets of shape \[n, 3\] for squared_error"):
        quiet(toy_mlp(), loss="squared_error").fit((x, y))
    quiet(toy_mlp(classes=1), loss="squared_error").fit((x, x[:, 0]))  # [n] for one output


ARGUMENTS = {
    "tau below 0": ({"tau": -0.1}, ValueError, r"tau: expected a fraction in \(0, 1\), got -0.1"),
    "tau one": ({"tau": 1.0}, ValueError, r"tau: expected a fraction in \(0, 1\)"),
    "tau epoch": ({"tau": 4}, ValueError, r"tau: expected an epoch in 0..3, got 4"),
    "tau nan": ({"tau": float("nan")}, ValueError, "tau: expected"),
    "tau bool": ({"tau": True}, TypeError, "tau: expected"),
    "noise zero": ({"noise_std": 0.0}, ValueError, "noise_std: expected a number > 0"),
    "noise negative": ({"noise_std": {"0.bias": -1.0}}, ValueError, "0.bias"),
    "noise nan": ({"noise_std": float("nan")}, ValueError, "noise_std"),
    "one epoch": ({"epochs": 1}, ValueError, "epochs: expected 2 or more"),
    "epochs float": ({"epochs": 2.5}, TypeError, "epochs: expected an integer"),
    "batch size": ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
    "loss name": ({"loss": "hinge"}, ValueError, "loss: expected one of"),
    "loss undeclared": (
        {"loss": nn.functional.cosine_similarity},
        ValueError,
        "cosine_similarity is not declared convex",
    ),
    "second phase": ({"second_phase": "adam"}, ValueError, "second_phase: expected one of"),
    "batch norm": ({"batch_norm": "eval"}, ValueError, "batch_norm: expected one of"),
    "cache": ({"feature_cache": "tape"}, ValueError, "feature_cache: expected one of"),
    "precision": ({"precision": "float16"}, ValueError, "precision: expected one of"),
    "verify": ({"verify": True}, ValueError, "verify: expected"),
    "checkpoints": ({"checkpoint_every": 0}, ValueError, "checkpoint_every: expected"),
    "optimizer": ({"optimizer": "sgd"}, TypeError, "optimizer: expected a callable"),
    "device": (
        {"device": "cuda:0"},
        ValueError,
        "device: asked for cuda:0, but the model is on cpu",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case):
    settings, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        quiet(toy_mlp(), **settings)


def test_model_on_two_devices():
    model = toy_mlp()
    model[0].to("meta")
    with pytest.raises(ValueError, match="expected all parameters on one device, got cpu, meta"):
        quiet(model)


def test_optimizers_that_cannot_work():
    with pytest.raises(ValueError, match="LBFGS needs a closure"):
        quiet(toy_mlp(), optimizer=torch.optim.LBFGS).fit(toy_data())
    with pytest.raises(ValueError, match=r"optimizer: lacks 0.weight \(5 such parameters\)"):
        quiet(toy_mlp(), optimizer=lambda ps: torch.optim.SGD(ps[-1:], lr=0.1)).fit(toy_data())


def test_last_layer_errors_reach_the_user():
    for last, error, message in (
        ("2x", ValueError, "'2x' is not in the model"),
        ("3", TypeError, "expected an affine layer"),
        ("2", ValueError, "is not the output of '2'"),
    ):
        with pytest.raises(error, match=message):
            quiet(toy_mlp(), last_layer=last).fit(toy_data())
    with pytest.raises(ValueError, match="is there a softmax after it"):
        quiet(nn.Sequential(*toy_mlp(), nn.Softmax(1))).fit(toy_data())
    with pytest.raises(ValueError, match=r"end the model with an nn\.Linear"):
        quiet(nn.Sequential(nn.LayerNorm(toy_mlp()[0].in_features))).fit(toy_data())
    with pytest.raises(TypeError, match=r"lambda p: torch.optim.Adam\(p, 1e-3\), got 'Adam'"):
        quiet(toy_mlp(), optimizer="Adam")


def test_batch_norm_without_statistics():
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8, track_running_stats=False), *toy_mlp(8)
    )
    with pytest.raises(ValueError, match=r"batch_norm: 1 was made with track_running_stats=False"):
        quiet(model).fit(toy_data())


def test_fewer_than_one_sample_per_class_is_fine():
    x, _ = toy_data()
    result = quiet(toy_mlp()).fit((x, torch.zeros(60, dtype=torch.long)))
    assert result.status == "completed"


def test_convex_loss_declaration():
    with pytest.raises(ValueError, match="smoothness: expected a number L_ell > 0"):
        tp.ConvexLoss(nn.functional.cross_entropy, smoothness=0.0)
    with pytest.raises(TypeError, match="function: expected a callable"):
        tp.ConvexLoss("cross_entropy", smoothness=1.0)


def _dense(x):
    return {
        "sparse": x.to_sparse(),
        "rows": x.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "meta": x.to("meta"),
        "eight bits": x.to(torch.float8_e4m3fn),
        "nested": torch.nested.nested_tensor([x[0], x[1]]),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "rows", "quantized", "meta", "eight bits", "nested"])
def test_tensors_that_are_no_arrays_of_numbers(kind):
    x, y = toy_data()
    odd = _dense(x)[kind]
    for call, name in (
        (lambda: tp.verify_expressivity(toy_mlp(), odd), "x"),
        (lambda: tp.ntk_rank(toy_mlp(), odd), "x"),
        (lambda: quiet(toy_mlp()).fit((odd, y)), r"train\[0\]"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor with data, got a"):
            call()


def _verify(model=None, x=None, **arguments):
    return tp.verify_expressivity(
        toy_mlp() if model is None else model, toy_data()[0] if x is None else x, **arguments
    )


VERIFY = {
    "a width that the model has not": (
        {"x": torch.randn(6, 7)},
        ValueError,
        r"^model: it does not run on inputs \[2, 7\] of torch.float32: mat1 and",
    ),
    "no feature dimension": (
        {"x": torch.randn(6)},
        ValueError,
        r"^model: it does not run on inputs \[2\]",
    ),
    "complex": (
        {"x": torch.randn(6, 5, dtype=torch.complex64)},
        ValueError,
        "^model: it does not run on inputs .* torch.complex64",
    ),
    "seed": ({"seed": 1.5}, TypeError, "^seed: expected an integer, got 1.5"),
    "folder": ({"folder": 3}, TypeError, "^folder: expected a path or None, got int"),
    "a file": ({"folder": __file__}, ValueError, "^folder: .* cannot be made"),
    "no outputs": (
        {"model": nn.Sequential(nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 0))},
        ValueError,
        "^last_layer: '2' has no weights",
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("case", VERIFY)
def test_verify_names_what_is_wrong(case):
    arguments, kind, message = VERIFY[case]
    with pytest.raises(kind, match=message):
        _verify(**arguments)


def test_weights_that_share_memory_with_themselves():
    model = toy_mlp()
    last = model[-1]
    last.weight = nn.Parameter(torch.randn(1, last.in_features).expand(last.out_features, -1))
    for call in (lambda: _verify(model), lambda: quiet(model).fit(toy_data())):
        with pytest.raises(ValueError, match=r"share memory \(expand\)"):
            call()


def test_parameters_of_several_types():
    x, y = toy_data()
    model = nn.Sequential(nn.Linear(5, 70, dtype=torch.bfloat16), nn.Softplus(), nn.Linear(70, 3))
    for call in (
        lambda: _verify(model),
        lambda: tp.ntk_rank(model, x),
        lambda: tp.check_assumptions(model, x, loss="cross_entropy"),
        lambda: tp.FeatureCache(model.eval(), (x, y)),
    ):
        with pytest.raises(ValueError, match=r"^model: .* one floating-point type, got"):
            call()
    integers = toy_mlp()
    integers.register_parameter("seen", nn.Parameter(torch.zeros(2, dtype=torch.int64), False))
    assert _verify(integers).status == _verify(toy_mlp()).status
