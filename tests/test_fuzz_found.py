"""What fuzzing has found, each kind once: refused, by name, before anything has changed."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import twophase_ext as tp
from fuzz import files
from twophase import data
from twophase_ext import ops
from twophase_ext.linalg.journal import Journal

HUGE = 10**400
NEGATED = torch._neg_view(torch.ones(3, 4))


def overlapping(rows: int = 3, columns: int = 4) -> torch.Tensor:
    """Neither stride is 0, and yet element [0, 1] is element [1, 0]."""
    return torch.ones(rows + columns).as_strided((rows, columns), (1, 1))


def step(function=ops.last_layer_step_, **changed):
    given = {
        "weight": torch.zeros(3, 4),
        "bias": torch.zeros(3),
        "weight_buffer": torch.zeros(3, 4),
        "bias_buffer": torch.zeros(3),
        "h": torch.ones(5, 4),
        "target": torch.zeros(5, dtype=torch.long),
        "order": torch.arange(5),
        "lr": 0.1,
        "momentum": 0.9,
        "batch_size": 2,
        **changed,
    }
    if function is ops.last_layer_step_:
        del given["order"], given["batch_size"]
    return function(**given)


MEMORY = {
    "softplus_": lambda x: tp.softplus_(x),
    "perturb_": lambda x: tp.perturb_({"x": x}, 0.1, seed=1),
    "sgd_": lambda x: ops.sgd_([x], [torch.ones(3, 4)], [None], lr=0.1),
    "sgd_, buffer": lambda x: ops.sgd_(
        *([torch.ones(3, 4)], [torch.ones(3, 4)], [x]), lr=0.1, momentum=0.9
    ),
    "step": lambda x: step(weight_buffer=x),
    "epoch": lambda x: step(ops.last_layer_epoch_, weight=x),
}


@pytest.mark.parametrize("name", MEMORY)
def test_elements_that_share_memory(name):
    x = overlapping()
    with pytest.raises(ValueError, match=r"memory of its own|contiguous"):
        MEMORY[name](x)
    assert torch.equal(x, overlapping())


@pytest.mark.parametrize("name", MEMORY)
def test_negated_views(name):
    with pytest.raises(ValueError, match="expected a tensor that can be written, got a negated"):
        MEMORY[name](NEGATED)
    assert torch.equal(NEGATED, -torch.ones(3, 4))


def test_arguments_in_one_memory():
    flat = torch.ones(30)
    with pytest.raises(ValueError, match=r"tensors\[1\]: expected memory of its own"):
        tp.perturb_({"a": flat[:4], "b": flat[3:]}, 0.1, seed=1)
    with pytest.raises(ValueError, match=r"params\[1\]: expected memory of its own"):
        ops.sgd_([flat, flat], [torch.ones(30)] * 2, [None, None], lr=0.1)
    with pytest.raises(ValueError, match=r"grads\[0\]: expected memory of its own"):
        ops.sgd_([flat[:4]], [flat[2:6]], [None], lr=0.1)
    weight = flat[:12].view(3, 4)
    for given in ({"weight_buffer": weight}, {"h": flat[10:30].view(5, 4)}, {"bias": flat[:3]}):
        with pytest.raises(ValueError, match="expected memory of its own"):
            step(weight=weight, **given)
    assert torch.equal(flat, torch.ones(30))


def test_views_that_are_interleaved_share_nothing():
    """Even and odd columns, rows with gaps: spans of memory meet, elements do not."""
    both = torch.zeros(6, 8)
    tp.perturb_({"a": both[:, ::2], "b": both[:, 1::2]}, 1.0, seed=1)
    apart = {"a": torch.zeros(6, 4), "b": torch.zeros(6, 4)}
    tp.perturb_(apart, 1.0, seed=1)
    assert torch.equal(both[:, ::2], apart["a"]) and torch.equal(both[:, 1::2], apart["b"])
    x = torch.zeros(8).as_strided((2, 3), (3, 2))  # 0 2 4, 3 5 7: apart, though strides interlock
    assert bool((tp.softplus_(x) > 0).all())
    with pytest.raises(ValueError, match="memory of its own"):  # 0 2 4 6, 3 5 7 9, 6 ...
        tp.softplus_(torch.zeros(16).as_strided((3, 4), (3, 2)))
    assert tp.softplus_(torch.zeros(1, 0).expand(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("function", [ops.last_layer_step_, ops.last_layer_epoch_])
@pytest.mark.parametrize("name", ["bias", "weight_buffer", "h", "target"])
def test_meta_tensors_beside_real_ones(function, name):
    """torch ran the fake kernel for them: uninitialised losses, and no update."""
    shapes = {"bias": (3,), "weight_buffer": (3, 4), "h": (5, 4), "target": (5,)}
    dtype = torch.long if name == "target" else torch.float32
    meta = torch.zeros(shapes[name], dtype=dtype, device="meta")
    with pytest.raises(ValueError, match=f"{name}: expected the device of weight, cpu, got meta"):
        step(function, **{name: meta})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"bias": 3}, TypeError),
        ({"target": None}, TypeError),
        ({"h": np.ones((5, 4), np.float32)}, TypeError),
        ({"lr": HUGE}, ValueError),
        ({"momentum": "a"}, TypeError),
        ({"loss": []}, ValueError),
        ({"order": [0]}, TypeError),
        ({"order": torch.zeros(5, dtype=torch.long, device="meta")}, ValueError),
        ({"order": torch.tensor(0)}, ValueError),
        ({"batch_size": 2.0}, TypeError),
    ],
)
def test_wrong_types_are_named(given, error):
    with pytest.raises(error, match=f"^{next(iter(given))}: expected"):
        step(ops.last_layer_epoch_, **given)


def test_a_refused_sgd_step_changes_nothing():
    p = torch.ones(3)
    with pytest.raises(TypeError, match="momentum_buffers: expected a list"):
        ops.sgd_([p], [torch.ones(3)], (None,), lr=0.1, momentum=0.9)
    assert torch.equal(p, torch.ones(3))
    for name, given in {"grads": ([p], 3, [None]), "params": (3, [p], [None])}.items():
        with pytest.raises(TypeError, match=f"{name}: expected a list"):
            ops.sgd_(*given, lr=0.1)


def test_updates_are_seen_by_autograd():
    weight = torch.zeros(3, 4)
    step(weight=weight)
    step(ops.last_layer_epoch_, weight=weight)
    assert weight._version == 2


def test_numbers_beyond_float64():
    for call, name in (
        (lambda: tp.perturb_({"a": torch.ones(2)}, HUGE, seed=1), "std of a"),
        (lambda: tp.nn.wide_units(5, HUGE), "ratio"),
        (lambda: tp.nn.Softplus(HUGE), "beta"),
        (lambda: tp.GradientDescent(l2=HUGE), "gd"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()


def test_append_ones_counts_as_one_column():
    for value in (2, "a", None):  # 2 was one column in one place and two in another
        with pytest.raises(TypeError, match="append_ones: expected a bool"):
            tp.gram_logdet(torch.rand(300, 299), value)


def test_no_bound_from_weights_that_are_not_finite():
    h, y = torch.ones(2, 3), torch.tensor([0, 1])
    for name in ("weight", "bias"):
        given = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
        given[name] = given[name] * float("nan")
        with pytest.raises(ValueError, match=f"{name}: expected finite numbers"):
            tp.guarantee((h, y), **given, steps=[1])
    with pytest.raises(ValueError, match="features: 2 rows do not fit 3 targets"):
        tp.guarantee((h, torch.tensor([0, 1, 0])), torch.zeros(2, 3), steps=[1])


def test_no_model():
    x, y = torch.ones(2, 2), torch.tensor([0, 1])
    for call in (
        lambda: tp.verify_expressivity(None, x),
        lambda: tp.ntk_rank(None, x),
        lambda: tp.check_assumptions(None, x),
        lambda: tp.nn.widen(None, 3),
        lambda: tp.freeze(None, train=(x, y)),
    ):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got NoneType"):
            call()


def test_data_without_numbers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), tp.nn.Softplus(), torch.nn.Linear(4, 2))
    x, y = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    for given, part in (((x.to("meta"), y), 0), ((x, y.to("meta")), 1)):
        message = rf"train\[{part}\]: expected a dense tensor with data, got a meta tensor"
        with pytest.raises(TypeError, match=message):
            tp.Trainer(model, run_dir=False, progress=False).fit(given)


# ---- files


def test_a_flipped_number_of_a_feature_file_is_noticed():
    """torch.load passes over the archive's checksums, and a proof is made of these numbers."""
    kept, _ = files.original("features")
    content = (kept / "features0.pt").read_bytes()
    number = torch.load(kept / "features0.pt", weights_only=True)["z"].numpy().tobytes()[:8]
    at = content.index(number)
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    files.read_damaged("features", flipped)
    with pytest.raises(ValueError, match="has been changed since it was written"):
        files.READERS["features"].read(_with(kept, "features0.pt", flipped))


