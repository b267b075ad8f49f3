"""perturb_: the stream's definition, its accuracy and distribution, its independence of everything
but seed and name, and what is refused."""

import shutil
import subprocess
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from torch.library import opcheck

from helpers import ISAS, instruction_set
from twophase import reference
from twophase_ext.ops import perturb_

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ROUND = 2.0**-24  # half a unit in the last place of 1, in float32
ERROR = 5.3 * ROUND  # of z, relative: csrc/math/normal.h


def noise(numel: int, key: int = 123, *, device: str = "cpu") -> torch.Tensor:
    """The stream itself: noise of sigma 1 on zeros."""
    x = torch.zeros(numel, device=device)
    torch.ops.twophase.perturb_([x], [key], [1.0])
    return x.cpu()


def exact_normals(words: torch.Tensor) -> np.ndarray:
    """Box-Muller of Philox words [n, 4] in float64, the angle reduced exactly: [4 n]."""
    u = ((words.float() + 0.5) * 2.0**-32).double().numpy()
    radius, turn = np.sqrt(-2 * np.log(u[:, 0::2])), u[:, 1::2]
    quarter = np.round(4 * turn)
    sine, cosine = (f(2 * np.pi * (turn - quarter / 4)) for f in (np.sin, np.cos))
    pairs = [(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)]
    q = quarter.astype(int) % 4
    even, odd = (np.choose(q, [pair[i] for pair in pairs]) for i in (0, 1))
    return np.stack([radius * even, radius * odd], -1).reshape(-1)


