"""What the package's layers do in training: in-place neighbours, masks, small tensors, devices."""

import inspect

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jvp, vjp

import twophase_ext as tp
from helpers import Given
from twophase_ext.nn import Softplus, analytic, classify

IN_PLACE = [
    *(nn.Hardswish, nn.ReLU, nn.ReLU6, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.RReLU),
    *(lambda inplace: nn.Threshold(0.0, 0.0, inplace), lambda inplace: nn.PReLU()),
    lambda inplace: nn.Softplus(),
]


def trains(act: nn.Module, after: nn.Module) -> bool:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), act, after, nn.Linear(16, 3)).train()
    try:
        model(torch.rand(6, 8)).sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return False
    return True


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("after", [nn.Dropout(0.2, inplace=True), nn.SiLU(inplace=True)], ids=repr)
def test_a_stand_in_trains_wherever_the_old_module_did(kind, inplace, after):
    act = kind(inplace=inplace)
    before = trains(act, after)
    model = nn.Sequential(nn.Identity(), act)
    analytic(model)
    assert type(model[1]) is not type(act)
    assert trains(model[1], after) or not before


@pytest.mark.parametrize("inplace", [False, True])
def test_a_kept_copy_changes_no_number(inplace):
    x = torch.randn(5, 7, dtype=torch.float64)
    grads, values = [], []
    for act in (Softplus(3.0), Softplus(3.0, inplace, keeps_copy=True)):
        leaf = x.clone().requires_grad_()
        z = leaf * 2
        y = act(z)
        values.append(y.detach().clone())
        assert (y.data_ptr() == z.data_ptr()) == (act.keeps_copy and inplace)
        grads.append(torch.autograd.grad((y * y).sum(), leaf)[0])
    assert torch.equal(*grads) and torch.equal(*values)
    with torch.no_grad():
        assert torch.equal(Softplus(3.0, inplace, keeps_copy=True)(2 * x), values[0])


@pytest.mark.parametrize("activation", ["relu", nn.ReLU()])
def test_a_transformer_encoder_takes_padding_masks_after_analytic(activation):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, pad = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    assert analytic(model).is_analytic
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=pad)
    slow = model(x, src_key_padding_mask=pad)
    torch.testing.assert_close(fast[~pad], slow[~pad], rtol=1e-5, atol=1e-5)


def curvatures(x: torch.Tensor, beta: float) -> dict[str, torch.Tensor]:
    """The second derivative at every x, in two ways."""

    def slope(z):
        return vjp(lambda t: tp.softplus(t, beta), z)[1](torch.ones_like(z))[0]

    z = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(tp.softplus(z, beta).sum(), z, create_graph=True)
    return {
        "reverse over reverse": torch.autograd.grad(first.sum(), z)[0],
        "forward over reverse": jvp(slope, (x,), (torch.ones_like(x),))[1],
        "operator": torch.ops.twophase.softplus_double_backward(
            torch.ones_like(x), torch.ones_like(x), tp.softplus(x, beta), beta
        )[1]
        * slope(x),
    }


@pytest.mark.parametrize("beta", [0.5, 100.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_curvature_has_no_cancellation_on_either_side(dtype, beta):
    # 1 - s is 0 from beta x = 17 (37 in float64) where s is rounded first
    x = (torch.tensor([-40.0, -9, -1, 0, 1, 5, 8, 12, 16, 17, 25, 37.5, 45, 80]) / beta).to(dtype)
    with mpmath.workdps(40):
        exact = [beta / ((1 + mpmath.e**t) * (1 + mpmath.e**-t))
                 for t in (beta * mpmath.mpf(v) for v in x.tolist())]  # fmt: skip
    for values in curvatures(x, beta).values():
        for value, true, v in zip(values.tolist(), exact, x.tolist(), strict=True):
            # exp(-beta y) turns a rounding of y into beta y roundings
            assert abs(value / true - 1) <= (4 + 4 * beta * abs(v)) * torch.finfo(dtype).eps


def test_the_curvature_of_special_values():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    for name, values in curvatures(x, 100.0).items():
        assert values[0].isnan(), name
        assert (values[[1, 3]] == 0).all(), name


@pytest.mark.parametrize("act", [Softplus(), Softplus(inplace=True)], ids=repr)
def test_a_training_step_inspects_no_signature(act, monkeypatch):
    # torch binds the arguments of Functions with setup_context to their signature, at every call:
    # more than a small tensor's whole step
    model = nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 2))
    x = torch.randn(3, 4)
    model(x).sum().backward()

    def refuse(*_, **__):
        raise AssertionError("a signature is inspected")

    monkeypatch.setattr(inspect, "signature", refuse)
    model(x).sum().backward()
    with torch.no_grad():
        model(x)


def test_batched_and_dual_gradients_of_an_eager_graph():
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = tp.softplus(x, 3.0)
    eye = torch.eye(4, dtype=torch.float64)
    rows = torch.autograd.grad(y, x, eye, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(rows, torch.diag(torch.sigmoid(3 * x.detach())))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(4).double(), torch.ones(4).double())
        (g,) = torch.autograd.grad(y, x, dual)
        tangent = torch.autograd.forward_ad.unpack_dual(g).tangent
    torch.testing.assert_close(tangent, torch.sigmoid(3 * x.detach()))


def test_an_ambient_default_device_changes_nothing():
    # "meta" stands in for "cuda" on machines without one
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(F.relu(self.table(x).mean(1)))

    def asked():
        model = Given(lambda m, x: m.fc(x).relu(), fc=nn.Linear(6, 3, device="cpu"))
        weights = {"w": torch.arange(6.0, device="cpu")}
        tp.perturb_(weights, 0.1, seed=3)
        x = torch.arange(12.0, device="cpu").view(3, 4) ** 2 % 5
        wide = tp.nn.widen(nn.Sequential(nn.Linear(4, 2, device="cpu")), 5)
        return [
            list(tp.EpochSampler(7)),
            str(analytic(model)),
            classify(plain_tokens),
            weights["w"].tolist(),
            tp.softplus(x).tolist(),
            [None if v is None else str(v) for v in tp.rank_logdet(x)],
            {p.device.type for p in wide.parameters()},
            tp.nn.plain(wide)(x).shape,
        ]

    plain_tokens = Tokens()
    expected = asked()
    with torch.device("meta"):
        assert asked() == expected
