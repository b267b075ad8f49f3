"""What only a GPU can show; the operators' own tests run there too, by the fixture `device`."""

import pytest
import torch

import twophase_ext as tp

ops = torch.ops.twophase
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def step_arguments(b: int, k: int, m: int, dtype: torch.dtype, device: str) -> dict:
    return {
        "weight": (draw(k, m, dtype=dtype, seed=1) * 0.01).to(device),
        "bias": draw(k, dtype=dtype, seed=2).to(device),
        "weight_buffer": draw(k, m, dtype=dtype, seed=3).to(device) * 0.01,
        "bias_buffer": draw(k, dtype=dtype, seed=4).to(device) * 0.01,
        "h": draw(b, m, dtype=dtype, seed=5).to(device),
        "target": (torch.arange(b) % k).to(device),
    }


def step(a: dict, loss: int = 0) -> torch.Tensor:
    rule = (loss, 0.1, 0.9, 0.0, 1e-3, False, False)
    return ops.last_layer_step_(*a.values(), *rule)


def eager_step(a: dict, loss: int = 0) -> tuple[torch.Tensor, dict]:
    """The same step by autograd and torch.optim.SGD's formulas."""
    w, b = (a[name].clone().requires_grad_() for name in ("weight", "bias"))
    q = torch.nn.functional.linear(a["h"], w, b)
    if loss == 0:
        value = torch.nn.functional.cross_entropy(q, a["target"])
    else:
        value = (q - a["target"]).square().sum() / len(q)
    gradients = torch.autograd.grad(value, (w, b))
    after = {}
    for p, name, gradient in ((w, "weight", gradients[0]), (b, "bias", gradients[1])):
        buffer = 0.9 * a[f"{name}_buffer"] + gradient + 1e-3 * p.detach()
        after[f"{name}_buffer"] = buffer
        after[name] = p.detach() - 0.1 * buffer
    return value.detach(), after


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_smooth_max_pool(dtype):
    x = draw(4 * 6 * 30 * 31).view(4, 6, 30, 31).to(dtype)
    arguments = ([3, 2], [2, 2], [1, 0], [1, 2], True, 20.0)
    for formatted in (x, x.contiguous(memory_format=torch.channels_last)):
        y = ops.smooth_max_pool(formatted, *arguments)
        ours = ops.smooth_max_pool(formatted.cuda(), *arguments)
        assert ours.stride() == y.stride()
        torch.testing.assert_close(ours.cpu(), y)
        grad = draw(y.numel(), seed=1).view(y.shape).to(dtype)
        by_x = ops.smooth_max_pool_backward(grad.cuda(), formatted.cuda(), *arguments)
        again = ops.smooth_max_pool_backward(grad.cuda(), formatted.cuda(), *arguments)
        assert torch.equal(by_x, again)
        expected = ops.smooth_max_pool_backward(grad, formatted, *arguments)
        torch.testing.assert_close(by_x.cpu(), expected)


