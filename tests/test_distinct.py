"""Repeated inputs: the condition, its proofs and the theorem are about the distinct ones."""

import dataclasses
import json
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import quiet, toy_data, toy_mlp
from twophase_ext.expressivity import agreement
from twophase_ext.training.persistence import checkpoint

VERDICTS = Path(__file__).parent / "verdicts"


def iris() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_iris

    return load_iris(return_X_y=True)


def matrix(model: nn.Sequential, x: torch.Tensor) -> np.ndarray:
    """[h, 1] in float64."""
    with torch.no_grad():
        h = model.double()[:-1](x.double())
    return np.column_stack([h, np.ones(len(h))])


def test_iris_from_doctor_to_a_guarantee(tmp_path):
    """Samples 101 and 142 are one flower."""
    x, y = iris()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), tp.nn.Softplus(1.0), nn.Linear(32, 3)).double()
    tp.nn.widen(model, x)
    head = model[2]
    assert head.wide.out_features == tp.nn.wide_units(149) == 164
    table = tp.check_assumptions(model, x)
    assert table.hold and "N = 149 of n = 150: 1 group of equal ones, first [101, 142]" in str(
        " ".join(str(table).split())
    )
    for settings in ({}, {"w": "witness"}, {"w": "witness", "method": "certificate"}):
        verdict = tp.verify_expressivity(model, x, **settings)
        assert (verdict.status, verdict.n, verdict.distinct) == ("proved", 150, 149)
        assert verdict.repeated == [[101, 142]] and verdict.disagreeing is None
        verdict.save(tmp_path / "v.json")
        assert json.loads((tmp_path / "v.json").read_text())["schema"] == "twophase-verdict/2"
        read = tp.Verdict.load(tmp_path / "v.json")
        said = []
        assert read == verdict and read.recheck(model, x, say=said.append), said
        assert not read.recheck(model, x[:149], say=said.append)
    result = quiet(
        model, verify="auto", second_phase="gd", epochs=4, tau=2, precision="float64"
    ).fit((x, y))
    found = result.guarantee
    assert [name for name, status, _ in found.premises if status == "failed"] == []
    assert found.curve and not found.refuted and "guaranteed at every step" in str(result)
    assert all(p["loss"] <= p["bound"] for p in found.curve)
    assert (result.verdict.distinct, result.verdict.disagreeing) == (149, 0)
    assert "1 group of repeated inputs, 0 with targets that disagree" in str(result)
    width = {name: (status, why) for name, status, why in found.premises}["m_H >= N - 1"]
    assert width == ("held", "m_H = 164, n = 150, N = 149 distinct inputs")


def test_equal_inputs_alone_are_one():
    x, y = toy_data(1)
    x, y = x.repeat(6, 1), torch.tensor([0, 1, 1, 2, 2, 2])
    for model in (toy_mlp(width=1), toy_mlp(width=4)):
        for method in ("separation", "certificate", "svd"):
            verdict = tp.verify_expressivity(model, x, method=method)
            assert verdict.status == ("full rank" if method == "svd" else "proved")
            assert verdict.distinct == 1 and verdict.repeated == [list(range(6))]
            assert verdict.rank in (None, 1)
        result = quiet(model, verify="auto", second_phase="gd").fit((x, y))
        assert all(status != "failed" for _, status, _ in result.guarantee.premises)
        assert result.guarantee.curve and result.verdict.disagreeing == 1


def test_numbers_are_those_of_the_distinct_inputs():
    """Singular values, their bounds and the log det, against NumPy on one row for each input."""
    x = toy_data(24)[0].double()
    again = torch.tensor([0, 5, 5, 11, 23, 2])
    place = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    many = torch.cat([x, x[again]])[place]
    model = toy_mlp(width=40, dtype=torch.float64)
    sigma = np.linalg.svd(matrix(model, x), compute_uv=False)
    counted = tp.verify_expressivity(model, many, method="svd")
    assert (counted.status, counted.rank, counted.distinct) == ("full rank", 24, 24)
    assert counted.sigma_min == pytest.approx(sigma[-1], rel=1e-6)
    assert counted.logabsdet == pytest.approx(2 * np.log(sigma).sum(), rel=1e-9)
    for factorization in ("gram", "preconditioned"):
        verdict = tp.verify_expressivity(
            model, many, method="certificate", factorization=factorization
        )
        if verdict.status == "proved":
            assert 0 < verdict.sigma_min_lower <= sigma[-1]
    assert verdict.status == "proved"
    witness = tp.verify_expressivity(model, many, w="witness", method="certificate")
    model.load_state_dict(witness.witness, strict=False)
    assert witness.sigma_min_lower <= np.linalg.svd(matrix(model, x), compute_uv=False)[-1]
    assert sorted(map(len, verdict.repeated)) == [2, 2, 2, 2, 3]
    for group in verdict.repeated:
        assert all(torch.equal(many[group[0]], many[i]) for i in group)


