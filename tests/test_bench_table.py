"""The table of benchmark medians: what it compares, and a page's markers."""

import json
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "bench" / "table.py"


def entry(group: str, role: str, name: str, median: float) -> dict:
    return {
        "name": name,
        "group": group,
        "extra_info": {"role": role, "name": name},
        "stats": {"median": median, "mean": 10 * median},
    }


def measured(tmp_path: Path) -> Path:
    rows = [
        entry("op 1M", "ours", "mine", 2e-3),
        entry("op 1M", "baseline", "slow", 9e-3),
        entry("op 1M", "baseline", "quick", 6e-3),
        entry("op 1M", "limit", "copy", 1e-3),
        entry("other", "ours", "mine", 5e-6),
    ]
    machine = {"cpu": {"brand_raw": "A processor"}, "machine": "m", "python_version": "3.11.0"}
    run = {"benchmarks": rows, "machine_info": machine, "datetime": "2026-01-02T03:04:05"}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


def table(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TABLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_medians_and_the_fastest_baseline(tmp_path):
    lines = table("--markdown", measured(tmp_path)).stdout.splitlines()
    assert "A processor" in lines[0] and "2026-01-02" in lines[0]
    assert lines[4] == "| op 1M | 2 ms | quick | 6 ms | copy | 1 ms | 3.00 x | 2.00 x |"
    assert lines[5] == "| other | 5 us | - | - | - | - | - | - |"


def test_update_replaces_what_stands_between_the_markers(tmp_path):
    readme, run = tmp_path / "README.md", measured(tmp_path)
    readme.write_text("top\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nbottom\n")
    for _ in range(2):  # a second time changes nothing
        assert table("--update", readme, run).returncode == 0
        text = readme.read_text()
        assert text.startswith("top\n<!-- bench: begin -->\nMedians on A processor")
        assert text.endswith("<!-- bench: end -->\nbottom\n")
        assert "old" not in text and text.count("op 1M") == 1
    readme.write_text("no markers\n")
    result = table("--update", readme, run)
    assert result.returncode != 0 and "expected exactly one pair of markers" in result.stderr
