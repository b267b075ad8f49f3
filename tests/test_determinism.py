"""The rows of docs/determinism.md: each names a test, and what has no test elsewhere is here."""

import ast
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import twophase_ext as tp
from determinism_cases import digest, operators, report, verdicts
from helpers import ISAS, instruction_set, quiet, toy_data, toy_mlp
from test_last_layer_epoch import Problem
from twophase_ext import ops
from twophase_ext.core.hashing import hash_tensors
from twophase_ext.core.seeds import epoch_order
from twophase_ext.training.phases import SECOND

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "determinism.md"
ISA = tp.build_info()["isa"]


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the table


def rows(text: str = PAGE.read_text(encoding="utf-8")) -> list[list[str]]:
    """[what, against, bits, test] of every row."""
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    cells = [line.split(" | ") for line in lines]
    return [row for row in cells if row[0] not in ("what", "") and not row[0].startswith("---")]


def named(cell: str) -> list[tuple[str, str]]:
    return re.findall(r"`(test_\w+)::(test_\w+)`", cell)


@functools.cache
def functions_of(file: Path) -> dict[str, list[str]]:
    """The functions' names, with those of their arguments."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = (f for f in tree.body if isinstance(f, ast.FunctionDef))
    return {f.name: [a.arg for a in f.args.args] for f in functions}


def test_every_row_names_a_test_that_exists():
    found = rows()
    assert len(found) > 30
    for row in found:
        assert len(row) == 4, row
        what, _, promise, tests = row
        assert promise in ("same", "to rounding", "not promised"), row
        where = named(tests)
        assert where or promise == "not promised", row
        for file, test in where:
            assert test in functions_of(TESTS / f"{file}.py"), row
        only = bool(where) and all(file == "test_cuda" for file, _ in where)
        assert only == tests.startswith("GPU: "), (what, tests)


def test_bits_of_operators_are_compared_on_every_instruction_set():
    """Another machine has another one: a promise that this one alone keeps is none."""
    section = PAGE.read_text(encoding="utf-8").split("## Operators")[1].split("\n## ")[0]
    promises = [row for row in rows(section) if row[2] == "same" and "GPU: " not in row[3]]
    assert len(promises) > 20
    for row in promises:
        for file, test in named(row[3]):
            given = functions_of(TESTS / f"{file}.py")[test]
            all_of_them = "isa" in given or "instruction_set" in test or "another_process" in test
            assert all_of_them, (row, test)


def test_every_operator_and_phase_has_a_row():
    what = " ".join(row[0] for row in rows())
    functions = [name for name in ops.__all__ if name != "logit_error_constant"]  # an integer
    phases = [f'"{name}"' for name in (*SECOND, "hidden", "disk")]
    for name in (*functions, *phases, '"backbone"', '"hidden-bfloat16"', "stream_seed", "branch"):
        assert name in what, name
    # each other test of these files is the test of a row
    files = ("test_determinism", "test_determinism_runs")
    used = {test for row in rows() for file, test in named(row[3]) if file in files}
    own = {name for file in files for name in functions_of(TESTS / f"{file}.py")}
    assert {name for name in own if name.startswith("test_")} - used == {
        "test_bits_of_operators_are_compared_on_every_instruction_set",
        "test_every_row_names_a_test_that_exists",
        "test_every_operator_and_phase_has_a_row",
    }


# ---- operators


def same(a: dict[str, list[torch.Tensor]], b: dict[str, list[torch.Tensor]]) -> None:
    for name in a:
        assert digest(a[name]) == digest(b[name]), name


def test_every_operator_again(device, isa):
    first, again = operators(device), operators(device)
    if device == "cuda":  # cuBLAS's products and torch's sums
        first = {name: parts for name, parts in first.items() if "gradient" not in name}
    same(first, again)


def test_every_operator_for_any_number_of_threads(isa):
    """With the derivatives of softplus, which its own test leaves out."""
    first = operators()
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        same(first, operators())


@pytest.mark.parametrize("other", ISAS)
def test_every_instruction_set_to_rounding(other):
    expected = operators()
    with instruction_set(other):
        found = operators()
    for name, parts in expected.items():
        tolerance = 1e-12 if "float64" in name else 1e-5
        for a, b in zip(found[name], parts, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


def test_memory_layout_of_sgd(isa):
    g = torch.Generator().manual_seed(1)
    base = [torch.randn(40, 60, generator=g) for _ in range(3)]
    rule = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
    for view in (
        lambda t: t.T,
        lambda t: t[::2, 1:],
        lambda t: t.view(2, 20, 6, 10).to(memory_format=torch.channels_last),
    ):
        p, grad, buffer = (view(t.clone()) for t in base)
        packed = [t.clone(memory_format=torch.contiguous_format) for t in (p, grad, buffer)]
        ops.sgd_([p], [grad], [buffer], **rule)
        ops.sgd_([packed[0]], [packed[1]], [packed[2]], **rule)
        assert torch.equal(p, packed[0]) and torch.equal(buffer, packed[2])


def test_order_and_company_of_sgd(isa):
    g = torch.Generator().manual_seed(1)
    sizes = (5, 30_001, 64, 0, 700)
    params, grads = ([torch.randn(n, generator=g) for n in sizes] for _ in range(2))
    alone, together, reversed_ = ([p.clone() for p in params] for _ in range(3))
    for p, grad in zip(alone, grads, strict=True):
        ops.sgd_([p], [grad], [None], lr=0.1, weight_decay=1e-2)
    ops.sgd_(together, grads, [None] * 5, lr=0.1, weight_decay=1e-2)
    ops.sgd_(reversed_[::-1], grads[::-1], [None] * 5, lr=0.1, weight_decay=1e-2)
    for a, b, c in zip(alone, together, reversed_, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_row_strides_of_the_gradient(isa):
    problem = Problem(70, 10, 1031, 16)
    layer = (problem.weight, problem.bias)
    expected = ops.last_layer_gradient(*layer, problem.h, problem.y)
    wide = torch.full((140, 1050), torch.nan)
    rows = wide[::2, 3:1034]
    rows.copy_(problem.h)
    for h in (rows, problem.h.T.contiguous().T):
        found = ops.last_layer_gradient(*layer, h, problem.y)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- seeds


def test_seeds_are_hashes():
    for seed, name, position in ((1, "noise", ()), (-3, "shuffle", (7,)), (5, "augment", (2, 9))):
        text = "/".join(map(str, (seed, name, *position))).encode()
        expected = int(hashlib.sha256(text).hexdigest()[:16], 16).to_bytes(8, "big")
        assert tp.stream_seed(seed, name, *position) == int.from_bytes(expected, "little") // 2


@pytest.mark.parametrize("n", [1, 2, 33, 1000])
def test_order_is_a_mersenne_twister_shuffle(n):
    """torch.randperm as it is now; a torch that draws otherwise fails here."""
    source = np.random.RandomState(tp.stream_seed(3, "shuffle", 4) % 2**32)
    expected = np.arange(n)
    for i in range(n - 1):
        j = i + int(source._bit_generator.random_raw()) % (n - i)
        expected[[i, j]] = expected[[j, i]]
    assert epoch_order(3, 4, n).tolist() == expected.tolist()


def test_noise_is_pinned(isa):
    """The bits of this version: another torch, compiler or processor must not change them."""
    tensors = {"a": torch.zeros(10_007), "b.weight": torch.zeros(33, 3, dtype=torch.float64)}
    tp.perturb_(tensors, {"a": 1.0, "b.weight": 0.01}, seed=42)
    assert digest(tensors.values()) == NOISE


NOISE = "b0b1ad8e03570b0548d20bbcdec5bfe17e6a79fca9fbadb66768341a9420735e"


def test_the_callers_random_state_is_untouched_by_a_verification():
    x, y = toy_data()
    model, before = toy_mlp(), torch.get_rng_state()
    quiet(model, verify="auto").fit((x, y))
    for w in ("current", "init", "witness"):
        tp.verify_expressivity(model, x, w=w)
    tp.check_assumptions(model, x)
    assert torch.equal(before, torch.get_rng_state())


# ---- verdicts


def test_the_same_verdict_again():
    assert verdicts.__wrapped__() == verdicts()


def test_another_number_of_threads_proves_the_same():
    """Status, claim, method; bounds to rounding: recheck allows a thousandth."""
    x, _ = toy_data()
    for w in ("witness", "current"):
        torch.set_num_threads(1)
        one = tp.verify_expressivity(toy_mlp(), x, w=w, method="certificate")
        torch.set_num_threads(2)
        two = tp.verify_expressivity(toy_mlp(), x, w=w, method="certificate")
        for name in ("status", "claim", "factorization", "culprits", "hashes"):
            assert getattr(two, name) == getattr(one, name)
        for name in ("sigma_min_lower", "logabsdet_lower"):
            assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-6)
        assert one.recheck(toy_mlp(), x, say=lambda _: None)


def test_hashes_do_not_see_batches_strides_or_containers():
    x = torch.randn(30, 4, 5)
    whole = hash_tensors([x])
    assert whole == hash_tensors([x[:7], x[7:8], x[8:]])
    assert whole == hash_tensors([x.transpose(1, 2).contiguous().transpose(1, 2)])
    assert whole == hash_tensors([torch.from_numpy(x.double().numpy())])
    assert whole != hash_tensors([x.flip(0)])


def test_numbers_of_torch_s_products_again(isa):
    """rank_logdet, ntk_rank and guarantee: the same call, the same bits."""
    x, y = toy_data(40)
    model = toy_mlp()
    h = torch.randn(40, 90, generator=torch.Generator().manual_seed(0))
    for call in (
        lambda: tp.rank_logdet(h),
        lambda: ops.gram_logdet(torch.cat([h] * 8)),
        lambda: tp.ntk_rank(model, x),
        lambda: tp.guarantee((h, y), torch.zeros(3, 90), torch.zeros(3), steps=[1, 5, 9]),
    ):
        assert str(call()) == str(call())


# ---- other processes and instruction sets


def child(command: str, folder: Path, isa: str) -> list[str]:
    """Lines of `python determinism_cases.py command`, with another order of Python's sets."""
    environment = {**os.environ, "TWOPHASE_ISA": isa, "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "determinism_cases.py"), command, str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_another_process(tmp_path):
    (line,) = child("report", tmp_path, ISA)
    assert json.loads(line) == report()


@pytest.mark.slow
@pytest.mark.parametrize("other", [isa for isa in ISAS if isa != ISA])
def test_another_instruction_set(tmp_path, other):
    """Another process has this one's bits on that set; and those of this one's set, perturb_ and
    sgd_, and softplus where both multiply and add in one. recheck holds."""
    x, _ = toy_data()
    written = tp.verify_expressivity(toy_mlp(), x, w="witness", method="certificate")
    written.save(tmp_path / "verdict.json")
    used, digests, holds = map(json.loads, child("other", tmp_path, other))
    assert used == other and holds
    with instruction_set(other):
        assert digests == {name: digest(parts) for name, parts in operators().items()}
    bit_stable = ("perturb_", "sgd_", *(["softplus"] if "baseline" not in (other, ISA) else []))
    compared = 0
    for name, parts in operators().items():
        if name.startswith(bit_stable):
            compared += 1
            assert digests[name] == digest(parts), name
    assert compared >= 4