def stream_words(numel: int, key: int) -> torch.Tensor:
    counter = torch.zeros(numel // 4, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(numel // 4)
    return reference.philox4x32_10((key % 2**32, key >> 32), counter)


# ---- definition


def test_accuracy(device):
    key, n = 0x0123456789ABCDEF, 400_000
    z, words = noise(n, key, device=device).double().numpy(), stream_words(n, key)
    exact = exact_normals(words)
    assert np.all(np.abs(z - exact) <= ERROR * np.abs(exact))
    for i in range(0, n, n // 300):  # the judge is judged
        pair = words[i // 4, i % 4 // 2 * 2 :][:2].float()
        with mpmath.workdps(40):
            a, b = (mpmath.mpf(u) for u in ((pair + 0.5) * 2.0**-32).tolist())
            trig = mpmath.sin if i % 2 else mpmath.cos
            judge = mpmath.sqrt(-2 * mpmath.log(a)) * trig(2 * mpmath.pi * b)
            assert abs(exact[i] - judge) <= 1e-14 * abs(judge)


def test_first_published_vector():
    words = torch.tensor([[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]])
    exact = exact_normals(words)
    assert np.all(np.abs(noise(4, key=0).numpy() - exact) <= ERROR * np.abs(exact))


PROGRAM = r"""
#define TP_ISA baseline
#include "cpu/kernels/perturb.cpp"
#include <cstdio>
using namespace twophase;
int main() {
  const uint32_t vectors[3][10] = {  // counter, key, result: Random123's kat_vectors
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff,
       0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0,
       0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
  int right = 0;
  for (const auto& v : vectors) {
    const PhiloxWords<uint32_t> w = philox4x32_10<uint32_t>({v[0], v[1], v[2], v[3]}, v[4], v[5]);
    right += w.w0 == v[6] && w.w1 == v[7] && w.w2 == v[8] && w.w3 == v[9];
  }
  // The vectorised kernel against the scalar code, across the carry into the counter's high word.
  const uint64_t key = 0xa4093822299f31d0ull, counter = (1ull << 32) - 100;
  float p[800] = {};
  baseline::perturb(Dtype::kFloat32, p, static_cast<int64_t>(4 * counter), 800, key, 1.0f);
  for (int i = 0; i < 800; i += 4) {
    const NormalBlock z = normal_block(key, counter + i / 4);
    right += p[i] == z.z0 && p[i + 1] == z.z1 && p[i + 2] == z.z2 && p[i + 3] == z.z3;
  }
  std::printf("%d", right);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_published_vectors_and_64_bit_counters(tmp_path):
    source, program = tmp_path / "kat.cpp", tmp_path / "kat"
    source.write_text(PROGRAM)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    assert subprocess.check_output([program], text=True) == str(3 + 200)


def test_twin(device, isa):
    shapes = {"a": (3, 5), "module.b.weight": (7,), "c": (), "_orig_mod.empty": (0, 4)}
    ours = {name: torch.randn(shape).to(device) for name, shape in shapes.items()}
    before = {name: t.clone() for name, t in ours.items()}
    twin = {name: t.clone().cpu() for name, t in ours.items()}
    for seed in (0, -1, 2**63, 5):
        assert perturb_(ours.items(), 0.25, seed=seed) is None
        reference.perturb_(twin, 0.25, seed=seed)
    for name, t in ours.items():
        scale = 4 * (t - before[name]).abs().cpu().clamp(min=1) + t.abs().cpu()
        assert torch.all((t.cpu() - twin[name]).abs() <= 2 * ERROR * scale)
        assert t.numel() == 0 or not torch.equal(t, before[name])


def test_seed_is_64_bits_and_wrappers_do_not_count(isa):
    a, b, c = torch.zeros(3, 9)
    perturb_({"x.weight": a}, 1.0, seed=-1)
    perturb_({"module._orig_mod.x.weight": b}, 1.0, seed=2**64 - 1)
    perturb_({"x.weight": c}, 1.0, seed=2**63 - 1)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# ---- the same bits whatever the machine does


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_gives_the_same_bits(dtype):
    results = []
    for isa in ISAS:
        x = torch.linspace(-3, 3, 100_003, dtype=dtype)
        with instruction_set(isa):
            torch.ops.twophase.perturb_([x], [99], [0.3])
        results.append(x)
    assert all(torch.equal(results[0], x) for x in results)


def test_every_thread_count_gives_the_same_bits(isa):
    sizes, results = [5, 200_001, 0, 64, 33_333], []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        tensors = {str(n): torch.zeros(n) for n in sizes}
        perturb_(tensors, 1.0, seed=3)
        results.append(torch.cat(list(tensors.values())))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_prefix(isa):
    whole = noise(70_000)
    for n in (1, 2, 3, 4, 5, 255, 256, 257, 16_385, 69_999):
        assert torch.equal(noise(n), whole[:n])


def test_neighbours_and_order_do_not_matter(device, isa):
    sizes = {"a": 1, "b": 70_001, "c": 63, "d": 5000}
    together = {name: torch.zeros(n, device=device) for name, n in sizes.items()}
    perturb_(together, 1.0, seed=8)
    for name, n in reversed(sizes.items()):
        alone = torch.zeros(n, device=device)
        perturb_([(name, alone)], 1.0, seed=8)
        assert torch.equal(alone, together[name])


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 1),
        lambda t: t[:, ::2],
        lambda t: t[1:, 1:],
        lambda t: t.unsqueeze(0).unsqueeze(-1).contiguous(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "offset", "channels_last"],
)
def test_elements_count_in_logical_order(view, device, isa):
    base = torch.randn(31, 18, device=device)
    before, x = base.clone(), view(base)
    flat = x.clone(memory_format=torch.contiguous_format)
    pointer, strides = x.data_ptr(), x.stride()
    perturb_({"w": x}, 0.5, seed=2)
    perturb_({"w": flat}, 0.5, seed=2)
    assert torch.equal(x, flat)
    assert (x.data_ptr(), x.stride()) == (pointer, strides)
    if x.untyped_storage().data_ptr() == base.untyped_storage().data_ptr():
        assert (base != before).sum() == x.numel()  # nothing beside the view was touched


def test_float64_takes_the_float32_stream(device, isa):
    p = torch.randn(1001, dtype=torch.float64, device=device)
    q = p.clone()
    perturb_({"w": q}, 1e-3, seed=4)
    z = torch.zeros(1001, device=device)
    perturb_({"w": z}, 1e-3, seed=4)
    assert torch.equal(q, p + z.double())


# ---- distribution


def test_distribution(device):
    z = noise(1_000_000, key=2024, device=device).double().numpy()
    assert scipy.stats.kstest(z, "norm").pvalue > 0.001
    for lane in range(4):
        assert scipy.stats.kstest(z[lane::4], "norm").pvalue > 0.001
    n = z.size
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.std() - 1) < 4 / (2 * n) ** 0.5
    for lag in (1, 2, 3, 4, 5):
        assert abs(np.mean(z[lag:] * z[:-lag])) < 4 / n**0.5
        assert abs(np.mean(z[lag:] ** 2 * z[:-lag] ** 2) - 1) < 4 * 8**0.5 / n**0.5


def test_every_tensor_has_its_sigma_and_its_own_noise():
    n = 100_000
    sigmas = {"a": 1e-3, "module.b": 2.5, "c": 1e-30}
    noises = {}
    for seed in (1, 2):
        tensors = {name: torch.zeros(n, dtype=torch.float64) for name in sigmas}
        perturb_(tensors, sigmas, seed=seed)
        for name, t in tensors.items():
            z = t / sigmas[name]
            assert abs(z.std() - 1) < 4 / (2 * n) ** 0.5
            assert abs(z.mean()) < 4 / n**0.5
            noises[name, seed] = z
    keys = list(noises)
    for i, a in enumerate(keys):
        for b in keys[:i]:
            assert abs((noises[a] * noises[b]).mean()) < 4 / n**0.5


# ---- the operator and what it refuses


def test_opcheck(device):
    tensors = [torch.randn(5, device=device), torch.randn(4, 3, device=device).t()]
    opcheck(torch.ops.twophase.perturb_.default, (tensors, [1, -2], [0.1, 0.2]))


def test_parameters_in_place():
    p = torch.nn.Parameter(torch.ones(6))
    loss = (p * p).sum()
    perturb_(torch.nn.ParameterDict({"p": p}).named_parameters(), 0.1, seed=0)
    assert p.requires_grad and p.grad_fn is None and not torch.equal(p, torch.ones(6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # autograd knows of the change


def test_arrays_share_memory():
    a, t = np.zeros((3, 5), np.float32), torch.zeros(3, 5)
    perturb_({"w": a}, 1.0, seed=1)
    perturb_({"w": t}, 1.0, seed=1)
    assert np.array_equal(a, t.numpy())
    a.flags.writeable = False
    with pytest.raises(ValueError, match="w: expected an array that can be written"):
        perturb_({"w": a}, 1.0, seed=1)


TIED = torch.ones(3)


@pytest.mark.parametrize(
    ("extra", "std", "error", "message"),
    [
        ([], 0.0, ValueError, "std of good: expected a finite number > 0"),
        ([], -1e-3, ValueError, "std of good"),
        ([], float("nan"), ValueError, "std of good"),
        ([], float("inf"), ValueError, "std of good"),
        ([], 1e-50, ValueError, "std of good"),
        ([], "much", TypeError, "std of good: expected a number"),
        ([], {}, ValueError, r"got none for \['good'\]"),
        ([], {"good": 0.1, "other": 0.1}, ValueError, r"got \['other'\]"),
        ([], {"good": 0.1, "module.good": 0.1}, ValueError, "'good' twice"),
        ([("x", torch.ones(2))], {"good": 0.1, "x": -0.1}, ValueError, "std of x"),
        ([("module.good", torch.ones(2))], 0.1, ValueError, "'good' twice"),
        ([("x", torch.ones(2, dtype=torch.float16))], 0.1, TypeError, "x: .*master weights"),
        ([("x", torch.ones(2, dtype=torch.bfloat16))], 0.1, TypeError, "x: .*master weights"),
        ([("x", torch.ones(2, dtype=torch.int64))], 0.1, TypeError, "x: .*got torch.int64"),
        ([("x", torch.ones(2).to_sparse())], 0.1, TypeError, "x: expected a dense tensor"),
        ([("x", torch.ones(1).expand(4))], 0.1, ValueError, "x: .*got stride 0"),
        ([("x", [1.0])], 0.1, TypeError, "x: expected a tensor or an array, got list"),
        ([(3, torch.ones(2))], 0.1, TypeError, "names of type str, got int"),
        ([("x", TIED), ("y", TIED.view(1, 3))], 0.1, ValueError, "y: .*that of 'x'"),
    ],
)
def test_errors_change_nothing(extra, std, error, message):
    good = torch.ones(5)
    with pytest.raises(error, match=message):
        perturb_([("good", good), *extra], std, seed=0)
    assert torch.equal(good, torch.ones(5))


def test_seed_is_checked():
    for seed, error in ((1.5, TypeError), (2**64, ValueError), (-(2**63) - 1, ValueError)):
        with pytest.raises(error, match="seed"):
            perturb_({"x": torch.ones(2)}, 0.1, seed=seed)


def test_the_operator_checks_too():
    op, x = torch.ops.twophase.perturb_, torch.ones(3)
    for arguments, message in (
        (([x], [], [1.0]), "keys: expected 1 entries"),
        (([x], [1], []), "stds: expected 1 entries"),
        (([x], [1], [0.0]), r"stds\[0\]"),
        (([x, x.half()], [1, 2], [1.0, 1.0]), r"tensors\[1\]: expected float32 or float64"),
        (([x, torch.ones(1).expand(2)], [1, 2], [1.0, 1.0]), r"tensors\[1\]: .*stride 0"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments)
    assert torch.equal(x, torch.ones(3))
