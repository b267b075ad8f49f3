"""DTensors on two processes: FSDP2 with tp.optim.SGD, softplus and noise on shards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch.distributed.fsdp")


@pytest.mark.slow
def test_shards_get_the_numbers_of_whole_tensors(tmp_path):
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "sharded_cases", str(tmp_path / "store"), str(rank)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0 and output.rstrip().endswith("all 6 hold"), output
