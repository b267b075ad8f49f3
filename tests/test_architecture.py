"""The page on the architecture says what the tree is; the script that measures it sees circles."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import quiet, toy_data, toy_mlp
from twophase_ext.training import phases
from twophase_ext.training.phases.last_layer import LastLayer

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "structure.py"


@pytest.fixture
def structure(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import structure

    return structure


def test_the_map_is_the_tree():
    found = subprocess.run([sys.executable, SCRIPT, "--map"], capture_output=True, text=True)
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert page.endswith(found.stdout), "docs/architecture.md: run python bench/structure.py --map"


def test_files_named_on_the_page_exist():
    page = (ROOT / "docs" / "architecture.md").read_text().split("## Map")[0]
    names = {word for word in page.replace("`", " ").replace(",", " ").split() if ".py" in word}
    files = [
        str(path)
        for part in ("twophase_ext", "python", "tests")
        for path in (ROOT / part).rglob("*.py")
    ]
    for name in names:
        name = name.strip("():;.")
        assert "foo" in name or any(file.endswith("/" + name) for file in files), name


def test_no_circle_and_no_late_import(structure):
    paths = structure.modules()
    found = {name: list(structure.imports(name, path, set(paths))) for name, path in paths.items()}
    assert structure.circles({n: {t for t, _ in targets} for n, targets in found.items()}) == []
    assert [n for n, targets in found.items() if any(late for _, late in targets)] == []


def test_a_circle_is_seen(structure):
    assert structure.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert structure.circles({"a": {"b"}, "b": set()}) == []


def test_a_new_second_phase_is_a_class_and_a_line(monkeypatch):
    """Steps of the last layer with half the base algorithm's rate, say."""

    class Halved(LastLayer):
        def fill_caches(self):
            super().fill_caches()
            for group in self.context.optimizer.param_groups:
                group["lr"] /= 2

    monkeypatch.setitem(phases.SECOND, "halved", Halved)
    result = quiet(toy_mlp(), epochs=4, tau=2, second_phase="halved").fit(toy_data())
    assert [row["learning_rate"] for row in result.history] == [0.01, 0.01, 0.005, 0.005]
    found = quiet(toy_mlp(), epochs=4, tau=2).branch(
        {"base": {}, "half": {"second_phase": "halved"}}, toy_data()
    )
    assert found["half"].status == "completed"


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): count
        for folder in ("twophase_ext", "python", "tests", "bench", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
        and (count := len(path.read_text().splitlines())) > 400
    }
    assert long == {}
