"""Wrappers, captured weights, precisions and sizes that make a claim one about another function."""

import copy
import functools
import io
from contextlib import redirect_stdout
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import quiet, toy_data, toy_mlp
from lying_models import Net

X = torch.rand(8, 4, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.usefixtures("one_thread")
WAYS = ({}, {"method": "separation"}, {"w": "witness", "method": "certificate"})


class Wrapper(nn.DataParallel):
    def forward(self, x):
        return super().forward(x * 0)


class Named(nn.Module):
    """Holds its model as torch.compile's wrapper does."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, x):
        return self._orig_mod(x * 0)


@pytest.mark.parametrize("wrap", [Wrapper, Named])
def test_a_wrapper_that_changes_the_input_is_run(wrap):
    for way in WAYS:
        assert tp.verify_expressivity(wrap(Net()), X, **way).status == "undecided"


def test_hooks_on_a_wrapper_are_refused():
    model = nn.DataParallel(Net())
    model.register_forward_pre_hook(lambda _, a: (a[0] * 0,))
    with pytest.raises(
        ValueError, match="the wrapper DataParallel is not a call of what it wraps: it has hooks"
    ):
        tp.verify_expressivity(model, X)


def _compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("name", ["forward", "_call_impl", "__call__"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, _compiled])
def test_a_forward_replaced_on_a_wrapper_is_refused(wrap, name):
    model = wrap(Net())
    own = getattr(model, name)
    setattr(model, name, functools.wraps(own)(lambda x: own(x * 0)))
    for call in (
        lambda: tp.verify_expressivity(model, X),
        lambda: tp.ntk_rank(model, X),
        lambda: quiet(model).fit((X, torch.arange(8) % 2)),
    ):
        with pytest.raises(ValueError, match=r"the wrapper .* its forward has been replaced"):
            call()


def test_a_witness_has_the_names_of_the_model_as_given():
    model = nn.DataParallel(Net())
    verdict = tp.verify_expressivity(model, X, w="witness", method="certificate")
    assert verdict.status == "proved"
    found = copy.deepcopy(model).load_state_dict(verdict.witness, strict=False)
    assert found.unexpected_keys == []


def test_autocast_is_no_part_of_a_proof():
    def half(model, z):
        with torch.autocast("cpu", torch.bfloat16):
            return model.stem(z).float()

    for way in WAYS:
        assert tp.verify_expressivity(Net(before=half), X, **way).status == "undecided"
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in tp.verify_expressivity(Net(), X).reason
        with pytest.raises(ValueError, match="precision: fit is called under"):
            quiet(toy_mlp()).fit(toy_data())


@pytest.mark.parametrize("way", ["a closure", "an array", "a view"])
def test_captured_weights_are_read_where_they_are(way):
    model = Net()
    if way == "a closure":
        model.before = lambda _, z: z / (1 + model.wide.weight.norm())
    elif way == "an array":
        array = model.wide.weight.detach().numpy()
        model.before = lambda _, z: z if abs(array).max() < 1 else z * 0
    else:
        view = model.wide.weight.data[:4]
        model.before = lambda _, z: z * (view.abs().max() < 1)
    verdict = tp.verify_expressivity(model, X, w="witness", method="certificate")
    assert verdict.status == "undecided", str(verdict)


def test_wide_weights_in_one_memory_are_not_free():
    shared, expanded = Net(), Net()
    shared.wide.bias = nn.Parameter(shared.wide.weight.data[:, 0])
    expanded.wide.weight = nn.Parameter(torch.randn(1, 4).expand(10, 4))
    for model in (shared, expanded):
        verdict = tp.verify_expressivity(model, X, w="witness", method="certificate")
        assert verdict.status == "undecided", str(verdict)


def test_the_grad_mode_of_the_owner_counts():
    model = Net(between=lambda m, a: a * 0 if torch.is_grad_enabled() else a)
    for way in WAYS:
        assert tp.verify_expressivity(model, X, **way).status == "undecided"


def test_compiled_code_is_run_as_it_is_compiled():
    model = Net(before=lambda m, z: z * 0 if torch.compiler.is_compiling() else z)
    for way in WAYS:
        verdict = tp.verify_expressivity(torch.compile(model, backend="eager"), X, **way)
        assert verdict.status == "undecided" and "torch.compile" in verdict.reason, str(verdict)
        verdict = tp.verify_expressivity(torch.compile(Net(), backend="eager"), X, **way)
        assert verdict.status == "proved", str(verdict)


def test_compiled_code_is_compared_under_a_last_layer_that_hides_nothing():
    model = Net(before=lambda m, z: z * 0 if torch.compiler.is_compiling() else z)
    nn.init.zeros_(model.last.weight)
    nn.init.zeros_(model.last.bias)
    for way in WAYS:
        verdict = tp.verify_expressivity(torch.compile(model, backend="eager"), X, **way)
        assert verdict.status == "undecided" and "torch.compile" in verdict.reason, str(verdict)


def test_the_output_in_the_owners_precision_counts():
    model = Net(after=lambda m, out: out * 0 if out.dtype is torch.float32 else out)
    for way in WAYS:
        try:
            status = tp.verify_expressivity(model, X, **way).status
        except ValueError:  # no output of an affine layer
            continue
        assert status == "undecided"


def test_a_module_in_a_plain_list_is_refused_and_comes_back():
    model = Net(before=lambda m, z: m.norms[0](z))
    model.norms = [nn.BatchNorm1d(4)]
    for call in (
        lambda: tp.verify_expressivity(model, X),
        lambda: quiet(model).fit((X, torch.arange(8) % 2)),
        lambda: tp.ntk_rank(model, X),
    ):
        with pytest.raises(ValueError, match="model: its forward pass changes a tensor"):
            call()
        assert not model.norms[0].running_mean.any() and model.norms[0].num_batches_tracked == 0


def _sparse():
    model = Net(before=lambda m, z: torch.sparse.mm(m.adjacency.to(z.dtype), z.T).T)
    model.register_buffer("adjacency", torch.eye(4).to_sparse())
    return model


def _meta():
    model = Net()
    model.unused = nn.Linear(3, 3, device="meta")
    return model


def _inference():
    def frozen(model, z):
        with torch.inference_mode():
            part = z * 2
        return part.clone() + z

    return Net(before=frozen)


def _beta(value):
    model = Net()
    model.act.beta = value
    return model


@pytest.mark.parametrize(
    ("build", "trains"),
    [
        (_sparse, True),
        (_meta, False),
        (_inference, True),
        (lambda: _beta(10), True),
        (lambda: _beta(np.float32(10)), True),
        (lambda: _beta(Fraction(10)), True),
    ],
    ids=["sparse buffer", "meta module", "inference mode inside", "int", "float32", "fraction"],
)
def test_odd_but_valid_models(build, trains):
    plain = tp.verify_expressivity(Net(), X, w="current", method="svd")
    verdict = tp.verify_expressivity(build(), X, w="current", method="svd")
    assert verdict.status == plain.status, str(verdict)
    y = torch.arange(8) % 2
    if trains:
        assert quiet(build()).fit((X, y)).status == "completed"
    else:
        with pytest.raises(ValueError, match="expected all parameters on one device"):
            quiet(build()).fit((X, y))


@pytest.mark.parametrize("way", [*WAYS, {"w": "init", "method": "certificate"}])
def test_the_users_model_is_left_alone(way):
    """A graph of the owner's can still be gone through; a copy can still be made."""

    def keep(model, z):
        model.seen = z
        return z

    model = Net(before=keep)
    with torch.no_grad():
        model.eval()(X)
    loss = model(X).square().sum()
    model.seen = None
    versions = [p._version for p in model.parameters()]
    tp.verify_expressivity(model, X, **way)
    assert [p._version for p in model.parameters()] == versions
    loss.backward()
    copy.deepcopy(model)


def test_large_batches_count():
    x = torch.rand(300, 4, generator=torch.Generator().manual_seed(2))
    model = Net(before=lambda m, z: z * (1 - z.shape[0] // 257))
    model.wide, model.last = nn.Linear(4, 320), nn.Linear(320, 2)
    assert tp.verify_expressivity(model, x, method="separation").status == "undecided"


def test_inputs_are_what_the_model_can_be_fed():
    x = X.double()
    x[3] = x[2] + 1e-12
    for model, distinct in ((Net(), len(x) - 1), (Net().double(), len(x))):
        verdict = tp.verify_expressivity(model, x, method="separation")
        assert (verdict.status, verdict.distinct) == ("proved", distinct)


def test_sizes_that_a_weight_does_not_have_are_refused():
    model = Net()
    model.last.in_features = 4
    with pytest.raises(ValueError, match="last_layer: 'last' has a weight of shape"):
        tp.verify_expressivity(model, X)


def test_scripted_parts_leave_the_model_as_it_was():
    class Scripted(Net):
        def __init__(self):
            super().__init__()
            self.extra = torch.jit.script(nn.Linear(4, 4))

        def forward(self, x):
            return super().forward(self.extra(x))

    model = Scripted().train()
    with redirect_stdout(io.StringIO()):
        tp.verify_expressivity(model, X, method="svd")
    assert all(m.training for m in model.modules())
