"""The NTK's rank and smallest eigenvalue: against finite differences and its lower bound."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from torch import nn

from helpers import bits, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from twophase_ext import verify_expressivity
from twophase_ext.theory import ntk
from twophase_ext.theory.ntk import ntk_rank

pytestmark = pytest.mark.usefixtures("one_thread")


def finite_differences(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """J by central differences in float64, over every trainable parameter's entries."""
    columns, step = [], 1e-6
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            for i in range(p.numel()):
                p.view(-1)[i] += step
                up = model(x).flatten()
                p.view(-1)[i] -= 2 * step
                columns.append((up - model(x).flatten()) / (2 * step))
                p.view(-1)[i] += step
    return torch.stack(columns, 1)


def small() -> nn.Module:
    return toy_mlp(d=3, width=9, classes=2, dtype=torch.float64)


def sigma_min(model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        h = model[:-1](x)
    return float(torch.linalg.svdvals(torch.cat([h, h.new_ones(len(h), 1)], 1))[-1])


@pytest.mark.parametrize("frozen", [None, "0.weight", "4.bias"])
def test_full_kernel_against_finite_differences(frozen, monkeypatch):
    monkeypatch.setattr(ntk, "BLOCK", 4096)  # several groups of parameters
    x, model = toy_data(7, d=3)[0].double(), small()
    if frozen:
        model.get_parameter(frozen).requires_grad_(False)
    before = bits(model)
    kernel = ntk._kernel(model, x, 14)
    jacobian = finite_differences(model, x)
    assert torch.allclose(kernel, jacobian @ jacobian.T, rtol=1e-6, atol=1e-8)
    model.load_state_dict(before)
    found = ntk_rank(model, x, method="full")
    expected = np.linalg.eigvalsh(kernel.numpy())
    assert found.rank == 14 == np.linalg.matrix_rank(kernel.numpy()) and found.full
    assert found.smallest == pytest.approx(expected[0], rel=1e-6)
    assert not found.proved and "numerical" in str(found)
    assert same_bits(before, bits(model)) and model.training


def test_the_smallest_eigenvalue_is_above_the_bound():
    for seed in range(5):
        x, model = toy_data(8, d=3, seed=seed)[0].double(), small()
        found = ntk_rank(model, x)
        assert found.method == "full"
        assert found.lower == pytest.approx(sigma_min(model, x) ** 2, rel=1e-6)
        assert found.smallest >= found.lower > 0
        bound = ntk_rank(model, x, method="bound")
        assert (bound.rank, bound.smallest) == (None, None)
        assert bound.lower == found.lower and bound.full and not bound.proved


def test_convolutions_batch_norm_and_a_float32_model():
    x, _ = toy_images(9)
    model = toy_convnet().train()
    with torch.no_grad():
        model(x)
    before = bits(model)
    found = ntk_rank(model, x)
    assert found.size == 27 and found.rank == 27 and found.smallest >= found.lower
    assert same_bits(before, bits(model)) and model.training
    assert model.stem.weight.dtype == torch.float32
    outputs = model.eval().double()(x.double()).flatten()
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(out, parameters, retain_graph=True) for out in outputs]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    smallest = np.linalg.eigvalsh((jacobian @ jacobian.T).numpy())[0]
    assert found.smallest == pytest.approx(smallest, rel=1e-6)


def test_dependent_samples():
    x, _ = toy_data(8, d=3)
    x[5] = x[2]
    found = ntk_rank(small(), x)  # of the distinct ones
    assert found.rank == 14 == found.size and found.full and found.lower > 0
    assert "14 x 14 (N = 7 distinct inputs of n = 8, m_y = 2): full rank" in str(found)
    alone = ntk_rank(small(), x[[0, 1, 2, 3, 4, 6, 7]])
    assert found.smallest == pytest.approx(alone.smallest, rel=1e-9)
    assert found.lower == pytest.approx(alone.lower, rel=1e-9)
    narrow = toy_mlp(d=3, width=4, classes=2, dtype=torch.float64)
    wide_enough = ntk_rank(narrow, toy_data(8, d=3)[0])  # [h, 1] has rank 5 < 8, K more
    assert wide_enough.lower is None and wide_enough.rank > 10


def test_a_verdict_gives_the_bound():
    x, model = toy_data(8, d=3)[0].double(), small()
    verdict = verify_expressivity(model, x, method="svd")
    assert ntk_rank(model, x, method="bound", verdict=verdict).lower == verdict.sigma_min**2

    proved = verify_expressivity(model, x, method="certificate")
    found = ntk_rank(model, x, verdict=proved)
    assert found.proved and found.full and "proved" in str(found)
    assert 0 < found.lower <= proved.sigma_min_lower**2
    assert found.lower == pytest.approx(proved.sigma_min_lower**2)
    for change, message in (
        ({"claim": "exists"}, "claim 'exists'"),
        ({"n": 9}, "got n = 9"),
        ({"bias": False}, "column of ones"),
    ):
        with pytest.raises(ValueError, match=f"verdict: expected one .*{message}"):
            ntk_rank(model, x, verdict=dataclasses.replace(proved, **change))
    with pytest.raises(ValueError, match="hashes differ"):
        ntk_rank(model, x + 1, verdict=proved)
    with pytest.raises(ValueError, match="hashes differ"):
        ntk_rank(toy_mlp(3, 9, 2, seed=1, dtype=torch.float64), x, verdict=proved)
    # whatever is written in it, what is made again counts
    edited = dataclasses.replace(verdict, status="proved", sigma_min_lower=7.0)
    found = ntk_rank(model, x, method="bound", verdict=edited)
    assert not found.proved and found.lower == verdict.sigma_min**2
    unshown = dataclasses.replace(proved, status="undecided", reason="too close")
    bound = ntk_rank(model, x, method="bound", verdict=unshown)
    assert bound.lower is None and not bound.full and "too close" in str(bound)


def test_large_sizes_use_the_bound(monkeypatch):
    monkeypatch.setattr(ntk, "FULL_SIZE", 10)
    x, model = toy_data(8, d=3)[0], small()
    assert ntk_rank(model, x).method == "bound"
    monkeypatch.setattr(ntk, "available_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"'full' needs .* GiB"):
        ntk_rank(model, x, method="full")
    monkeypatch.setattr(ntk, "FULL_SIZE", 1000)
    assert ntk_rank(model, x).method == "bound"


def test_bad_arguments():
    x, model = toy_data(8, d=3)[0], small()
    with pytest.raises(ValueError, match="method: expected one of"):
        ntk_rank(model, x, method="lanczos")
    with pytest.raises(ValueError, match="empty"):
        ntk_rank(model, x[:0])
    model[4].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"last_layer: 4\.weight does not require"):
        ntk_rank(model, x)
    model = small()
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        ntk_rank(model, x, method="full")
    assert ntk.method_at_w(1000, 1100) == "svd" and ntk.method_at_w(60_000, 66_001) != "svd"


def test_a_verdict_from_before_a_hook_is_not_believed():
    x, model = toy_data(8, d=3)[0].double(), small()
    verdict = verify_expressivity(model, x, method="certificate")
    assert verdict.status == "proved"
    model[0].register_forward_hook(lambda m, args, out: out * 0)
    with pytest.raises(ValueError, match="verdict: expected one that holds for this model now"):
        ntk_rank(model, x, method="bound", verdict=verdict)


def test_a_model_that_cannot_be_copied():
    x, model = toy_data(8, d=3)[0], small().float()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"model: it cannot be copied in float64 \(TypeErr"):
        ntk_rank(model, x, method="full")
    assert not ntk_rank(model, x, method="bound").full
