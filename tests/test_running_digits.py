"""Bounds through random networks of many operators, against the same networks in 60 digits."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from exact_running import Digits, digits, numbers
from running_models import Stop, drawn
from twophase_ext.expressivity.bounded import Unbounded
from twophase_ext.expressivity.running.call import Call
from twophase_ext.expressivity.running.features import bounded_features

QUICK = (1, 2, 4, 7, 9, 11, 12, 13, 18, 23, 25, 28, 32, 36, 37, 39)  # in many digits


def network(seed):
    """One of `drawn`, in float64, with two small inputs."""
    model, x = drawn(seed)
    x = x[:2].double()
    x = x[..., :8, :8].contiguous() if x.dim() == 4 else x
    backbone = model.backbone.double()
    return Stop(backbone, backbone(x).shape[1]).double().eval(), x


def shares(seed):
    """True error over its bound, of each of two samples; None without a bound."""
    model, x = network(seed)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            found = bounded_features(model, model.stop, [x], n=2)
            with torch.no_grad(), Digits() as mode:
                z = model.backbone(x)
    except Unbounded:
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    apart = numbers(found.z) - mode.of(z)
    errors = [digits.sqrt(sum(v * v for v in row)) for row in apart]
    return [
        float(e) / float(b) if b else float("inf") if e else 0.0
        for e, b in zip(errors, found.error, strict=True)
    ]


@pytest.mark.slow
def test_random_networks():
    found = [shares(seed) for seed in QUICK]
    known = [share for pair in found if pair is not None for share in pair]
    assert len(known) == 2 * len(QUICK)
    assert max(known) <= 1


def test_rounding_shows_in_so_many_digits(monkeypatch):
    """Without the terms of rounding the bounds are wrong, and this finds it."""
    start = Call.__init__

    def without(call, *arguments):
        start(call, *arguments)
        call.u = 0.0

    monkeypatch.setattr(Call, "__init__", without)
    assert max(max(shares(seed)) for seed in (12, 13)) > 1
