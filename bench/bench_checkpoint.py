"""A checkpoint of the paper's network (PreActResNet18, 66,000 softplus units, momentum).

Ours, with its checksum, against torch.save alone and against writing as many bytes, each flushed to
the disk. extra_info["share of 60 s"]: what a checkpoint every minute costs of the time.
"""

import os
from pathlib import Path

import pytest
import torch

from twophase.models import PreActResNet18
from twophase_ext.training.persistence import checkpoint


def state_of(small: bool) -> dict:
    model = PreActResNet18(width=4 if small else 64, wide=64 if small else 66_000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}


def flushed(path: Path, write) -> None:
    """Into a new file, as a checkpoint is."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize("which", ["ours", "torch.save", "write"])
def test_checkpoint(tmp_path, row, interleaved, small, benchmark, which):
    state = state_of(small)
    raw = torch.zeros(8 if small else sum(t.nbytes for t in state["model"].values()) * 2 // 8)
    raw = raw.view(torch.uint8).repeat(2).numpy()
    folder = tmp_path / "run"
    folder.mkdir()
    rows = {
        "ours": ("ours", "checkpoint.save", lambda: checkpoint.save(folder, state)),
        "torch.save": (
            "baseline",
            "torch.save, flushed",
            lambda: flushed(tmp_path / "plain.pt", lambda file: torch.save(state, file)),
        ),
        "write": (
            "limit",
            "writing the bytes",
            lambda: flushed(tmp_path / "raw", lambda file: file.write(raw)),
        ),
    }
    role, name, target = rows[which]
    row("checkpoint of 45M parameters and momenta", role, name, bytes=raw.nbytes)
    others = [rows[other][2] for other in rows if other != which]
    interleaved(target, others, rounds=1 if small else 5, warmup_rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info["share of 60 s"] = benchmark.stats.stats.median / 60