@pytest.mark.skipif(tp.build_info()["isa"] == "baseline", reason="no fused multiply-add here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_softplus_has_the_cpus_bits(dtype):
    x, grad = (draw(100_003) * 0.3).to(dtype), draw(100_003, seed=1).to(dtype)
    y = ops.softplus(x, 100.0)
    assert torch.equal(ops.softplus(x.cuda(), 100.0).cpu(), y)
    backward = ops.softplus_backward(grad.cuda(), y.cuda(), 100.0)
    assert torch.equal(backward.cpu(), ops.softplus_backward(grad, y, 100.0))
    arguments = (x, grad, y)
    ours = ops.softplus_double_backward(*(t.cuda() for t in arguments), 100.0)
    for a, b in zip(ours, ops.softplus_double_backward(*arguments, 100.0), strict=True):
        assert torch.equal(a.cpu(), b)


def test_softplus_beyond_32_bits():
    n = 2**31 + 5
    x = torch.full((n,), -0.01, dtype=torch.float16, device="cuda")
    x[-1] = 0.5
    x[2**31 - 1] = 0.25
    tp.softplus_(x, 100.0)
    expected = tp.softplus(torch.tensor([-0.01, 0.25, 0.5], dtype=torch.float16), 100.0)
    assert x[[0, 2**31 - 1, n - 1]].cpu().tolist() == expected.tolist()
    assert bool((x[2**31 :][:-1] == expected[0].item()).all())


def test_noise_has_the_cpus_bits_for_many_tensors():
    # More tensors than one launch's table holds; sizes around a block's chunk; both dtypes.
    sizes = [1 + 7 * i % 5000 for i in range(1700)]
    cpu = [
        draw(n, dtype=torch.float64 if i % 3 == 0 else torch.float32, seed=i)
        for i, n in enumerate(sizes)
    ]
    cuda = [t.cuda() for t in cpu]
    keys, stds = list(range(len(cpu))), [0.1 + 1e-3 * i for i in range(len(cpu))]
    ops.perturb_(cpu, keys, stds)
    ops.perturb_(cuda, keys, stds)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu, cuda, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_has_the_cpus_bits_for_many_tensors(momentum):
    n = 1500
    tensors = [[draw(1 + 11 * i % 6000, seed=i + s * n) for i in range(n)] for s in range(3)]
    cuda = [[t.cuda() for t in group] for group in tensors]
    nu, is_first_step = [i % 4 != 0 for i in range(n)], [i % 2 for i in range(n)]
    for p, g, b in (tensors, cuda):
        rule = (0.1, momentum, 0.0, 1e-2, momentum != 0, False)
        ops.sgd_(p, g, b if momentum else [], list(map(int, nu)), is_first_step, *rule)
    for group, other in zip(tensors, cuda, strict=True):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(group, other, strict=True))


@pytest.mark.parametrize("loss", [0, 1])
@pytest.mark.parametrize("shape", [(64, 10, 66_001), (7, 1000, 513), (1000, 10, 2049), (1, 1, 1)])
def test_last_layer_step(shape, loss):
    a = step_arguments(*shape, torch.float32, "cuda")
    if loss:
        a["target"] = draw(shape[0], shape[1], seed=6).cuda()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in a.items()}
    truth_loss, truth = eager_step(wide, loss)
    _, torch_after = eager_step(a, loss)
    again = {name: tensor.clone() for name, tensor in a.items()}
    value = step(a, loss)
    torch.testing.assert_close(value.double(), truth_loss, rtol=1e-5, atol=1e-6)
    for name, expected in truth.items():
        ours = (a[name].double() - expected).abs().max()
        theirs = (torch_after[name].double() - expected).abs().max()
        # twice torch's own error; where torch happens to be exact, a few roundings
        floor = 4 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert ours <= 2 * theirs + floor, name
    assert torch.equal(step(again, loss), value)  # deterministic, bit by bit
    assert all(torch.equal(again[name], a[name]) for name in truth)


def test_last_layer_step_refuses_a_label_before_anything_changes():
    a = step_arguments(5, 3, 40, torch.float32, "cuda")
    a["target"][3] = 3
    before = {name: tensor.clone() for name, tensor in a.items()}
    with pytest.raises(ValueError, match=r"expected labels from 0 to 2, got 3 in row 3"):
        step(a)
    assert all(torch.equal(a[name], before[name]) for name in a)