def test_columns_for_the_distinct_inputs_are_enough():
    x, y = toy_data(20)
    x[10:] = x[:10]
    for width, status in ((8, "deficient"), (9, "proved")):
        verdict = tp.verify_expressivity(toy_mlp(width=width), x)
        assert verdict.status == status, width
    assert (
        "N = 10 > m_H + 1 = 9: no weights reach rank N"
        in tp.verify_expressivity(toy_mlp(width=8), x).reason
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = quiet(toy_mlp(width=9), verify="auto").fit((x, y))
    assert ("m_H >= N - 1", "held") in [p[:2] for p in result.guarantee.premises]
    with pytest.warns(UserWarning, match="m_H = 8, n = 20, N = 10 .* m_H >= N - 1 fails"):
        quiet(toy_mlp(width=8)).fit((x, y))


def test_culprits_go_by_the_numbers_of_all_samples():
    x = toy_data(20)[0].double()
    x[1] = x[0]
    x[4] = x[3]
    x[9] = x[6] * (1 + 2**-52)  # within rounding, not equal
    x[12] = x[9]
    model = toy_mlp(dtype=torch.float64)
    for settings in ({"method": "separation"}, {"w": "witness"}):
        verdict = tp.verify_expressivity(model, x, **settings)
        assert (verdict.status, verdict.distinct) == ("undecided", 17)
        assert verdict.repeated == [[0, 1], [3, 4], [9, 12]] and verdict.culprits == [[6, 9]]
        assert any(line.startswith("samples 6, 9 are closer") for line in verdict.explanation)
    with torch.no_grad():
        model[2].weight.zero_()  # h is one row
    for method in ("svd", "certificate"):
        named = tp.verify_expressivity(model, x, method=method).culprits
        assert named and not {1, 4, 12} & {i for group in named for i in group}


def test_every_sample_is_compared_with_its_distinct_input():
    """Copies are run too: one that the model treats otherwise ends the claim."""

    class Counting(nn.Module):
        def __init__(self, wrong: int):
            super().__init__()
            self.body, self.wrong = toy_mlp(dtype=torch.float64), wrong

        def forward(self, x):
            if len(x) == self.wrong:  # of the model's own batches, 256 at a time
                x = torch.cat([x[:-1], x[-1:] + 1.0])
            return self.body(x)

    x = toy_data(256)[0].double().repeat(2, 1)[:300]
    model = Counting(44)
    tp.nn.widen(model, x, last_layer="body.4")
    verdict = tp.verify_expressivity(model, x)
    assert verdict.distinct == 256 and verdict.status == "undecided"
    assert "an input equal to another one's" in verdict.reason or "sample 299" in verdict.reason
    fine = Counting(0)
    tp.nn.widen(fine, x, last_layer="body.4")
    assert tp.verify_expressivity(fine, x).status == "proved"


def test_comparing_equal_inputs_keeps_their_rows_alone(monkeypatch):
    """Not those of all samples: 20,000 rows of 22,000 features are 3.3 GiB."""
    x = toy_data(400)[0]
    x[399] = x[7]
    model = toy_mlp()
    tp.nn.widen(model, x)
    made, alive = [], []
    passes = agreement._passes

    def watched(*args, **kwargs):
        for index, seen in passes(*args, **kwargs):
            alive.append(sum(h() is not None for h in made))
            made.append(weakref.ref(seen.h))
            yield index, seen

    monkeypatch.setattr(agreement, "_passes", watched)
    assert tp.verify_expressivity(model, x, method="separation").status == "proved"
    assert len(alive) > 10 and max(alive) <= 1


def test_nodes_of_a_graph_are_told_apart_by_their_place():
    """Equal rows of features, other neighbours: no equal inputs. The same node twice: one."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 8)

        def forward(self, x, adjacency):
            return self.lin(adjacency @ x)

    x = toy_data(9, d=3)[0].double()
    x[4] = x[1]
    adjacency = torch.eye(9).double() + torch.diag(torch.ones(8).double(), 1)
    torch.manual_seed(0)
    rows = tp.nn.Rows(Mean(), x, adjacency)
    model = nn.Sequential(rows, tp.nn.Softplus(1.0), nn.Linear(8, 2)).double()
    nodes = torch.arange(9)
    tp.nn.widen(model, nodes)
    verdict = tp.verify_expressivity(model, nodes)
    assert (verdict.status, verdict.distinct, verdict.repeated) == ("proved", 9, [])
    verdict = tp.verify_expressivity(model, torch.cat([nodes, nodes[:2]]))
    assert (verdict.status, verdict.distinct) == ("proved", 9)


def test_labels_that_disagree_are_counted_and_the_bound_holds():
    x, _ = toy_data(30)
    x[10:20], x[20:] = x[:10], x[:10]
    y = torch.arange(30) // 10  # three labels for each input
    y[[10, 20]] = 0  # but for one
    result = quiet(toy_mlp(width=20), verify="svd", second_phase="gd", epochs=8, tau=4).fit((x, y))
    assert (result.verdict.distinct, result.verdict.disagreeing) == (10, 9)
    assert result.guarantee.curve and not result.guarantee.refuted
    floor = 27 / 30 * np.log(3)  # of every network
    assert all(floor <= p["loss"] <= p["bound"] for p in result.guarantee.curve)


def test_lazy_steps_count_the_distinct_inputs():
    x, y = toy_data(16)
    x[8:] = x[:8]
    y = nn.functional.one_hot(y, 3).double()
    model = toy_mlp(width=30)
    settings = {"second_phase": "lazy", "verify": "auto", "loss": "squared_error"}
    lazy = {"smoothness": 1e4}
    trainer = quiet(model, precision="float64", epochs=6, tau=2, lazy=lazy, **settings)
    result = trainer.fit((x.double(), y))
    assert result.status == "completed"
    checks = result.guarantee.checks
    assert all(check["rank"] == 8 for check in checks)
    mean = (y[:8] + y[8:]) / 2
    floor = float(((y[:8] - mean) ** 2 + (y[8:] - mean) ** 2).sum() / 16)
    assert floor > 0.1
    for check in checks:
        assert check["lemma7"]["comparator_loss"] == pytest.approx(floor, rel=1e-9)
        assert check["lemma7"]["loss"] <= check["lemma7"]["bound"] < np.inf
    losses = [row["train_loss"] for row in result.history if row["phase"] == 2]
    assert min(losses) - floor <= result.guarantee.bound
    labels = quiet(toy_mlp(width=30), precision="float64", epochs=3, tau=2, lazy=lazy,
                   second_phase="lazy", verify="auto").fit((x.double(), y.argmax(1)))  # fmt: skip
    found = labels.guarantee.checks[0]["lemma7"]
    assert found["loss"] <= found["bound"] and found["comparator_loss"] < found["bound"] < np.inf


def test_widen_counts_what_the_model_tells_apart():
    def model(dtype=torch.float32):
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)

    def units(x, own=None):
        return tp.nn.widen(own or model(), x)[-1].wide.out_features

    x = torch.rand(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[20:30] = x[:10]
    x[30:] = x[:10] * (1 + 1e-12)
    assert units(x) == units(x.numpy()) == units(20) == 22
    assert units(x, model(torch.float64)) == 33
    assert units((256 * x[:20]).to(torch.uint8).repeat(2, 1)) == 22

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.last = nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, a, b):
            return self.last(torch.tanh(self.hidden(a + b)))

    given = {"a": x[:20].float().repeat(2, 1), "b": torch.arange(40.0)[:, None].repeat(1, 2) // 20}
    two = tp.nn.widen(Two(), given)
    assert two.last.wide.out_features == 44 and two(**given).shape == (40, 2)
    for wrong, error, what in (
        (x[:0], ValueError, "n: expected inputs"),
        (torch.tensor(3), ValueError, "n: expected inputs"),
        (x / 0, ValueError, "n: NaN or infinity in the input of sample 0"),
        ("x", TypeError, "n: expected an int"),
        (None, TypeError, "n: expected an int"),
        ([["a"]], TypeError, "n: "),
    ):
        untouched = model()
        with pytest.raises(error, match=what):
            tp.nn.widen(untouched, wrong)
        assert isinstance(untouched[-1], nn.Linear)


def of_files(width: int, beta: float = 1.0) -> tuple[nn.Module, torch.Tensor]:
    """The network and the inputs of the files of version 1."""
    wide = nn.Linear(2, width)
    with torch.no_grad():
        wide.weight.copy_(torch.arange(-width, width).reshape(width, 2) % 7 - 3.0)
        wide.bias.copy_(torch.arange(width) % 5 - 2.0)
    x = torch.arange(10, dtype=torch.float64).reshape(5, 2) % 7
    return nn.Sequential(wide, tp.nn.Softplus(beta), nn.Linear(width, 2)).double(), x


def test_a_triangular_certificate_of_version_1_has_its_own_witness():
    """Kinks half-way to the nearest earlier sample; its bounds hold, and none that is greater."""
    model, x = of_files(8, 100.0)
    verdict, said = tp.Verdict.load(VERDICTS / "triangular-1.json"), []
    assert (verdict.version, verdict.factorization) == (1, "triangular")
    assert verdict.recheck(model, x, say=said.append), said
    assert "constants of the triangular certificate" in said[-1]
    for name in ("sigma_min_lower", "logabsdet_lower", "feature_error"):
        changed = dataclasses.replace(verdict, **{name: 100 + 2 * abs(getattr(verdict, name))})
        assert name == "feature_error" or not changed.recheck(model, x, say=said.append), name
    smaller = dataclasses.replace(verdict, feature_error=0.0)
    assert not smaller.recheck(model, x, say=said.append)
    now = tp.verify_expressivity(model, x, w="witness", method="certificate")
    assert now.sigma_min_lower != verdict.sigma_min_lower and now.recheck(model, x, say=str)


@pytest.mark.parametrize(
    ("name", "width", "again"), [("proved", 8, 4), ("identical", 8, 1), ("dimension", 3, 1)]
)
def test_files_of_version_1_are_proved_again(name, width, again, tmp_path):
    """Their condition is rank n over all samples, which equal inputs make impossible."""
    path = VERDICTS / f"{name}-1.json"
    model, x = of_files(width)
    x[4] = x[again]
    verdict, said = tp.Verdict.load(path), []
    assert (verdict.version, verdict.n, verdict.distinct) == (1, 5, 5)
    assert verdict.recheck(model, x, say=said.append), said
    verdict.save(tmp_path / "v.json")
    written, before = json.loads((tmp_path / "v.json").read_text()), json.loads(path.read_text())
    assert written == before and before["schema"] == "twophase-verdict/1"
    now = tp.verify_expressivity(model, x)
    assert now.version == 2 and now.status == "proved"
    assert (now.distinct, now.repeated) == ((5, []) if name == "proved" else (4, [[1, 4]]))
    # no claim of one version is one of the other
    verdict.version = 2
    assert not verdict.recheck(model, x, say=said.append)
    for version in (0, 3, -1):
        verdict.version = version
        assert not verdict.recheck(model, x, say=said.append)
        assert "no version" in said[-1]
    model, x = of_files(width)
    x[4] = x[2]
    verdict.version = 1
    assert not verdict.recheck(model, x, say=said.append)  # other data


def test_checkpoints_of_before_keep_their_verdict(tmp_path):
    x, y = toy_data(20)
    x[3] = x[1]
    settings = {"verify": "auto", "epochs": 4, "tau": 2}
    quiet(toy_mlp(), tmp_path, **settings).fit((x, y))
    saved, _ = checkpoint.load(tmp_path)
    assert saved["verdict"]["distinct"] == 19
    old = {
        k: v for k, v in saved["verdict"].items() if k not in ("distinct", "repeated", "version")
    }
    checkpoint.save(tmp_path, saved | {"verdict": old})
    again = quiet(toy_mlp(), tmp_path, **settings).fit((x, y), resume=True)
    assert (again.verdict.version, again.verdict.distinct) == (1, 20)


def test_inputs_that_are_random_are_all_different():
    x, y = toy_data(20)
    x[10:] = x[:10]
    noisy = quiet(
        toy_mlp(), verify="svd", augment=lambda x, g: x + torch.randn(x.shape, generator=g)
    )
    result = noisy.fit((x, y))
    width = {name: why for name, _, why in result.guarantee.premises}["m_H >= N - 1"]
    assert width == "m_H = 80, n = 20"
    assert result.verdict.distinct == 10  # the verdict is about the inputs as they are
