"""Fixtures shared by the tests."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from helpers import ISAS, instruction_set

# One profile for every file: the same examples on every run, and nothing is timed.
settings.register_profile(
    "project",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")

# Inductor's files on disk do not know for which vectors they were compiled: with those of AVX-512,
# ATEN_CPU_CAPABILITY=avx2 gives half of a sum.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = (
    f"{tempfile.gettempdir()}/inductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"
)

cuda = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(autouse=True)
def alone():
    """Random numbers and threads do not depend on the tests before."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", cuda])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this processor has, in turn."""
    with instruction_set(request.param):
        yield request.param


@pytest.fixture
def data_dir() -> Path:
    root = os.environ.get("TWOPHASE_DATA")
    if not root:
        pytest.skip("TWOPHASE_DATA is not set: real image data are not available")
    return Path(root)


@pytest.fixture
def one_thread():
    """Many small matrices: threads that wait for each other would cost ten times more."""
    torch.set_num_threads(1)
