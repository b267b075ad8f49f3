"""The certificate of a black-box factor in place: right with a right library, never wrong."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from liars import CASES, LIARS, duplicated, normal, off_by, smallest
from twophase_ext.linalg import in_place
from twophase_ext.linalg.certificate import certify_gram
from twophase_ext.linalg.gram_tiles import MatrixSource
from twophase_ext.linalg.in_place import certify_in_place, plan_in_place, potrf_in_place


@pytest.fixture(params=[7, 64, None], autouse=True)
def tile(request, monkeypatch):
    """Narrow tiles too, and the usual ones."""
    if request.param:
        monkeypatch.setattr(in_place, "TILE", request.param)


# --- a library that works


@pytest.mark.parametrize("n", [1, 2, 37, 150])
def test_well_conditioned_is_proved_as_by_the_tile_engine(n):
    m = normal(n, 2 * n + 3)
    c = certify_in_place(MatrixSource(m), panel=40)
    tiles = certify_gram(MatrixSource(m), panel=40)
    assert c.proved and tiles.proved and c.failed_pivot is None
    assert tiles.ell * (1 - 1e-9) <= c.ell <= smallest(m)
    assert c.e_G == pytest.approx(tiles.e_G, rel=1e-12)
    assert c.e_C <= 3 * tiles.e_C + 1e-15 and c.passes == 1
    assert c.storage == {"gram": "upper triangle", "factor": "lower triangle"}
    truth = float(torch.linalg.slogdet(m @ m.T)[1])
    assert c.logdet_lower <= truth
    assert c.logdet_lower == pytest.approx(tiles.logdet_lower, abs=1e-9)
    assert c.logdet_estimate == pytest.approx(tiles.logdet_estimate, abs=1e-6)
    assert [s["name"].split(",")[0] for s in c.stages if s["name"] != "sizes of the rows"] == [
        "Gram",
        "smallest eigenvalue",
        "Cholesky",
        "residual",
        "log det",
    ]


@pytest.mark.parametrize("exponent", [-400, -60, 60, 400])
def test_scaled_rows(exponent):
    m = normal(30, 50)
    m[::2] *= 2.0**exponent
    c = certify_in_place(MatrixSource(m))
    assert c.proved and c.row_exponents != (0, 0)
    assert c.ell == pytest.approx(certify_gram(MatrixSource(m)).ell, rel=1e-9)


def test_a_shift_that_is_too_high_is_lowered(monkeypatch):
    m = normal(60, 90)
    truth = smallest(m)
    monkeypatch.setattr(
        "twophase_ext.linalg.gram_run.shifts_to_try", lambda *_: [9 * truth, truth / 2]
    )
    c = certify_in_place(MatrixSource(m))
    assert c.proved and c.attempts == 2 and truth / 3 < c.ell <= truth / 2
    assert not certify_in_place(MatrixSource(m), shift=9 * truth).proved


@pytest.mark.parametrize("m", [duplicated(40, 60), normal(40, 30), torch.zeros(5, 9)])
def test_deficient_is_not_proved(m):
    c = certify_in_place(MatrixSource(m))
    assert c.status == "not proved" and c.reason and not c.ell > 0 and c.logdet_lower is None


def test_not_finite():
    m = normal(9, 12)
    m[3, 4] = torch.nan
    assert certify_in_place(MatrixSource(m)).status == "not finite"
    assert certify_in_place(MatrixSource(m), scale_rows=False).status == "not finite"


# --- a library that lies: info = 0, and in the lower triangle whatever it likes


@pytest.mark.parametrize("liar", LIARS)
@pytest.mark.parametrize("case", CASES)
def test_never_above_the_truth(case, liar):
    m = CASES[case]
    truth = smallest(m)
    deficient = case in ("duplicate", "low rank", "zero")
    for shift in (None, 1e-200, 1e-160, 1e-12, 1e-3, 0.5, max(truth, 1e-300)):
        c = certify_in_place(MatrixSource(m), shift=shift, potrf=LIARS[liar], panel=16)
        assert not (c.proved and deficient), (shift, c)
        assert not c.ell > truth * (1 + 1e-12), (shift, c)
        if c.proved:
            assert c.logdet_lower <= float(torch.linalg.slogdet(m @ m.T)[1]) + 1e-9


def test_a_slightly_wrong_factor_still_proves_what_it_can():
    m = normal(40, 90)
    exact = certify_in_place(MatrixSource(m))
    wrong = certify_in_place(MatrixSource(m), potrf=off_by(1e-6))
    assert wrong.proved and 0.9 * exact.ell < wrong.ell < exact.ell
    assert wrong.e_C > 1e4 * exact.e_C


def test_a_residual_too_small_to_be_squared_counts():
    # G = 0 exactly, L = 0: || L L^T - (G - s I) || = s, whose square underflows
    c = certify_in_place(MatrixSource(torch.zeros(4, 6)), shift=1e-200, potrf=LIARS["zeros"])
    assert not c.proved and c.e_C > 1e-200


@pytest.mark.parametrize("place", [(0, 39), (20, 21), (37, 39)])
def test_a_library_that_writes_above_the_diagonal_is_found(place):
    def potrf(matrix):
        info = potrf_in_place(matrix)
        matrix[place] = torch.nextafter(matrix[place], torch.tensor(9e9, dtype=torch.float64))
        return info

    c = certify_in_place(MatrixSource(normal(40, 60)), potrf=potrf)
    assert not c.proved and "above the diagonal" in c.reason

    def all_identity(matrix):  # duplicate unit rows would pass as orthogonal ones
        matrix.copy_(torch.eye(len(matrix)))
        return 0

    m = torch.nn.functional.normalize(duplicated(40, 60))
    assert not certify_in_place(MatrixSource(m), shift=1e-9, potrf=all_identity).proved


def test_a_false_breakdown_is_a_result():
    c = certify_in_place(MatrixSource(normal(20, 30)), potrf=lambda matrix: 7)
    assert not c.proved and c.failed_pivot == 6 and c.attempts >= 2


# --- potrf and sizes


def test_potrf_is_in_place_and_leaves_the_upper_triangle():
    m = normal(30, 40)
    a = m @ m.T
    work, upper = a.clone(), a.triu(1)
    pointer = work.data_ptr()
    assert potrf_in_place(work) == 0 and work.data_ptr() == pointer
    assert torch.equal(work.triu(1), upper)
    assert torch.allclose(work.tril(), torch.linalg.cholesky(a), rtol=1e-12, atol=1e-12)
    a[5, 5] = -1
    assert potrf_in_place(a) == 6
    for bad in (m, a.float(), a[::2, ::2], (m @ m.T)[:, :30].T[1:, 1:]):
        with pytest.raises(ValueError, match="matrix: expected a contiguous float64"):
            potrf_in_place(bad)


def test_sizes():
    def source(n, p):
        return SimpleNamespace(n=n, columns=p, device=torch.device("cpu"))

    card = int(0.9 * 39.4 * 2**30)  # of a 40 GiB card
    sizes = plan_in_place(source(60_000, 66_001), memory=card)
    assert sizes.panel == 2000 and 8 * 60_000**2 < sizes.host_bytes < 30 * 2**30
    sizes = plan_in_place(source(60_000, 66_001), memory=28 * 2**30)
    assert sizes.panel == 500 and sizes.host_bytes <= 28 * 2**30
    with pytest.raises(MemoryError, match=r"60000 rows .* 27.9 GiB .*are 27 GiB"):
        plan_in_place(source(60_000, 66_001), memory=27 * 2**30)
    for arguments, name in (((0, 3), "n"), ((3, -1), "columns")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            plan_in_place(source(*arguments))
    with pytest.raises(ValueError, match="panel: expected 1 or more, got 0"):
        certify_in_place(MatrixSource(normal(3, 4)), panel=0)
    with pytest.raises(ValueError, match="shift: expected a positive number, got -1"):
        certify_in_place(MatrixSource(normal(3, 4)), shift=-1)


class Cusolver:
    """cusolverDn by its documented signatures, with LAPACK on host memory behind them."""

    def __init__(self, status=0):
        self.calls, self.status, self.sizes = [], status, (4096, 64)

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            return getattr(type(self), "_" + name)(self, *arguments)

        return call

    def _cusolverDnCreate(self, handle):
        handle._obj.value = 11
        return 0

    def _cusolverDnSetStream(self, handle, stream):
        assert (handle.value, stream.value) == (11, 77)
        return 0

    def _cusolverDnCreateParams(self, params):
        params._obj.value = 22
        return 0

    def _check(self, handle, params, uplo, n, type_a, a, lda, compute):
        assert (handle.value, params.value, uplo, type_a, compute) == (11, 22, 1, 1, 1)
        assert isinstance(n, ctypes.c_int64) and isinstance(lda, ctypes.c_int64)
        return n.value, lda.value, a.value

    def _cusolverDnXpotrf_bufferSize(self, *arguments):
        self._check(*arguments[:8])
        device, host = arguments[8:]
        device._obj.value, host._obj.value = self.sizes
        return 0

    def _cusolverDnXpotrf(self, *arguments):
        from scipy.linalg import lapack

        n, lda, a = self._check(*arguments[:8])
        work, device, host_work, host, info = arguments[8:]
        assert (device.value, host.value) == self.sizes
        np.frombuffer((ctypes.c_char * device.value).from_address(work.value), np.uint8)[:] = 1
        ctypes.memset(host_work, 1, host.value)
        memory = (ctypes.c_double * (n * lda)).from_address(a)
        columns = np.frombuffer(memory).reshape((lda, n), order="F")  # column-major
        result = lapack.dpotrf(columns, lower=0, clean=0, overwrite_a=1)[1]
        ctypes.c_int.from_address(info.value).value = result
        return self.status

    def _cusolverDnDestroyParams(self, params):
        assert params.value == 22
        return 0

    def _cusolverDnDestroy(self, handle):
        assert handle.value == 11
        return 0


def test_xpotrf_is_called_by_its_signature(monkeypatch):
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    m = normal(20, 30)
    a = m @ m.T
    work, library = a.clone(), Cusolver()
    assert in_place._xpotrf(library, work) == 0
    assert torch.equal(work.triu(1), a.triu(1))
    assert torch.allclose(work.tril(), torch.linalg.cholesky(a), rtol=1e-12, atol=1e-12)
    steps = ["Create", "SetStream", "CreateParams", "Xpotrf_bufferSize", "Xpotrf"]
    steps += ["DestroyParams", "Destroy"]
    assert library.calls == ["cusolverDn" + step for step in steps]
    a[3, 3] = -1
    assert in_place._xpotrf(library, a.clone()) == 4
    c = certify_in_place(MatrixSource(m), potrf=lambda x: in_place._xpotrf(library, x))
    assert c.proved and c.ell == certify_in_place(MatrixSource(m)).ell
    broken = Cusolver(status=7)
    with pytest.raises(RuntimeError, match=r"Xpotrf: expected status 0, got 7 \(n = 20\)"):
        in_place._xpotrf(broken, a)
    assert broken.calls[-2:] == ["cusolverDnDestroyParams", "cusolverDnDestroy"]


def test_without_cupy_there_is_no_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    assert in_place.xpotrf_library() is None
    assert not in_place.usable(MatrixSource(normal(3, 4)), 2000, None)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cusolver():
    if in_place.xpotrf_library() is None:
        pytest.skip("no CuPy, or no cusolverDnXpotrf")
    m = normal(300, 500)
    a = (m @ m.T).cuda()
    work = a.clone()
    assert potrf_in_place(work) == 0 and torch.equal(work.triu(1), a.triu(1))
    assert torch.allclose(work.tril(), torch.linalg.cholesky(a), rtol=1e-10, atol=1e-10)
    a[5, 5] = -1
    assert potrf_in_place(a) == 6
    c = certify_gram(MatrixSource(m.cuda()))
    assert c.storage["gram"] == "upper triangle" and c.proved and c.ell <= smallest(m)
    assert not certify_gram(MatrixSource(duplicated(300, 500).cuda())).proved
