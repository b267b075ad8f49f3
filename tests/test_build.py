"""The build and the tree: what the library is made of, what happens where it cannot be built."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

import twophase_ext
from twophase_ext._sources import digest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(twophase_ext.__file__).resolve().parent
FOLDERS = ["csrc", "twophase_ext", "python", "tests", "bench", "docs", ".ci"]
TEXT = {".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".txt", ".sh", ".yaml", ".yml", ""}


def run(command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        **options,
    )


def files() -> list[Path]:
    """Every text file of the project, no build product."""
    found = [p for p in ROOT.iterdir() if p.is_file() and p.name != ".git"]  # a worktree's
    for folder in FOLDERS:
        found += (p for p in (ROOT / folder).rglob("*") if p.is_file())
    return [p for p in found if p.suffix in TEXT and "__pycache__" not in p.parts]


def environment(**changes: str) -> dict[str, str]:
    """This environment without PYTHONPATH and preloaded sanitizers."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LD_PRELOAD")}
    return kept | changes


def test_build_info():
    info = twophase_ext.build_info()
    texts = {"version", "torch_target", "compiler", "isa", "cuda"}
    lists = {"isa_variants", "cuda_architectures"}
    assert set(info) == texts | lists
    assert all(isinstance(info[key], str) for key in texts)
    assert all(isinstance(v, str) for key in lists for v in info[key])
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert info["version"] == version
    assert info["torch_target"] == "2.11"
    assert re.match(r"(GNU|Clang|AppleClang) \d+", info["compiler"])
    assert info["isa"] in info["isa_variants"] and "baseline" in info["isa_variants"]
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_library_uses_the_stable_abi_only():
    symbols = run(["nm", "-D", "--undefined-only", PACKAGE / "libtwophase_ops.so"])
    assert symbols.returncode == 0
    assert "aoti_torch" in symbols.stdout or "torch_call_dispatcher" in symbols.stdout
    unstable = re.findall(r"\b_ZNK?(?:2at|3c10|5torch)\w*", symbols.stdout)
    assert unstable == []
    needed = run(["readelf", "-d", PACKAGE / "libtwophase_ops.so"]).stdout
    assert not re.search(r"NEEDED.*lib(torch_cuda|cudart|c10)", needed)


def test_installing_without_torch_ends_in_one_clear_line(tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    # pip and setuptools alone: the site-packages of this environment hold torch too
    tools = tmp_path / "tools"
    tools.mkdir()
    packages = Path(importlib.util.find_spec("setuptools").origin).parent.parent
    for pattern in ("pip", "setuptools*", "_distutils_hack"):
        for path in packages.glob(pattern):
            (tools / path.name).symlink_to(path)
    arguments = ["install", "--no-index", "--no-build-isolation", "--target", tmp_path / "lib"]
    result = run([python, "-m", "pip", *arguments, ROOT], env=environment(PYTHONPATH=str(tools)))
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if "torch" in line]
    assert len(lines) == 1, result.stderr
    assert "needs torch >= 2.11" in lines[0] and "-m pip install torch`" in lines[0]
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake on PATH")
def test_cuda_on_without_nvcc_is_a_clear_error(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "c++", "g++", "cc", "make", "ld", "as", "ar", "ranlib", "uname", "sh"):
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(Path(found))
    result = run(
        ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-DTWOPHASE_CUDA=ON"],
        env=environment(PATH=str(tools), CUDACXX=str(tmp_path / "no-nvcc"))
        if os.environ.get("CUDACXX")
        else environment(PATH=str(tools)),
    )
    assert result.returncode != 0
    text = " ".join(result.stderr.split())
    assert "TWOPHASE_CUDA=ON, but no CUDA compiler was found" in text
    assert "put nvcc on PATH" in text


def test_files_are_short():
    long = {
        str(p.relative_to(ROOT)): count
        for p in files()
        if p.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
        and (count := len(p.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert long == {}


def test_no_path_of_a_machine_in_the_tree():
    pattern = re.compile(r"/(?:home|root|Users|work|opt)/\w|\.pyenv|file://|https?://[\w.]*pypi")
    shared = re.compile(r"\.\./shared")  # the data folder of CI: .ci/run alone names it
    hits = []
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if "re.compile(" in line and path == Path(__file__).resolve():
                continue
            if pattern.search(line) or (shared.search(line) and name != ".ci/run"):
                hits.append(f"{name}:{number}: {line.strip()}")
    assert hits == []


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module)
        elif (  # importlib.import_module("...")
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names.add(str(node.args[0].value))
    return {name.split(".")[0] for name in names}


def test_floors_import_downwards_only():
    core, reference = ROOT / "twophase_ext", ROOT / "python" / "twophase" / "reference"
    modules = {p: imported(p) for f in (core, reference) for p in f.rglob("*.py")}
    assert len(modules) > 10
    for path, names in modules.items():
        forbidden = "twophase_ext" if path.is_relative_to(reference) else "twophase"
        assert forbidden not in names, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_import_needs_torch_and_numpy_alone(tmp_path):
    """The GPU check runs on machines that have nothing else."""
    code = "import sys, twophase_ext; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    path = os.pathsep.join(p for p in sys.path if p)
    result = run([sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=path))
    assert result.returncode == 0, result.stderr
    declared = {"rich", "jsonargparse", "pooch", "sklearn", "scipy", "yaml", "matplotlib"}
    assert declared.isdisjoint(result.stdout.split())


def test_a_wheel_is_for_every_python_that_is_named():
    code = (
        "import setuptools, runpy; setuptools.setup = lambda **_: None\n"
        "found = runpy.run_path('setup.py')['pythons']()\n"
        "print(*(part for python in found for part in python))"
    )
    command = [sys.executable, "-c", code]
    own = run(command, cwd=ROOT, env=environment(TWOPHASE_PYTHONS=""))
    include, suffix, tag = own.stdout.split()
    assert (Path(include) / "Python.h").is_file() and suffix.endswith(".so")
    assert tag == f"cp{sys.version_info[0]}{sys.version_info[1]}"
    twice = run(command, cwd=ROOT, env=environment(TWOPHASE_PYTHONS=f"{sys.executable} python3"))
    assert twice.stdout.startswith(own.stdout.strip()) and twice.returncode == 0
    assert twice.stdout.split().count(tag) == 1
    missing = run(command, cwd=ROOT, env=environment(TWOPHASE_PYTHONS="python9"))
    assert missing.returncode == 1 and "TWOPHASE_PYTHONS: python9 does not run" in missing.stderr


def test_a_source_distribution_has_what_it_is_built_from(tmp_path):
    tree = tmp_path / "tree"  # setuptools puts a copy beside setup.py for a while
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "twophase_ext", "python"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    kept = ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "constraints.txt")
    for name in (*kept, "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path]
    result = run(command, cwd=tree, env=environment())
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "out", filter="data")
    (folder,) = (tmp_path / "out").iterdir()
    assert digest(folder) == digest(ROOT) != ""
    for name in ("LICENSE", "README.md", "setup.py", "pyproject.toml", "CMakeLists.txt"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    kinds = (".py", ".html", ".typed")
    for source in ("twophase_ext", "python/twophase"):
        theirs, ours = (
            {p.relative_to(root) for p in (root / source).rglob("*") if p.suffix in kinds}
            for root in (folder, ROOT)
        )
        assert theirs == ours


def test_the_command_says_what_is_missing(tmp_path):
    code = (
        "import sys; sys.modules['jsonargparse'] = None; from twophase.console import main; main()"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    result = run([sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=path))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "twophase: the command line needs jsonargparse, which is not installed: "
        'pip install ".[cli]"'
    )
