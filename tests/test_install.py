"""Importing from anywhere: the clone's root, a script in it, an installation; or a named reason."""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import pytest

from test_build import PACKAGE, ROOT, environment, run

# the import hook of an editable installation around the tests would answer first
SHOW = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
import torch, twophase_ext
from twophase_ext import _load
assert float(twophase_ext.softplus(torch.zeros(1), 1.0)) > 0.69
print(twophase_ext.__file__, _load._C.__file__, sep="\\n")
"""


def copied(source: Path, target: Path, *ignored: str) -> Path:
    return shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", *ignored))


def libraries() -> list[Path]:
    return [*PACKAGE.glob("_C.*"), *PACKAGE.glob("libtwophase_ops.*")]


@pytest.fixture
def clone(tmp_path) -> Path:
    """The sources alone, with a script that imports the package."""
    root = tmp_path / "clone"
    copied(ROOT / "twophase_ext", root / "twophase_ext", "*.so")
    copied(ROOT / "csrc", root / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", root)
    (root / "script.py").write_text(SHOW)
    return root


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder of sys.path that holds the package as `pip install .` leaves it."""
    copied(PACKAGE, tmp_path / "site" / "twophase_ext")
    return tmp_path / "site"


def test_the_tests_import_what_was_installed():
    try:
        distribution = importlib.metadata.distribution("twophase-ext")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed: the source folder is on the path")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    editable = origin.get("dir_info", {}).get("editable", False)
    if not editable and ROOT in {Path(p).resolve() for p in sys.path}:
        pytest.skip("a developer put the source folder before the installed package")
    installed = ROOT if editable else Path(distribution.locate_file(""))
    assert installed.resolve() / "twophase_ext" == PACKAGE


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [["-c", f"import twophase\n{SHOW}"], ["-m", "twophase.cli", "--help"]], ids=["-c", "-m"]
)
def test_python_in_the_root(how):
    """After `make`, or another installation. A script's folder comes first too: the clone below."""
    found = run([sys.executable, *how], cwd=ROOT, env=environment())
    assert found.returncode == 0 and "Warning" not in found.stderr, found.stderr


def test_a_clone_without_a_library_takes_the_installed_one(clone, site):
    env = environment(PYTHONPATH=str(site))
    found = run([sys.executable, "script.py"], cwd=clone, env=env)
    assert found.returncode == 0 and found.stderr == "", found.stderr
    package, library = map(Path, found.stdout.splitlines())
    assert package.is_relative_to(clone) and library.is_relative_to(site)


def test_an_installed_library_of_other_sources_is_refused(clone, site):
    with (clone / "csrc" / "module.cpp").open("a") as file:
        file.write("// changed\n")
    env = environment(PYTHONPATH=str(site))
    found = run([sys.executable, "script.py"], cwd=clone, env=env)
    last = found.stderr.strip().splitlines()[-1]
    assert found.returncode != 0 and last.startswith("ImportError: twophase_ext has no compiled")
    assert "was built of other sources" in last and "run `make`" in last


def test_a_library_in_place_of_other_sources_warns(clone):
    for library in libraries():
        shutil.copy(library, clone / "twophase_ext")
    found = run([sys.executable, "script.py"], cwd=clone, env=environment())
    assert found.returncode == 0 and found.stderr == "", found.stderr
    (clone / "csrc" / "module.cpp").unlink()
    found = run([sys.executable, "script.py"], cwd=clone, env=environment())
    assert found.returncode == 0
    assert "RuntimeWarning: the compiled library in" in found.stderr
    assert "was built of other sources than those in" in found.stderr


def test_importing_without_the_library_says_why(tmp_path):
    copied(ROOT / "twophase_ext", tmp_path / "twophase_ext", "*.so")
    # an editable installation's import hook would find the library in the source folder
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]"
    command = [sys.executable, "-c", f"{code}; import twophase_ext"]
    result = run(command, cwd=tmp_path, env=environment())
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: twophase_ext has no compiled library beside it")
    assert "pip install -e . --no-build-isolation" in last


def test_importing_a_broken_library_says_why(tmp_path):
    target = copied(ROOT / "twophase_ext", tmp_path / "twophase_ext", "*.so")
    module = next(PACKAGE.glob("_C.*"))
    shutil.copy(module, target)  # libtwophase_ops.so, to which it is linked, is missing
    result = run([sys.executable, "-c", "import twophase_ext"], cwd=tmp_path, env=environment())
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the compiled library of twophase_ext could not be loaded")
    assert "libtwophase_ops.so" in last and "torch" in last


def test_a_wheel_holds_every_file(tmp_path):
    """What an editable installation cannot miss: modules and templates, of every subpackage."""
    folders = ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    command = [sys.executable, "setup.py", "--quiet", *folders]
    built = run(command, cwd=ROOT, env=environment())
    assert built.returncode == 0, built.stderr
    files = (p for p in (tmp_path / "lib").rglob("*") if p.is_file())
    found = {p.relative_to(tmp_path / "lib").as_posix() for p in files}
    expected = {
        path.relative_to(above).as_posix()
        for above in (ROOT, ROOT / "python")
        for package in ("twophase_ext", "twophase")
        for path in (above / package).rglob("*")
        if path.suffix in (".py", ".jinja") or path.name == "py.typed"
    }
    assert found == expected and len(found) > 100