def _with(kept, name, content):
    folder = kept.parent / "changed"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def test_a_changed_digit_of_a_journal_is_noticed(tmp_path):
    header = {"version": 2, "key": "k"}
    path = tmp_path / "tiles.journal"
    journal = Journal(path, header, resume=True)
    journal.add("exponents", [1, 2])
    journal.add("shift L1", 0.5)
    journal.close()
    path.write_text(path.read_text().replace("[1, 2]", "[1, 3]"))
    journal = Journal(path, header, resume=True)
    journal.close()
    assert journal.records == [["header", header]]  # that line and what follows is done again
    for foreign in (
        "a diary\n",
        "a diary without an end",
        "[]\n",
        json.dumps(["header", {}]) + "\n",
    ):
        path.write_text(foreign)
        with pytest.raises(ValueError, match=r"tiles\.journal is damaged or no journal"):
            Journal(path, header, resume=True)
        assert path.read_text() == foreign


@pytest.mark.parametrize("text", ["[" * 3000, "9" * 5000, '{"a":' * 3000])
def test_json_that_python_gives_up_on(text, tmp_path):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(ValueError, match=r"v\.json is not a verdict file"):
        tp.Verdict.load(tmp_path / "v.json")


def test_a_verdict_with_the_wrong_types(tmp_path):
    model = nn.Sequential(nn.Linear(2, 6), tp.nn.Softplus(), nn.Linear(6, 2))
    verdict = tp.verify_expressivity(model, torch.randn(4, 2))
    for name, value in {"n": "4", "culprits": None, "hashes": [], "sigma_min_lower": "1"}.items():
        changed = copy.copy(verdict)
        setattr(changed, name, value)
        changed.save(tmp_path / "v.json")
        with pytest.raises(ValueError, match=f"v.json is not a verdict file: {name} is of type"):
            tp.Verdict.load(tmp_path / "v.json")


def test_labels_of_an_npz_that_are_no_integers(tmp_path):
    (tmp_path / "cifar10").mkdir()
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "cifar10" / "c.npz", x_test=images, y_test=np.array(["a", "b"]))
    with pytest.raises(ValueError, match=r"c\.npz: expected uint8 images .* integer labels"):
        data.load("cifar10", "test", tmp_path, download=False)
