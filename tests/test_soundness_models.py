"""Certificates of functions, tempted with the matrices of soundness_cases.py.

A matrix becomes a model: an identity layer whose features are the rows themselves, so that the
claim is about the matrix; or the rows become features of a wide layer, where the truth is whether
all rows differ (Assumption 1).
"""

import pytest
import torch
from torch import Tensor, nn

import twophase_ext as tp
from soundness_cases import CASES, Case
from twophase_ext.expressivity.kinks import local_kinks
from twophase_ext.expressivity.one_sided import exact_softplus
from twophase_ext.expressivity.separation import separate
from twophase_ext.expressivity.triangular import certify_triangular
from twophase_ext.expressivity.witness import whiten
from twophase_ext.model.groups import groups_of, repeated

USABLE = {
    name: case
    for name, case in CASES.items()
    if case.kind != "not finite" and min(case.matrix.shape) > 0 and max(case.matrix.shape) < 60
}


pytestmark = pytest.mark.usefixtures("one_thread")


def at_w(matrix: Tensor, method: str) -> tp.Verdict:
    """The verdict on a network whose h_X is the matrix, without a column of ones."""
    p = matrix.shape[1]
    identity = nn.Linear(p, p, bias=False)
    nn.init.eye_(identity.weight)
    model = nn.Sequential(identity, nn.Linear(p, 1, bias=False)).double()
    return tp.verify_expressivity(model, matrix.double(), method=method)


def test_certificates_at_w_never_claim_too_much():
    found = []
    for name, case in USABLE.items():
        verdict = at_w(case.matrix, "certificate")
        distinct = int(groups_of(case.matrix.double()).max()) + 1
        if verdict.distinct != distinct or (verdict.status == "proved" and case.rank < distinct):
            found.append(f"{name}: proved, rank {case.rank} of {distinct}")
        if verdict.status == "deficient" and case.rank == distinct:
            found.append(f"{name}: deficient, full rank")
        # One error bound for all rows: rows of extreme size need not be promoted to the function.
        sizes = case.matrix.double().abs().amax(1)
        required = case.kind == "well" and 1e-100 < float(sizes.min()) <= float(sizes.max()) < 1e100
        if required and verdict.status != "proved":
            found.append(f"{name}: {verdict.status}, well-conditioned")
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["certificate", "separation"])
def test_a_witness_is_claimed_for_the_distinct_rows_alone(method):
    proved = 0
    for case in USABLE.values():
        n, d = case.matrix.shape
        wide = nn.Linear(d, n + 2)
        model = nn.Sequential(wide, tp.nn.Softplus(), nn.Linear(n + 2, 1)).double()
        x = case.matrix.double()
        verdict = tp.verify_expressivity(model, x, w="witness", method=method)
        groups = groups_of(x)
        distinct = int(groups.max()) + 1
        assert (verdict.distinct, verdict.repeated) == (distinct, repeated(groups)), case.name
        assert verdict.status != "deficient" and verdict.n == n
        proved += verdict.status == "proved"
    assert proved > 50


def kinked(case: Case, error: float) -> tuple[Tensor, bool, float]:
    z = case.matrix.double()
    errors = torch.full((len(z),), error, dtype=torch.float64)
    kinks = local_kinks(z, whiten(z, errors, torch.float64), torch.float64, exact_softplus(100.0))
    proof = certify_triangular(
        z, errors, kinks.weight, kinks.bias, kinks.order, exact_softplus(100.0)
    )
    h = tp.softplus(z @ kinks.weight.T + kinks.bias, 100.0)
    return h, proof.proved, proof.sigma_min_lower


def test_separation_and_kinks_without_the_check_of_the_inputs():
    """Below verify_expressivity, equal rows reach the provers themselves."""
    for case in USABLE.values():
        z = case.matrix.double()
        equal = bool(repeated(groups_of(z)))
        error = torch.zeros(len(z), dtype=torch.float64)
        assert not (equal and separate(z, error).proved), case.name
        h, proved, sigma = kinked(case, 0.0)
        assert not (equal and proved), case.name
        if proved:
            truth = float(torch.linalg.svdvals(h)[-1])
            assert sigma <= truth * (1 + 1e-6), case.name


def test_errors_as_large_as_half_the_distance_are_never_overcome():
    for case in USABLE.values():
        z = case.matrix.double()
        if len(z) < 2:
            continue
        distances = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
        half = float(distances.fill_diagonal_(torch.inf).min()) / 2 * (1 + 1e-9)
        error = torch.full((len(z),), half, dtype=torch.float64)
        if 1e-140 < half < 1e140:  # else the distances here are inexact
            assert not separate(z, error).proved, case.name
            assert not kinked(case, half)[1], case.name
