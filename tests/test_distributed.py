"""The certificate over ranks in a grid: threads as ranks; mpirun and ScaLAPACK where installed."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from liars import CASES, LIARS, duplicated, normal, off_by, smallest
from twophase_ext.expressivity.certify import WideSource, certify_matrix
from twophase_ext.expressivity.one_sided import exact_softplus
from twophase_ext.linalg import distributed, scalapack, shift
from twophase_ext.linalg.bounds import gamma
from twophase_ext.linalg.certificate import certify_gram
from twophase_ext.linalg.distributed import certify_distributed, rank_bytes
from twophase_ext.linalg.gram_tiles import MatrixSource
from twophase_ext.linalg.in_place import potrf_in_place
from twophase_ext.linalg.progress import Stages

MPI_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # containers have no ssh, and forbid processes to read one another's memory
    "OMPI_MCA_plm": "isolated",
    "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
}
pytestmark = pytest.mark.usefixtures("one_thread")


class Shared:
    """What threads that play the ranks of one grid have in common."""

    def __init__(self, grid, potrf):
        (P, Q) = self.grid = grid
        self.potrf = potrf
        self.barriers = {"all": threading.Barrier(P * Q)}
        self.barriers |= {("Row", p): threading.Barrier(Q) for p in range(P)}
        self.barriers |= {("Column", q): threading.Barrier(P) for q in range(Q)}
        self.slots = {}


class ThreadRanks:
    """One rank (block_cyclic.Ranks): messages are copies, the library works on the whole matrix."""

    def __init__(self, shared, place):
        self.shared, self.grid, self.place = shared, shared.grid, place
        self.sent = 0

    def _wait(self, name="all"):
        self.shared.barriers[name].wait(timeout=60)

    def broadcast(self, scope, values, root):
        assert values.is_contiguous() and values.dtype == torch.float64
        own, line = self.place[::-1] if scope == "Row" else self.place
        if own == root:
            self.shared.slots[scope, line] = values.clone()
            self.sent += values.numel()
        self._wait((scope, line))
        values.copy_(self.shared.slots[scope, line].view_as(values))
        self._wait((scope, line))

    def total(self, values):
        self.shared.slots[self.place] = values.clone()
        self._wait()
        parts = [self.shared.slots[p, q] for p in range(self.grid[0]) for q in range(self.grid[1])]
        values.copy_(sum(parts[1:], parts[0]))
        self._wait()
        return values

    def _whole(self, local, n, block, change):
        """Gather the matrix, let one rank change it, scatter it."""
        (P, Q), (p, q) = self.grid, self.place
        i = torch.arange(n)
        rows, columns = i[i // block % P == p], i[i // block % Q == q]
        if self.place == (0, 0):
            self.shared.matrix = local.new_zeros(n, n)
        self._wait()
        self.shared.matrix[rows[:, None], columns] = local.T
        self._wait()
        if self.place == (0, 0):
            self.shared.answer = change(self.shared.matrix)
        self._wait()
        local.copy_(self.shared.matrix[rows[:, None], columns].T)
        answer = self.shared.answer
        self._wait()
        return answer

    def mirror(self, local, n, block):
        def change(matrix):
            below = torch.arange(n)[:, None] // block > torch.arange(n) // block
            matrix.copy_(torch.where(below, matrix.T, matrix))

        self._whole(local, n, block, change)

    def potrf(self, local, n, block):
        return self._whole(local, n, block, self.shared.potrf)


def certify(m, *, block_of=None, grid=(2, 2), potrf=potrf_in_place, ones=False, **more):
    """Every rank's certificate of [m] or [m, 1]; block_of: instead of m's own blocks."""
    block_of = block_of or (lambda i0, i1, j0, j1: m[i0:i1, j0:j1])
    shared, results, errors = Shared(grid, potrf), {}, []

    def work(place):
        try:
            ranks = ThreadRanks(shared, place)
            results[place] = certify_distributed(block_of, *m.shape, ranks, ones=ones, **more)
        except Exception as error:
            errors.append(error)
            for barrier in shared.barriers.values():
                barrier.abort()

    places = [(p, q) for p in range(grid[0]) for q in range(grid[1])]
    threads = [threading.Thread(target=work, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    proofs = [results[place] for place in places]
    assert all(repr(proof.constants()) == repr(proofs[0].constants()) for proof in proofs)
    return proofs[0]


# --- a library that works


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize(
    ("n", "block", "panel"), [(1, 4, 9), (37, 5, 8), (60, 16, 200), (64, 8, 13)]
)
def test_as_the_single_process(n, block, panel, grid):
    m = normal(n, 2 * n + 3)
    c = certify(m, grid=grid, block=block, panel=panel)
    single = certify_gram(MatrixSource(m), panel=panel)
    assert c.proved and single.proved and c.failed_pivot is None
    assert single.ell * (1 - 1e-9) <= c.ell <= smallest(m)
    assert c.shift == pytest.approx(single.shift, rel=1e-9)
    assert c.e_G == pytest.approx(single.e_G, rel=1e-12)
    roundings = gamma(min(block, n) + math.ceil(n / block)) * (c.trace - n * c.shift)
    assert 0.999 * roundings <= c.e_C <= 3 * single.e_C + 1e-15
    assert c.logdet_lower <= float(torch.linalg.slogdet(m @ m.T)[1])
    assert c.logdet_lower == pytest.approx(single.logdet_lower, abs=1e-9)
    assert c.trace == pytest.approx(float(m.square().sum()), rel=1e-12)
    assert c.passes == 1 and c.tile == block


def test_the_ones_column_counts():
    m = normal(40, 39)
    assert not certify(m, block=8, panel=7).proved
    c = certify(m, block=8, panel=7, ones=True)
    whole = torch.cat([m, torch.ones(40, 1, dtype=torch.float64)], 1)
    assert c.proved and c.columns == 40 and c.ell <= smallest(whole)
    assert c.ell == pytest.approx(certify_gram(MatrixSource(whole)).ell, rel=1e-9)
    assert certify(m[:, :0][:1], ones=True, block=8).proved  # M = [1]


def test_a_wide_layer_and_its_exact_function():
    weight, bias = 3 * normal(60, 8, 1), normal(60, 1, 2)[:, 0]
    source = WideSource(normal(40, 8), weight, bias, exact_softplus(10.0), True)
    h = source.panel(0, 60)
    proof = certify(h, block_of=source.block, ones=True, block=8, panel=11, scale_rows=False)
    single = certify_gram(source, panel=11, scale_rows=False)
    assert proof.proved and proof.ell == pytest.approx(single.ell, rel=1e-6)
    common = {"factorization": "gram", "folder": None, "stages": Stages(False, None)}
    common |= {"assumptions": [], "constants": {}}
    found = certify_matrix(source, 1e-6, gram=proof, **common)
    assert found.status == "proved" and found.constants["gram"]["storage"] == proof.storage
    assert found.sigma_min_lower == pytest.approx(math.sqrt(proof.ell) - 1e-6, abs=1e-9)
    assert "messages between ranks arrive unchanged" in found.assumptions
    assert certify_matrix(source, 1e9, gram=proof, **common).status == "full rank"


def test_each_entry_is_asked_for_once_and_none_keeps_them_all():
    m, asked = normal(50, 70), torch.zeros(50, 70)
    lock = threading.Lock()

    class Watched:
        shape = m.shape

        def __getitem__(self, key):
            with lock:
                asked[key] += 1
            assert m[key].numel() <= 8 * 11
            return m[key].numpy()

    assert certify(Watched(), block=8, panel=11).proved
    assert bool((asked == 1).all())


@pytest.mark.parametrize("exponent", [-400, -60, 40, 400])
def test_scaled_rows(exponent):
    even = normal(30, 50)
    m = even.clone()
    m[::2] *= 2.0**exponent
    c = certify(m, block=8)
    assert c.row_exponents != (0, 0)
    if abs(exponent) < 100:  # beyond, squares underflow or overflow: undecided
        assert c.proved and c.sigma_min_lower <= float(torch.linalg.svdvals(m)[-1])
        truth = float(torch.linalg.slogdet(even @ even.T)[1]) + 30 * exponent * math.log(2)
        assert truth - 20 < c.logdet_lower <= truth


def test_a_shift_that_is_too_high_is_lowered(monkeypatch):
    m = normal(60, 90)
    truth = smallest(m)
    monkeypatch.setattr(distributed, "shifts_to_try", lambda *_: [9 * truth, truth / 2])
    c = certify(m, block=8)
    assert c.proved and c.attempts == 2 and truth / 3 < c.ell <= truth / 2
    assert not certify(m, block=8, shift=9 * truth).proved


def test_the_shift_comes_from_the_same_subsamples(monkeypatch):
    monkeypatch.setattr(shift, "SMALLEST", 9)
    m = normal(70, 100)
    c, single = certify(m, block=8, grid=(2, 3)), certify_gram(MatrixSource(m))
    assert [rows for rows, _ in c.lambda_estimates] == [4, 9]
    for (_, found), (_, expected) in zip(c.lambda_estimates, single.lambda_estimates, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("m", [duplicated(40, 60), normal(40, 30), torch.zeros(5, 9).double()])
def test_deficient_is_not_proved(m):
    c = certify(m, block=8)
    assert c.status == "not proved" and c.reason and not c.ell > 0 and c.logdet_lower is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_not_finite(value):
    m = normal(9, 12)
    m[3, 4] = value
    assert certify(m, block=2).status == "not finite"
    assert certify(m, block=2, scale_rows=False).status == "not finite"


# --- a library that lies


@pytest.mark.parametrize("liar", LIARS)
@pytest.mark.parametrize("case", CASES)
def test_never_above_the_truth(case, liar):
    m = CASES[case]
    truth = smallest(m)
    deficient = case in ("duplicate", "low rank", "zero")
    for s in (None, 1e-160, 1e-12, 0.5, max(truth, 1e-300)):
        c = certify(m, shift=s, potrf=LIARS[liar], panel=16, block=7, grid=(1, 2))
        assert not (c.proved and deficient), (s, c)
        assert not c.ell > truth * (1 + 1e-12), (s, c)
        if c.proved:
            assert c.logdet_lower <= float(torch.linalg.slogdet(m @ m.T)[1]) + 1e-9


def test_a_slightly_wrong_factor_still_proves_what_it_can():
    m = normal(40, 90)
    exact = certify(m, block=8)
    wrong = certify(m, block=8, potrf=off_by(1e-6))
    assert wrong.proved and 0.9 * exact.ell < wrong.ell < exact.ell
    assert wrong.e_C > 1e4 * exact.e_C


def test_a_residual_too_small_to_be_squared_counts():
    m = torch.zeros(4, 6, dtype=torch.float64)
    c = certify(m, block=2, shift=1e-200, potrf=LIARS["zeros"])
    assert not c.proved and c.e_C > 1e-200


@pytest.mark.parametrize("place", [(0, 39), (7, 8), (20, 31)])
def test_a_library_that_writes_above_the_diagonal_is_found(place):
    def potrf(matrix):
        info = potrf_in_place(matrix)
        matrix[place] = torch.nextafter(matrix[place], torch.tensor(9e9, dtype=torch.float64))
        return info

    c = certify(normal(40, 60), block=8, potrf=potrf)
    assert not c.proved and "above the diagonal" in c.reason


def test_a_transposition_that_is_wrong_costs_the_proof_only(monkeypatch):
    monkeypatch.setattr(ThreadRanks, "mirror", lambda *_: None)
    c = certify(normal(40, 60), block=8, shift=1e-3)
    assert not c.proved


def test_a_false_breakdown_is_a_result():
    c = certify(normal(20, 30), block=8, potrf=lambda matrix: 7)
    assert not c.proved and c.failed_pivot == 6 and c.attempts >= 2


def test_messages_of_wrong_arguments():
    m = normal(6, 9)
    for more, text in (
        ({"block": 0}, "block: expected 1 or more, got 0"),
        ({"panel": 0}, "panel: expected 1 or more, got 0"),
        ({"shift": -1}, "shift: expected a positive number, got -1"),
    ):
        with pytest.raises(ValueError, match=text):
            certify(m, **more)
    # of the rank that asks first: (0, 0) or the one below
    asked = r"block_of\((0, 4|4, 6), 0, 9\): expected float64 \[[42], 9\], got"
    with pytest.raises(ValueError, match=asked):
        certify(m.float(), block=4)
    ranks = ThreadRanks(Shared((2, 2), potrf_in_place), (0, 0))
    with pytest.raises(ValueError, match="use more ranks"):
        certify_distributed(lambda *_: m, 100_000, 100_000, ranks)


def test_memory_of_a_rank():
    # 2 x 3 ranks: 18 x 18 blocks of 100 rows, 9 x 6 of them on each; parts of 300 rows
    shared = 900 * 600 + 4 * 100 * (900 + 600) + 2 * scalapack.PART
    by_panels = 8 * (shared + 2000 * (2 * 900 + 600 + 2 * 300))
    assert rank_bytes(1800, 2000, (2, 3), block=100, panel=3000) == by_panels
    by_subsample = 8 * (shared + 5 * 512**2)
    assert rank_bytes(1800, 2000, (2, 3), block=100, panel=10) == by_subsample


# --- the library


def test_the_squarest_grid():
    assert [scalapack.squarest(k) for k in (1, 2, 4, 6, 7, 1024)] == [
        (1, 1),
        (1, 2),
        (2, 2),
        (2, 3),
        (1, 7),
        (32, 32),
    ]


def test_without_scalapack(monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(RuntimeError, match="ScaLAPACK: expected one of scalapack-openmpi"):
        scalapack.Scalapack()


def mpirun(tmp_path, m, *more, ranks=4):
    """(exit code, result, output) of `python -m twophase_ext.linalg.distributed`."""
    command = shutil.which("mpirun")
    if command is None:
        pytest.skip("no mpirun")
    try:
        scalapack.library()
    except RuntimeError as error:
        pytest.skip(str(error))
    np.save(tmp_path / "h.npy", m)
    module = [sys.executable, "-m", "twophase_ext.linalg.distributed", tmp_path / "h.npy"]
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    launch = [command, *root, "--oversubscribe", "-n", str(ranks), *module]
    done = subprocess.run(
        [*launch, "--out", tmp_path / "result.json", *more],
        env=os.environ | MPI_ENVIRONMENT,
        capture_output=True,
        text=True,
        cwd=tmp_path,  # the source folder's package need not have been compiled
        timeout=400,  # seconds; 4 imports of torch on a busy machine
    )
    path = tmp_path / "result.json"
    result = json.loads(path.read_text("utf-8")) if path.exists() else None
    return done.returncode, result, done.stdout + done.stderr


@pytest.mark.slow
def test_four_ranks(tmp_path):
    m = normal(300, 330)
    code, result, output = mpirun(tmp_path, m.numpy(), "--block", "32", "--panel", "50")
    assert code == 0 and result["status"] == "proved" and result["grid"] == [2, 2], output
    whole = torch.cat([m, torch.ones(300, 1, dtype=torch.float64)], 1)
    single = certify_gram(MatrixSource(whole), panel=50)
    assert result["ell"] <= smallest(whole)
    assert result["ell"] == pytest.approx(single.ell, rel=1e-6)
    assert result["logdet_lower"] == pytest.approx(single.logdet_lower, abs=1e-6)
    assert output.count("proved: sigma_min >= ") == 1


@pytest.mark.slow
def test_an_error_of_one_rank_ends_them_all(tmp_path):
    code, _, output = mpirun(tmp_path, normal(6, 9).numpy().astype(np.float32), ranks=2)
    assert code != 0 and "features: expected float64 [n, m], got float32 [6, 9]" in output
