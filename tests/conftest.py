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


# Files of few tests that take long: begun first, so that no worker is left with one at the end.
LONG = (
    *("test_mnist", "test_cuda_bodies", "test_killed", "test_reproduce", "test_report_browser"),
    *("test_deploy", "test_install", "test_determinism_runs", "test_sklearn", "test_examples"),
    *("test_huggingface", "test_lightning", "test_ranks", "test_ranks_lost", "test_fuzz"),
)


def pytest_collection_modifyitems(items):
    """Files in the order of LONG, then by name; tests within a file stay in theirs."""
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


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
