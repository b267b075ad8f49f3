"""Fixtures shared by the tests."""

import os
from pathlib import Path

import pytest
import torch

cuda = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(params=["cpu", cuda])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def data_dir() -> Path:
    root = os.environ.get("TWOPHASE_DATA")
    if not root:
        pytest.skip("TWOPHASE_DATA is not set: real image data are not available")
    return Path(root)


@pytest.fixture
def one_thread():
    """Many small matrices: threads that wait for each other would cost ten times more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
