"""The only job of this file: make a certificate claim more than is true.

PROVERS maps a name to a function of the stored matrix M [n, p] (float32 or float64) that returns a
certified rank, or whether rank n is proved; a new certificate is one more entry. "Undecided" is
right for every matrix but the well-conditioned ones of CASES. Provers of a *function* (separation,
the triangular witness) have no M to be given and are tempted in their own tests.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from torch import Tensor

from soundness_cases import CASES, Case, combination, exact_rank, integer_rows, modular_rank
from twophase_ext.expressivity.rank_logdet import rank_logdet
from twophase_ext.linalg import (
    certificate,
    cholesky_tiles,
    gram_run,
    preconditioned,
    sparse_triangular,
)
from twophase_ext.linalg import gram as large
from twophase_ext.linalg.certificate import certify_gram
from twophase_ext.linalg.gram_tiles import MatrixSource, e_G
from twophase_ext.ops import gram_logdet

Prover = Callable[[Tensor], bool | int]


class Stored:
    """The PanelSource of a stored matrix."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.double()
        self.n, self.columns = matrix.shape
        self.device = matrix.device

    def panel(self, start: int, end: int) -> Tensor:
        return self.matrix[:, start:end]


def tiles(matrix: Tensor, **settings) -> bool:
    return certificate.certify_gram(Stored(matrix), **settings).proved


def tiles_at_the_edge(matrix: Tensor) -> bool:
    """A caller's own shift, no larger than the errors expected."""
    first = certificate.certify_gram(Stored(matrix))
    n, trace = first.n, first.trace
    if first.proved or not trace > 0:
        return first.proved
    errors = gram_run.e_G(trace, first.columns, first.panel)
    errors += gram_run.expected_e_C(trace, gram_run.Grid(n, first.tile))
    return tiles(matrix, shift=1.001 * errors)


def sparse(matrix: Tensor) -> bool:
    """M M^T - s I factored for some s, down to the rounding errors themselves."""
    largest = matrix.double().abs().amax(1, keepdim=True) if matrix.numel() else torch.zeros(1)
    if not bool(((largest > 0) & largest.isfinite()).all()):
        return False
    # rows scaled by powers of two: the largest number is near 1, as for its only caller
    factor = csr_matrix(torch.ldexp(matrix.double(), -torch.frexp(largest)[1]).numpy())
    size = float(factor.multiply(factor).sum())
    shifts = (size * 10.0**-k for k in ((4, 12, 15, 16) if len(matrix) < 100 else (12, 15)))
    return any(sparse_triangular.lambda_min_lower(factor, shift) > 0 for shift in shifts)


PROVERS: dict[str, Prover] = {
    "gram_logdet": lambda m: int(gram_logdet(m, append_ones=False)[0]),
    "gram_logdet_large": lambda m: large.gram_logdet_large(m, False)[0],
    "rank_logdet": lambda m: int(rank_logdet(m, append_ones=False).rank),
    "preconditioned": lambda m: preconditioned.preconditioned_sigma_min(m.double()) > 0,
    "sparse factorization": sparse,
    "certify_gram": tiles,
    "certify_gram, shift at the edge": tiles_at_the_edge,
    "certify_gram, tiles of 64": lambda m: tiles(m, tile=64, panel=64),
}


def claimed(prover: Prover, matrix: Tensor) -> int:
    """The rank that the prover claims to have proved; 0: nothing."""
    answer = prover(matrix)
    return (len(matrix) if answer else 0) if isinstance(answer, bool) else int(answer)


def lies(prover: Prover, cases: Iterable[Case]) -> list[str]:
    """One line for every case of which the prover claims too much."""
    found = []
    for case in cases:
        claim = claimed(prover, case.matrix)
        if not 0 <= claim <= case.rank:
            found.append(f"{case.name} ({case.kind}): rank {claim} claimed, {case.rank} true")
    return found


