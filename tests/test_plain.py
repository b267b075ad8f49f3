"""Networks that leave the package: torch.fx, torch.export's decompositions, plain copies."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._decomp import get_decompositions

import twophase_ext as tp
from helpers import Given, ToyConvNet

SCALES = torch.logspace(-2, 3, 6)[:, None]


def network(*, inplace: bool = False) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), tp.nn.Softplus(10.0, inplace=inplace), nn.Linear(8, 3))
    return tp.nn.widen(model, 20).eval(), torch.randn(6, 5) * SCALES


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 4e-7 * b.abs().max())


@pytest.mark.parametrize("inplace", [False, True])
def test_torch_fx_traces_softplus_as_one_call(inplace):
    model, x = network(inplace=inplace)
    graph = torch.fx.symbolic_trace(model)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called == [tp.ops.softplus_ if inplace else tp.ops.softplus, tp.ops.softplus]
    for same in (graph, pickle.loads(pickle.dumps(graph))):
        assert torch.equal(same(x), model(x))


def test_functions_of_the_package_are_traced_wherever_they_stand():
    model = Given(lambda m, x: tp.softplus_(m.fc(x), 3.0) + tp.softplus(x), fc=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_decompositions_leave_torch_operators_alone(inplace, dynamic):
    model, x = network(inplace=inplace)
    shapes = ({0: torch.export.Dim("batch", min=2)},) if dynamic else None
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes)
    assert any("twophase" in str(node.target) for node in exported.graph.nodes)
    ours = get_decompositions([torch.ops.twophase.softplus.default])
    plain = exported.run_decompositions({**torch.export.default_decompositions(), **ours})
    assert not any("twophase" in str(node.target) for node in plain.graph.nodes)
    assert close(plain.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plain_copy_differs_by_roundings(dtype):
    z = torch.linspace(-0.5, 0.5, 4001, dtype=dtype)
    copy = tp.nn.plain(tp.nn.Softplus())
    assert type(copy) is nn.Softplus
    exact = torch.logaddexp(100 * z.double(), torch.zeros_like(z).double()) / 100
    error = (copy(z) - exact).abs() / torch.finfo(dtype).eps
    assert (error <= 4 * exact + 1e-2).all()


def test_a_plain_copy_has_the_models_keys_sharing_and_nothing_of_the_package():
    shared = tp.nn.Softplus(7.0, inplace=True)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), shared, nn.Flatten(), nn.Linear(32, 8), shared)
    model.append(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, activation="relu"))
    model.append(nn.Linear(8, 3))
    tp.nn.analytic(model)
    tp.nn.widen(model, 12, last_layer="6")
    tp.freeze(model, last_layer=model[6].last_layer)
    before, copy = str(model), tp.nn.plain(model)
    assert str(model) == before and isinstance(model[1], tp.nn.Softplus)
    assert list(copy.state_dict()) == list(model.state_dict())
    assert copy[1] is copy[4] and repr(copy[1]) == "Softplus(beta=7.0, threshold=40.0)"
    assert not copy.training and all(p.requires_grad for p in copy.parameters())
    assert copy.train().training  # not frozen any more
    assert not any("twophase" in type(m).__module__ for m in copy.modules())


def test_a_plain_copy_loads_without_the_package(tmp_path):
    model, x = network(inplace=True)
    copy = tp.nn.plain(model)
    assert close(copy(x), model(x))
    torch.save(copy, tmp_path / "plain.pt")
    torch.save((x, copy(x).detach()), tmp_path / "values.pt")
    code = (
        "import sys, torch\n"
        "x, y = torch.load('values.pt')\n"
        "model = torch.load('plain.pt', weights_only=False)\n"
        "assert torch.equal(model(x), y) and torch.equal(torch.jit.trace(model, x)(x), y)\n"
        "assert torch.equal(torch.fx.symbolic_trace(model)(x), y)\n"
        "ours = [name for name in sys.modules if 'twophase' in name]\n"
        "assert all('editable' in name for name in ours), ours\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_plain_copies_of_models_of_ones_own():
    model = ToyConvNet().eval()
    copy, x = tp.nn.plain(model), torch.rand(3, 1, 6, 6)
    assert close(copy(x), model(x)) and type(copy) is ToyConvNet
    assert type(copy.act) is nn.Softplus and copy.act.beta == 10.0
    with pytest.raises(ValueError, match=r"no module for 0 \(of tp.nn.analytic\)"):
        prelu = nn.Sequential(nn.PReLU())
        tp.nn.analytic(prelu)
        tp.nn.plain(prelu)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        tp.nn.plain("model")


SMOOTH = {
    "images": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "gaps": nn.MaxPool2d(2, 3),
    "dilated": nn.MaxPool2d((2, 3), 1, (1, 0), (1, 2)),
    "whole": nn.AdaptiveMaxPool2d(1),
    "clipped": nn.ReLU6(),
    "in place": nn.Hardswish(inplace=True),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_plain_copies_of_smooth_functions_are_graphs_of_torchs_operators(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), SMOOTH[name], nn.Flatten()).double()
    tp.nn.analytic(model, beta=20.0)
    copy = tp.nn.plain(model)
    assert list(copy.state_dict()) == list(model.state_dict())
    assert type(model[1]).__module__.startswith("twophase_ext")
    called = [n.target for n in copy[1].graph.nodes if n.op == "call_function"]
    assert called
    assert not any("twophase" in getattr(target, "__module__", "") for target in called)
    for x in torch.randn(3, 1, 9, 8).double(), torch.randn(1, 1, 12, 7).double():
        expected = model(x)
        assert (expected - nn.Sequential(model[0], SMOOTH[name], model[2])(x)).abs().max() > 0
        for same in (copy, pickle.loads(pickle.dumps(copy)), torch.jit.trace(copy, x)):
            torch.testing.assert_close(same(x), expected, rtol=1e-13, atol=1e-14)


def test_the_smooth_maximum_is_decomposed_too():
    model, x = tp.nn.SmoothMaxPool(3, 2, 1, ceil_mode=True), torch.randn(2, 3, 8, 9)
    exported = torch.export.export(model, (x,))
    assert any("twophase" in str(node.target) for node in exported.graph.nodes)
    ours = get_decompositions([torch.ops.twophase.smooth_max_pool.default])
    plain = exported.run_decompositions({**torch.export.default_decompositions(), **ours})
    assert not any("twophase" in str(node.target) for node in plain.graph.nodes)
    assert close(plain.module()(x), model(x))
