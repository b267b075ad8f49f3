"""sgd_ and optim.SGD: torch.optim.SGD bit for bit, the mask, state dicts, what is refused."""

import copy
import itertools

import pytest
import torch
from torch.library import opcheck

from helpers import ISAS, instruction_set
from twophase import reference
from twophase_ext import optim
from twophase_ext.ops import sgd_

# Without vector instructions torch rounds the product of add(alpha) on its own.
TORCH_FUSES = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
STEPS = 20

RULES = [
    {"momentum": m, "dampening": d, "weight_decay": w, "nesterov": n, "maximize": x}
    for m, d, w, n, x in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 1e-2), (False, True), (False, True)
    )
    if not (n and (m == 0 or d != 0)) and not (m == 0 and d != 0)
]
FULL = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def named(rule: dict) -> str:
    return "-".join(f"{key}" for key, value in rule.items() if value) or "plain"


def make_params(dtype: torch.dtype, device: str = "cpu") -> list[torch.nn.Parameter]:
    """Empty, scalar, odd sizes, more than one thread's piece, and every kind of strides."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype).to(device)

    return [
        torch.nn.Parameter(t)
        for t in (
            draw(3, 5),
            draw(0, 4),
            draw(()),
            draw(20_001),
            draw(2, 3, 4, 5).to(memory_format=torch.channels_last),
            draw(7, 6).t(),
            draw(9, 8)[:, ::2],
            draw(1, 64),
        )
    ]


def set_grads(params, seed: int) -> None:
    """Gradients of plain and transposed layouts."""
    g = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=g, dtype=p.dtype).to(p.device)
        if p.dim() == 2 and i % 2 == 1:
            grad = grad.t().contiguous().t()
        p.grad = grad


def assert_equal(ours, theirs) -> None:
    for p, q in zip(ours, theirs, strict=True):
        if TORCH_FUSES or p.numel() == 0:
            assert torch.equal(p, q)
        else:  # three products a step, their roundings summed in the momentum (1 / (1 - 0.9))
            largest = max(1.0, float(q.detach().abs().max()))
            bound = 10 * 3 * STEPS * torch.finfo(p.dtype).eps / 2 * largest
            assert float((p - q).detach().abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_equals_torch_bit_for_bit(rule, dtype, device, isa):
    ours, theirs = make_params(dtype, device), make_params(dtype, device)
    a = optim.SGD(ours, lr=0.05, **rule)
    b = torch.optim.SGD(theirs, lr=0.05, foreach=False, **rule)
    layouts = [(p.data_ptr(), p.stride()) for p in ours]
    for step in range(STEPS):
        for params, optimizer in ((ours, a), (theirs, b)):
            set_grads(params, step)
            optimizer.step()
    assert_equal(ours, theirs)
    assert [(p.data_ptr(), p.stride()) for p in ours] == layouts
    for p, q in zip(ours, theirs, strict=True):
        if rule["momentum"]:
            assert_equal([a.state[p]["momentum_buffer"]], [b.state[q]["momentum_buffer"]])
        else:
            assert not a.state[p].get("momentum_buffer")


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_twin(rule, device, isa):
    ours = [p.detach() for p in make_params(torch.float64, device)]
    twin = [p.clone() for p in ours]
    set_grads(ours, 1)
    grads = [p.grad for p in ours]
    buffers, twin_buffers = [None] * len(ours), [None] * len(ours)
    nu = [1, 1, 0, 1, 1, 0, 1, 1]
    for _ in range(3):
        sgd_(ours, grads, buffers, lr=0.1, nu=nu, **rule)
        reference.sgd_(twin, grads, twin_buffers, lr=0.1, nu=nu, **rule)
    assert_equal(ours, twin)
    for b, t in zip(buffers, twin_buffers, strict=True):
        assert (b is None) == (t is None)
        if b is not None:
            assert_equal([b], [t])


def test_weight_decay_zero_keeps_p_out_of_the_buffer():
    p = torch.tensor([float("inf"), 1.0])
    buffers = [None]
    sgd_([p], [torch.ones(2)], buffers, lr=0.1, momentum=0.9)
    assert torch.equal(buffers[0], torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_gives_the_same_bits(dtype):
    results = []
    for isa, rule in itertools.product(ISAS, RULES):
        params = make_params(dtype)
        optimizer = optim.SGD(params, lr=0.05, **rule)
        with instruction_set(isa):
            for step in range(2):
                set_grads(params, step)
                optimizer.step()
        results.append((isa, named(rule), torch.cat([p.flatten() for p in params])))
    first = {name: x for _, name, x in results[: len(RULES)]}
    for isa, name, x in results:
        assert torch.equal(x, first[name]), (isa, name)


def test_every_thread_count_gives_the_same_bits(isa):
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 100_001, 64, 0)]
        set_grads(params, 0)
        optim.SGD(params, **FULL).step()
        results.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_expanded_gradient(isa):
    """The gradient of a sum gives what its stored copy gives (in torch they differ)."""
    p, g = torch.randn(3, 5), torch.randn(3, 1).expand(3, 5)
    q = p.clone()
    sgd_([p], [g], [None], lr=0.1)
    sgd_([q], [g.clone(memory_format=torch.contiguous_format)], [None], lr=0.1)
    assert torch.equal(p, q)


def test_buffer_in_another_layout(isa):
    p, g = torch.randn(6, 7), torch.randn(6, 7)
    b = torch.randn(7, 6).t()
    q, c = p.clone(), b.clone(memory_format=torch.contiguous_format)
    sgd_([p], [g], [b], **FULL)
    sgd_([q], [g], [c], **FULL)
    assert torch.equal(p, q)
    assert torch.equal(b, c)
    assert b.stride() == (1, 6)


# ---- the mask


def test_nu_stops_a_group_and_lets_it_go_on(device):
    """Phase 2 of Algorithm 1 by one line, and back: as if the masked steps had not been."""
    ours, theirs = make_params(torch.float64, device), make_params(torch.float64, device)
    a = optim.SGD([{"params": ours[:4]}, {"params": ours[4:]}], **FULL)
    b = torch.optim.SGD(theirs, **FULL)
    for step in range(9):
        for index, group in enumerate(a.param_groups):
            group["nu"] = int(index == 1 or not 3 <= step < 6)
        set_grads(ours, step)
        set_grads(theirs, step)
        if 3 <= step < 6:
            for p in theirs[:4]:
                p.grad = None
        frozen = [p.detach().clone() for p in ours[:4]]
        kept = [a.state[p]["momentum_buffer"].clone() for p in ours[:4]] if step else []
        a.step()
        b.step()
        if 3 <= step < 6:
            assert all(torch.equal(p, q) for p, q in zip(ours[:4], frozen, strict=True))
            for p, q in zip(ours[:4], kept, strict=True):
                assert torch.equal(a.state[p]["momentum_buffer"], q)
    assert_equal(ours, theirs)


def test_nu_0_from_the_start_makes_no_buffer():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = optim.SGD([{"params": [p], "nu": 0}], **FULL)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state
    optimizer.param_groups[0]["nu"] = 2
    with pytest.raises(ValueError, match=r"nu\[0\]: expected 0 or 1, got 2"):
        optimizer.step()


def test_the_operators_own_mask():
    p, b = torch.ones(3), torch.ones(3)
    torch.ops.twophase.sgd_(
        [p, p.clone()], [b.clone()] * 2, [b, b.clone()], [0, 1], [0, 1],
        0.1, 0.9, 0.0, 0.1, False, False,
    )  # fmt: skip
    assert torch.equal(p, torch.ones(3))
    assert torch.equal(b, torch.ones(3))


def test_empty_masks_stand_for_none():
    given = [torch.arange(1.0, 4.0), torch.ones(2, 2).t()]
    results = []
    for masks in (([], []), ([1, 1], [0, 0])):
        p = [t.clone() for t in given]
        g, b = [t + 1 for t in given], [t * 2 for t in given]
        for layout in (lambda t: t, lambda t: t[::2]):  # plain, and what the operator looks into
            lists = [[layout(t) for t in tensors] for tensors in (p, g, b)]
            torch.ops.twophase.sgd_(*lists, *masks, 0.1, 0.9, 0.0, 0.1, False, False)
        results.append([*p, *b])
    assert_equal(*results)


# ---- the optimizer


@pytest.mark.parametrize("first", [torch.optim.SGD, optim.SGD])
def test_state_dicts_load_into_each_other(first, tmp_path):
    second = optim.SGD if first is torch.optim.SGD else torch.optim.SGD
    straight, switched = make_params(torch.float64), make_params(torch.float64)
    a, b = torch.optim.SGD(straight, **FULL), first(switched, **FULL)
    for step in range(6):
        if step == 3:
            torch.save(b.state_dict(), tmp_path / "state.pt")
            b = second(switched, lr=1.0)
            b.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for params, optimizer in ((straight, a), (switched, b)):
            set_grads(params, step)
            optimizer.step()
    assert_equal(straight, switched)


def test_closure_groups_schedulers_and_missing_gradients():
    ours, theirs = make_params(torch.float64), make_params(torch.float64)
    runs = []
    for params, kind in ((ours, optim.SGD), (theirs, torch.optim.SGD)):
        optimizer = kind(
            [{"params": params[:3]}, {"params": params[3:], "lr": 0.01, "momentum": 0.0}], **FULL
        )
        runs.append((params, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)))
    for _ in range(5):
        for params, optimizer, scheduler in runs:

            def closure(params=params, optimizer=optimizer):
                optimizer.zero_grad()
                loss = sum((p * p).sum() for p in params[:-1])  # the last one has no gradient
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0
            scheduler.step()
    assert_equal(ours, theirs)
    assert ours[-1].grad is None
    copied = copy.deepcopy(runs[0][1])
    assert copied.param_groups[0]["nu"] == 1
    assert optim.SGD([torch.nn.Parameter(torch.ones(1))]).step() is None


# ---- the operator and what it refuses


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_opcheck(momentum, device):
    params = [torch.randn(5, device=device), torch.randn(4, 3, device=device).t()]
    buffers = [p.clone() for p in params] if momentum else []
    scalars = (0.1, momentum, 0.0, 0.01, False, False)
    opcheck(
        torch.ops.twophase.sgd_.default,
        (params, [p.clone() for p in params], buffers, [1, 0], [0, 0], *scalars),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_are_refused(dtype):
    good, bad = (torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, dtype))
    good.grad, bad.grad = torch.ones(3), torch.ones(3, dtype=dtype)
    optimizer = optim.SGD([{"params": [good], "lr": 0.2}, {"params": [bad]}], **FULL)
    with pytest.raises(TypeError, match="keep master weights in float32"):
        optimizer.step()
    assert torch.equal(good, torch.ones(3))


def test_sparse_gradients_are_refused():
    layer = torch.nn.Embedding(5, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"grads\[0\]: expected a dense tensor"):
        optim.SGD(layer.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": [torch.ones(3)]}, "grads: expected 2 entries, got 1"),
        ({"momentum_buffers": []}, "momentum_buffers: expected 2 entries, got 0"),
        ({"nu": [1]}, "nu: expected 2 entries, got 1"),
        ({"nu": [1, -1]}, r"nu\[1\]: expected 0 or 1, got -1"),
        ({"grads": [torch.ones(3), torch.ones(4)]}, r"grads\[1\]: expected shape"),
        ({"grads": [torch.ones(3), torch.ones(3).double()]}, r"grads\[1\]: expected dtype"),
        (
            {"momentum_buffers": [None, torch.ones(3, device="meta")]},
            r"momentum_buffers\[1\]: expected device",
        ),
    ],
)
def test_errors_change_nothing(change, message):
    params = [torch.ones(3), torch.ones(3)]
    arguments = {
        "grads": [torch.ones(3), torch.ones(3)],
        "momentum_buffers": [None, None],
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sgd_(params, lr=0.1, momentum=0.9, **arguments)
    assert all(torch.equal(p, torch.ones(3)) for p in params)
    assert not any(isinstance(b, torch.Tensor) for b in arguments["momentum_buffers"][:1])


def test_the_operator_checks_too():
    x, scalars = torch.ones(3), (0.1, 0.9, 0.0, 0.0, False, False)
    op, wrong = torch.ops.twophase.sgd_, torch.ones(1).expand(3)
    for arguments, message in (
        (([x], [], [x], [1], [1]), "grads: expected 1 entries"),
        (([x], [x], [], [1], [1]), "buffers: expected 1 entries"),
        (([x], [x], [x], [1, 1], [1]), "nu: expected 1 entries"),
        (([x], [x], [x], [1], [1, 1]), "is_first_step: expected 1 entries"),
        (([x], [x], [x], [3], [1]), r"nu\[0\]: expected 0 or 1, got 3"),
        (([x], [x.double()], [x], [1], [1]), r"grads\[0\]: expected the dtype"),
        (([x], [x[:2]], [x], [1], [1]), r"grads\[0\]: expected the shape"),
        (([x.half()], [x.half()], [x.half()], [1], [1]), r"params\[0\]: expected float32"),
        (([wrong], [x], [x], [1], [1]), r"params\[0\]: .*stride 0"),
        (([x], [x], [wrong], [1], [1]), r"buffers\[0\]: .*stride 0"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments, *scalars)
    assert torch.equal(x, torch.ones(3))