def misses(prover: Prover, cases: Iterable[Case]) -> list[str]:
    """One line for every well-conditioned case that the prover cannot prove."""
    found = []
    for case in cases:
        if case.kind == "well" and (claim := claimed(prover, case.matrix)) != len(case.matrix):
            found.append(f"{case.name}: rank {claim} claimed of {len(case.matrix)}")
    return found


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PROVERS)
def test_never_claims_too_much(name):
    assert lies(PROVERS[name], CASES.values()) == []


@pytest.mark.parametrize("name", PROVERS)
def test_proves_what_is_well_conditioned(name):
    assert misses(PROVERS[name], CASES.values()) == []


@pytest.mark.parametrize(
    "name", ["gram_logdet", "gram_logdet_large", "preconditioned", "certify_gram"]
)
def test_one_below_full_rank_of_two_thousand(name):
    """An affine combination of integer rows, exact: rank n - 1 at most, by construction."""
    n = 2000
    assert claimed(PROVERS[name], combination(n, n + 50)) < n


def test_the_cases_are_what_they_are_said_to_be():
    for case in CASES.values():
        n = len(case.matrix)
        assert case.kind in ("deficient", "well", "hard", "not finite")
        assert case.rank < n if case.kind == "deficient" else True, case.name
        assert case.rank == n if case.kind == "well" else True, case.name
        assert bool(case.matrix.isfinite().all()) == (case.kind != "not finite"), case.name
    # near-duplicates and float32-rounded low-rank maps are of full rank as stored, and undecided
    assert sum(c.rank == len(c.matrix) for c in CASES.values() if c.kind == "hard") > 40


def test_exact_ranks_agree():
    """Elimination over integers, over fractions and modulo a prime."""
    for case in CASES.values():
        if (
            case.kind != "not finite"
            and 0 < min(case.matrix.shape) <= 12
            and case.matrix.numel() < 400
        ):
            assert case.rank == modular_rank(integer_rows(case.matrix)), case.name
            assert case.rank == rank_over_fractions(case.matrix), case.name


def rank_over_fractions(matrix: Tensor) -> int:
    rows = [[Fraction(x) for x in row] for row in matrix.double().tolist()]
    rank = 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


@settings(max_examples=60)
@given(st.data())
def test_never_claims_too_much_of_drawn_matrices(data):
    """Rows drawn, then copied, negated, added, scaled, or nudged in the last bits."""
    n, m = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 8))
    entry = (
        st.integers(-3, 3) | st.integers(-3, 3).map(lambda i: i / 3) | st.floats(-2, 2, width=32)
    )
    rows = data.draw(st.lists(st.lists(entry, min_size=m, max_size=m), min_size=n, max_size=n))
    matrix = torch.tensor(rows, dtype=torch.float64).reshape(n, m)
    index = st.integers(0, n - 1)
    for kind, i, j in data.draw(
        st.lists(
            st.tuples(st.sampled_from(["copy", "negate", "add", "scale", "nudge"]), index, index),
            max_size=3,
        )
    ):
        row = {
            "copy": matrix[i],
            "negate": -matrix[i],
            "add": matrix[i] + matrix[j],
            "scale": matrix[i] * 2.0**-300,
            "nudge": matrix[i] * (1 + 2.0**-52),
        }[kind]
        matrix = torch.cat([matrix, row[None]])
    if data.draw(st.booleans()):
        matrix = torch.cat([matrix, matrix.new_ones(len(matrix), 1)], 1)
    exact = exact_rank(matrix)
    for name, prover in PROVERS.items():
        assert 0 <= claimed(prover, matrix) <= exact, name


# ---- the suite can fail: provers that lie, and certificates with a bound taken away

SINGULAR = [c for c in CASES.values() if c.kind == "deficient" and len(c.matrix) <= 64]


def plain_cholesky(matrix: Tensor) -> bool:
    """Cholesky of the Gram matrix without a shift."""
    matrix = matrix.double()
    return int(torch.linalg.cholesky_ex(matrix @ matrix.T).info) == 0


def plain_qr(matrix: Tensor) -> bool:
    """No zero on R's diagonal."""
    r = torch.linalg.qr(matrix.double().T, mode="r").R
    return len(matrix) <= matrix.shape[1] and bool((r.diagonal() != 0).all())


