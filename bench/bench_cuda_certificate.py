"""lambda_min(M M^T) certified end to end on one GPU, against torch's and CuPy's Cholesky alone.

n = 60,000 where the device holds it, else the largest multiple of 1,000 that it does; p = 1.1 n.
A certificate that is not proved fails. extra_info["stages"]: seconds of Gram, Cholesky, residual.
"""

import math

import pytest
import torch

from twophase_ext.core.memory import available_memory
from twophase_ext.linalg.certificate import certify_gram

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LARGEST = 60_000
SHARE = 0.6  # of the free memory for the n x n matrix; panels and workspaces need the rest


class Normal:
    """[n, columns] of normal numbers, made panel by panel."""

    def __init__(self, n: int, columns: int) -> None:
        self.n, self.columns, self.device = n, columns, torch.device("cuda")

    def panel(self, begin: int, end: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(begin)
        shape = (self.n, end - begin)
        return torch.randn(*shape, dtype=torch.float64, device="cuda", generator=generator)


@pytest.fixture
def n(small) -> int:
    if small:
        return 300
    fits = math.isqrt(int(SHARE * available_memory(torch.device("cuda")) / 8))
    return min(LARGEST, fits // 1000 * 1000)


def well_conditioned(n: int) -> torch.Tensor:
    matrix = torch.rand(n, n, dtype=torch.float64, device="cuda")
    matrix.diagonal().add_(n)  # diagonally dominant; the upper triangle is not read
    return matrix


@pytest.mark.parametrize("which", ["ours", "tiles", "torch", "cupy"])
def test_certificate(which, n, benchmark, row):
    flops = n * n * math.ceil(1.1 * n)
    names = {
        "ours": ("ours", "certify_gram: Gram, Cholesky in place, residual"),
        "tiles": ("ours", "certify_gram by tiles"),
        "torch": ("limit", "torch.linalg.cholesky_ex alone"),
        "cupy": ("limit", "cupy.linalg.cholesky alone"),
    }
    role, name = names[which]
    row(f"certificate n={n}", role, name, flops=n**3 // 3 + (flops if role == "ours" else 0))
    if role == "ours":
        source = Normal(n, math.ceil(1.1 * n))
        tile = 2048 if which == "tiles" else None

        def call() -> None:
            proof = certify_gram(source, scale_rows=False, tile=tile)
            assert proof.status == "proved", proof.reason
            stages = {stage["name"]: stage["seconds"] for stage in proof.stages}
            benchmark.extra_info.update(stages=stages, storage=proof.storage, ell=proof.ell)
            torch.cuda.synchronize()
    else:
        if n > 40_000:  # out of place: two matrices and the workspace
            pytest.skip("torch's and CuPy's factorization are out of place and do not fit")
        matrix = well_conditioned(n)
        if which == "cupy":
            cupy = pytest.importorskip("cupy")

        def call() -> None:
            if which == "torch":
                torch.linalg.cholesky_ex(matrix)
            else:
                with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                    cupy.linalg.cholesky(cupy.from_dlpack(matrix))
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=1, warmup_rounds=0)
