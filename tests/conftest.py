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
