"""Verdicts by certificate for witness, initial and current weights, against numpy's SVD."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import twophase.models
import twophase_ext as tp
from helpers import bits, same_bits, toy_convnet, toy_data, toy_images, toy_mlp


def loaded(model: nn.Module, verdict: tp.Verdict) -> nn.Module:
    missing = model.load_state_dict(verdict.witness, strict=False)
    assert not missing.unexpected_keys
    return model


def sigma_min(model: nn.Module, x: torch.Tensor, last: nn.Module) -> float:
    """Of [h, 1] in float64, from a plain forward pass of the model itself."""
    caught = []
    handle = last.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model.double().eval()(x.double())
    handle.remove()
    h = caught[0].numpy()
    return float(np.linalg.svd(np.c_[h, np.ones(len(h))], compute_uv=False)[-1])


@pytest.mark.parametrize("factorization", ["triangular", "gram", "auto"])
def test_witness_of_an_mlp(factorization):
    x, _ = toy_data(60)
    model = toy_mlp()
    before = bits(model)
    verdict = tp.verify_expressivity(
        model, x, w="witness", method="certificate", factorization=factorization
    )
    assert same_bits(before, bits(model))
    assert (verdict.status, verdict.claim) == ("proved", "exists"), verdict
    assert verdict.factorization == ("gram" if factorization == "gram" else "triangular")
    truth = sigma_min(loaded(model, verdict), x, model[4])
    assert 0 < verdict.sigma_min_lower <= truth * (1 + 1e-6)
    assert verdict.margin > 1 and verdict.assumptions
    printed = float(str(verdict).split("smallest singular value >= ")[1].split()[0])
    assert 0.999 * verdict.sigma_min_lower < printed <= verdict.sigma_min_lower


def test_witness_of_a_convolutional_network_with_skip_and_batch_norm():
    x, _ = toy_images(30)
    model = toy_convnet()
    verdict = tp.verify_expressivity(model, x, w="witness", method="certificate")
    assert verdict.status == "proved", verdict
    truth = sigma_min(loaded(model, verdict), x, model.head["out"])
    assert 0 < verdict.sigma_min_lower <= truth * (1 + 1e-6)


def test_witness_of_a_residual_network():
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = twophase.models.PreActResNet18(width=4, wide=44)
    verdict = tp.verify_expressivity(model, x, w="witness", method="certificate")
    assert verdict.status == "proved", verdict
    truth = sigma_min(loaded(model, verdict), x, model.head[2])
    assert 0 < verdict.sigma_min_lower <= truth * (1 + 1e-6)


def test_the_current_weights_are_certified_where_they_can_be():
    x, _ = toy_data(30)
    model = toy_mlp(dtype=torch.float64)
    with torch.no_grad():
        model[2].weight.mul_(20)
    verdict = tp.verify_expressivity(model, x, method="certificate")
    assert (verdict.status, verdict.claim) == ("proved", "at w"), verdict
    assert verdict.witness is None
    truth = sigma_min(model, x, model[4])
    assert truth / 10 <= verdict.sigma_min_lower <= truth
    auto = tp.verify_expressivity(model, x)
    assert (auto.status, auto.claim, auto.rank) == ("proved", "at w", 30)
    assert auto.sigma_min_lower == verdict.sigma_min_lower


def test_initial_weights_under_a_seed():
    x, _ = toy_data(30)
    model = toy_mlp()
    one, two = (
        tp.verify_expressivity(model, x, w="init", method="certificate", seed=s) for s in (1, 2)
    )
    assert one.claim == two.claim == "exists"
    assert not torch.equal(one.witness["2.weight"], two.witness["2.weight"])
    again = tp.verify_expressivity(model, x, w="init", method="certificate", seed=1)
    assert torch.equal(one.witness["0.weight"], again.witness["0.weight"])
    assert one.sigma_min_lower == again.sigma_min_lower
    if one.status == "proved":
        assert one.sigma_min_lower <= sigma_min(loaded(model, one), x, model[4])


def test_a_model_without_wide_layer_is_bounded_directly():
    x, _ = toy_data(12)
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    verdict = tp.verify_expressivity(model, x, method="certificate")
    assert (verdict.status, verdict.claim) == ("proved", "at w"), verdict
    assert verdict.sigma_min_lower <= sigma_min(model, x, model[2])
    witness = tp.verify_expressivity(model, x, w="witness", method="certificate")
    assert witness.status == "undecided" and "wide layer" in witness.reason


def test_a_module_without_a_bound_is_never_promoted():
    class Own(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    x, _ = toy_data(12)
    model = nn.Sequential(nn.Linear(5, 40), Own(), nn.Linear(40, 3)).double()
    verdict = tp.verify_expressivity(model, x, method="certificate")
    assert verdict.status in ("full rank", "undecided") and verdict.sigma_min_lower is None


@pytest.mark.parametrize("w", ["current", "init", "witness"])
@pytest.mark.parametrize("method", ["auto", "separation", "certificate", "svd"])
def test_nearly_equal_inputs_are_never_proved(w, method):
    x, _ = toy_data(30)
    x = x.double()
    x[7] = x[21]
    x[7, 2] = torch.nextafter(x[7, 2], torch.tensor(9.0, dtype=torch.float64))
    model = toy_mlp(dtype=torch.float64)
    verdict = tp.verify_expressivity(model, x, w=w, method=method)
    assert verdict.status == "undecided" or (method == "svd" and verdict.status == "full rank")
    if method in ("separation", "auto"):
        assert [7, 21] in verdict.culprits and "7" in str(verdict)


def test_certificate_file_round_trip_and_recheck(tmp_path):
    x, _ = toy_data(40)
    model = toy_mlp()
    verdict = tp.verify_expressivity(model, x, w="witness", method="certificate")
    path = tmp_path / "verdict.json"
    verdict.save(path)
    read = tp.Verdict.load(path)
    assert read == verdict and read.witness is None
    said = []
    assert read.recheck(model, x, say=said.append) and "holds: proved" in said[0]
    with torch.no_grad():
        model[4].weight.add_(1)  # the last layer is no part of the claim
    assert read.recheck(model, x, say=said.append)
    other = x.clone()
    other[3, 1] += 1e-6
    assert not read.recheck(model, other, say=said.append) and "data" in said[-1]
    assert not read.recheck(toy_mlp(seed=1), x, say=said.append) and "model" in said[-1]
    read.sigma_min_lower *= 1.1
    assert not read.recheck(model, x, say=said.append) and "sigma_min_lower" in said[-1]
    read.sigma_min_lower, read.claim = verdict.sigma_min_lower, "at w"
    assert not read.recheck(model, x, say=said.append) and "claim" in said[-1]


@pytest.mark.parametrize("key", ["status", "sigma_min_lower", "hashes", "assumptions", "schema"])
def test_an_edited_file_is_refused(tmp_path, key):
    path = tmp_path / "verdict.json"
    tp.verify_expressivity(toy_mlp(), toy_data(20)[0], w="witness").save(path)
    data = json.loads(path.read_text())
    data[key] = "twophase-verdict/9" if key == "schema" else "full rank"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="schema" if key == "schema" else "changed"):
        tp.Verdict.load(path)


def test_a_numerical_count_cannot_be_rechecked(tmp_path):
    verdict = tp.verify_expressivity(toy_mlp(), toy_data(20)[0], method="svd")
    said = []
    assert not verdict.recheck(toy_mlp(), toy_data(20)[0], say=said.append)
    assert "claims nothing" in said[0]


def test_a_deficient_verdict_is_rechecked():
    x, _ = toy_data(20)
    x[3] = x[8]
    model = toy_mlp(width=17)  # 19 distinct inputs
    verdict = tp.verify_expressivity(model, x)
    assert verdict.status == "deficient" and "N = 19 > m_H + 1 = 18" in verdict.reason
    assert verdict.recheck(model, x, say=lambda _: None)


def test_infinite_numbers_survive_the_file(tmp_path):
    verdict = tp.Verdict(
        status="undecided", claim="exists", method="separation", n=3, width=4, margin=float("-inf")
    )
    verdict.save(tmp_path / "v.json")
    assert tp.Verdict.load(tmp_path / "v.json").margin == float("-inf")
    json.loads((tmp_path / "v.json").read_text(), parse_constant=pytest.fail)


def test_features_are_kept_in_a_folder(tmp_path, monkeypatch):
    from twophase_ext.expressivity import backbone, problem

    monkeypatch.setattr(problem, "CHUNK", 20)
    x, _ = toy_data(60)
    x = x.repeat(5, 1) + torch.linspace(0, 1, 300)[:, None]
    model = toy_mlp(width=320)
    settings = {"w": "witness", "method": "certificate", "folder": tmp_path}
    verdict = tp.verify_expressivity(model, x, **settings)
    assert verdict.status == "proved"
    files = sorted(tmp_path.glob("features*.pt"))
    assert len(files) == 2  # batches of 256
    min(files, key=lambda path: path.stat().st_size).unlink()
    monkeypatch.setattr(problem, "bounded_features", counting(problem.bounded_features, seen := []))
    again = tp.verify_expressivity(model, x, **settings)
    assert again.sigma_min_lower == verdict.sigma_min_lower
    # the file that is gone, a batch of the one that is there, and what chooses the backbone
    assert sum(seen) == 44 + 256 + min(backbone.PILOT, 300)
    tp.verify_expressivity(model, x + 1, **settings)  # beside them
    assert len(list(tmp_path.glob("features*.pt"))) == 4


def counting(function, seen: list[int]):
    def counted(*args, n, **kwargs):
        seen.append(n)
        return function(*args, n=n, **kwargs)

    return counted


def hooked(model):
    model[3].register_forward_hook(lambda *_: torch.zeros(1) + _[2] * 0)


def shared(model):
    model[2] = nn.Linear(16, 16)
    model[0] = nn.Linear(5, 16)
    model.insert(2, nn.Linear(16, 16))
    model.insert(3, tp.nn.Softplus())
    model[4] = nn.Linear(16, 16)
    model[4].weight = model[2].weight
    model[6] = nn.Linear(16, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m[2], "bias", None), "no bias"),
        (lambda m: m[2].requires_grad_(False), "frozen"),
        (lambda m: nn.utils.parametrizations.spectral_norm(m[2]), "parametrized"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[2]), "parametrized"),
        (lambda m: m[2].register_forward_pre_hook(lambda _, a: (a[0] * 0,)), "hooks"),
        (hooked, "hooks"),
        (shared, "shares its weights"),
    ],
)
@pytest.mark.parametrize("method", ["separation", "certificate", "auto"])
def test_existence_is_not_claimed_of_weights_that_are_not_free(change, reason, method):
    x, _ = toy_data(12)
    model = toy_mlp()
    change(model)
    verdict = tp.verify_expressivity(model, x, w="witness", method=method)
    assert verdict.status == "undecided" and reason in verdict.reason, verdict
    now = tp.verify_expressivity(model, x, method="certificate")
    # of these very weights something may be proved: those of weight_norm are bounded as computed
    at_w = ("no bias", "frozen", "shares its weights", "parametrized")
    assert now.status != "proved" or reason in at_w