@pytest.mark.parametrize("prover", [plain_cholesky, plain_qr])
def test_usual_criteria_lie_and_are_caught(prover):
    assert len(lies(prover, SINGULAR)) >= 10


def test_a_prover_of_nothing_is_caught():
    assert len(misses(lambda m: False, CASES.values())) >= 15


def nothing(*_) -> float:
    return 0.0


# prover, module, what is replaced there. The C++ kernel's bound is out of reach.
WITHOUT = {
    "gram_logdet_large, e_G": ("gram_logdet_large", large, {"gamma": nothing}),
    "gram_logdet_large, shift": (
        "gram_logdet_large",
        large,
        {"shifted_down": lambda diagonal, shift: diagonal},
    ),
    "gram_logdet_large, all bounds": ("gram_logdet_large", large, {"SLACK": 0.0}),
    "preconditioned, rounding": ("preconditioned", preconditioned, {"gamma": nothing}),
    "preconditioned, I - B B^T": ("preconditioned", preconditioned, {"frobenius_upper": nothing}),
    "sparse factorization, rounding": (
        "sparse factorization",
        sparse_triangular,
        {"_of_products": nothing, "norm_upper_of_magnitudes": nothing},
    ),
    "certify_gram, e_G": ("certify_gram, shift at the edge", gram_run, {"e_G": nothing}),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_bound_taken_away_is_caught(monkeypatch, name):
    prover, module, replacements = WITHOUT[name]
    for attribute, replacement in replacements.items():
        monkeypatch.setattr(module, attribute, replacement)
    assert lies(PROVERS[prover], SINGULAR)


@pytest.fixture
def false_library(monkeypatch):
    """A Cholesky that reports success whatever the matrix (pytorch issue 131774: they err)."""

    def cholesky_ex(matrix: Tensor, **_) -> torch.return_types.linalg_cholesky_ex:
        factor = torch.eye(len(matrix), dtype=matrix.dtype)
        return torch.return_types.linalg_cholesky_ex((factor, torch.tensor(0, dtype=torch.int32)))

    monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)


@pytest.mark.parametrize("name", PROVERS)
def test_a_false_library_makes_no_prover_lie(false_library, name):
    assert lies(PROVERS[name], SINGULAR) == []


@pytest.mark.parametrize(
    ("name", "module", "bound"),
    [
        ("gram_logdet_large", large, "residual_bound"),
        ("certify_gram", cholesky_tiles.Factorization, "e_C"),
    ],
)
def test_a_false_library_is_found_by_the_residual_alone(
    monkeypatch, false_library, name, module, bound
):
    monkeypatch.setattr(module, bound, nothing)
    assert lies(PROVERS[name], SINGULAR)


def in_order(rows, others, diagonal, out):
    """What a BLAS may do: products added one after the other, each sum rounded."""
    out.zero_()
    for k in range(rows.shape[1]):
        out += rows[:, k : k + 1] * others[:, k]
    return 0.0


@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize(("panel", "panels"), [(400, 1), (400, 3), (1, 600)])
def test_half_of_the_gram_bound_would_lie(panel, panels, part, monkeypatch):
    """Every rounding goes up by almost u: the bound's constant is what it has to be."""
    monkeypatch.setattr("twophase_ext.linalg.gram_tiles.lower_product", in_order)
    monkeypatch.setattr("twophase_ext.linalg.gram_run.e_G", lambda *x: part * e_G(*x))
    small = 2.0**-26.5 * (1 + 2.0**-20)  # its square is a little more than u
    row = torch.full((panel * panels,), small, dtype=torch.float64)
    row[:: panel if panel > 1 else panels] = 1.0
    truth = sum(Fraction(x) ** 2 for x in row.tolist())
    computed = float(Fraction(truth) * (1 + Fraction(panel + panels, 2**53)))
    for shift in torch.linspace(float(truth), computed, 40, dtype=torch.float64).tolist():
        proof = certify_gram(MatrixSource(row[None]), panel=panel, shift=shift, scale_rows=False)
        if proof.proved and Fraction(proof.ell) > truth:
            assert part < 1
            return
    assert part == 1
