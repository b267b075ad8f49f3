"""Fixtures shared by the tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


class _Given(nn.Module):
    """A module whose forward is given; its layers are keyword arguments."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """make_model(lambda m, x: m.fc(x), fc=nn.Linear(4, 3)): a module with this forward."""
    return _Given