# 164: the largest square that lies in shared memory on this chip; 165: global scratch.
@pytest.mark.parametrize("n", [1, 31, 64, 164, 165, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_logdet_is_the_cpus(n, dtype):
    x = draw(5, n, n + 9, dtype=dtype)
    x[1, n // 2] = x[1, 0]  # rank n - 1 (n for n = 1)
    x[2] *= 2.0**40
    x[3, 0, 0] = float("nan")
    rank, logabsdet, info = ops.gram_logdet(x, True)
    cuda_rank, cuda_logabsdet, cuda_info = (t.cpu() for t in ops.gram_logdet(x.cuda(), True))
    assert rank.tolist() == cuda_rank.tolist() == [n, max(n - 1, 1), n, 0, n]
    assert info[[0, 2, 3, 4]].tolist() == cuda_info[[0, 2, 3, 4]].tolist() == [0, 0, -1, 0]
    regular = [0, 2, 4]
    eps = torch.finfo(torch.float64).eps
    cond = torch.linalg.cond(x[regular].double()).square()
    bound = eps * (n * n * cond + 8 * (logabsdet[regular].abs() + n))
    assert ((logabsdet - cuda_logabsdet)[regular].abs() <= bound).all()


def graph_of(call, warm_up: bool = True) -> torch.cuda.CUDAGraph:
    """A captured graph of `call`: capture fails for work outside the current stream."""
    if warm_up:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()
        side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def test_kernels_run_on_the_current_stream():
    x = draw(1000).cuda() * 0.3
    y = torch.empty_like(x)
    noisy, p, g, b = (torch.zeros(500, device="cuda") for _ in range(4))
    g.fill_(1.0)
    state = step_arguments(8, 3, 200, torch.float32, "cuda")
    loss = torch.empty((), device="cuda")
    features = draw(2, 20, 30).cuda()
    rank = torch.empty(2, dtype=torch.int64, device="cuda")

    def call():
        y.copy_(tp.softplus(x, 100.0))
        ops.perturb_([noisy], [1], [1.0])
        ops.sgd_([p], [g], [b], [1], [1], 0.5, 0.9, 0.0, 0.0, False, False)
        loss.copy_(step(state))
        rank.copy_(ops.gram_logdet(features, True)[0])

    graph = graph_of(call)
    y.zero_(), noisy.zero_(), p.zero_(), rank.zero_()
    expected_loss, expected_state = eager_step(state)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, tp.softplus(x, 100.0))
    assert bool((noisy != 0).any()) and bool((p == -0.5).all())
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(state["weight"], expected_state["weight"])
    assert rank.tolist() == [20, 20]


def test_a_label_out_of_range_in_a_graph_gives_nan():
    state = step_arguments(4, 3, 50, torch.float32, "cuda")
    loss = torch.empty((), device="cuda")
    graph = graph_of(lambda: loss.copy_(step(state)))
    state["target"][1] = 99
    graph.replay()
    assert torch.isnan(loss).item() and torch.isnan(state["weight"]).any().item()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_is_used():
    x = draw(1000).cuda(1)
    assert torch.cuda.current_device() == 0
    assert torch.equal(tp.softplus(x).cpu(), tp.softplus(x.cuda(0)).cpu())
    assert torch.cuda.current_device() == 0


def test_an_empty_tensor_launches_nothing():
    empty = torch.empty(0, 3, device="cuda")
    assert tp.softplus(empty).shape == (0, 3)
    ops.perturb_([empty], [1], [1.0])
    rank, logabsdet, info = ops.gram_logdet(torch.empty(2, 0, 3, device="cuda"), True)
    assert (rank.tolist(), logabsdet.tolist(), info.tolist()) == ([0, 0], [0.0, 0.0], [0, 0])


@pytest.mark.parametrize("h_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "k", "m", "batch"),
    [
        (200, 10, 66_001, 64),  # persistent
        (100, 3, 7, 9),
        (70, 200, 3000, 16),  # too many outputs for shared memory
        (200, 5, 500, 100),  # more rows than a tile has
    ],
)
def test_epoch_persistent_and_step_by_step(n, k, m, batch, h_dtype):
    """Both ways of last_layer_epoch_ against the CPU; the same bits again."""
    dtype = torch.float64 if h_dtype == torch.float64 else torch.float32
    h = (torch.rand(n, m, generator=torch.Generator().manual_seed(0)) / m**0.5).to(h_dtype)
    y, order = torch.arange(n) % k, torch.randperm(n)
    start = draw(k, m, dtype=dtype, seed=1)
    rule = {
        "batch_size": batch,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-3,
        "is_first_step": True,
    }
    results = []
    for device in ("cpu", "cuda", "cuda"):
        weight, bias = start.clone().to(device), torch.zeros(k, dtype=dtype, device=device)
        buffers = torch.empty_like(weight), torch.empty_like(bias)
        losses = tp.ops.last_layer_epoch_(
            weight, bias, *buffers, h.to(device), y.to(device), order, **rule
        )
        results.append([t.cpu() for t in (losses, weight, bias, *buffers)])
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    for a, b, c in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        assert torch.equal(b, c)
