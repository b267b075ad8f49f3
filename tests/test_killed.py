"""SIGKILL at 20 random calls of runs, in every stage, and the runs continued; see kill_harness."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kill_harness


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    # not from the source folder, whose package need not have been compiled
    found = subprocess.run(
        [sys.executable, kill_harness.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )
    assert found.returncode == 0, found.stderr
    *kills, summary = map(json.loads, found.stdout.splitlines())
    assert [line for line in kills if line["differing"]] == [], found.stderr
    assert summary == {"kills": 20, "same bits": 20}
    written = [line["left"] for line in kills if line["stage"] == "write"]
    assert len(written) == 4 and all("checkpoint.pt.new.part" in left for left in written)
