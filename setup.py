"""Build the native libraries with CMake; everything else stands in pyproject.toml.

Environment: TWOPHASE_CUDA=ON|OFF|AUTO, TWOPHASE_CUDA_ARCHS="90;100",
TWOPHASE_PYTHONS="python3.12 python3.13" (other interpreters that the wheel is for, too: the
operators need none, the module that loads them is compiled for each),
TWOPHASE_SANITIZE=address,undefined (the CPU code, in a build folder of its own).
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module  # noqa: TID251  of one name
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
digest = runpy.run_path(str(ROOT / "twophase_ext" / "_sources.py"))["digest"]


def version() -> str:
    """The version in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"', text, re.MULTILINE).group(1)


def find_torch() -> Path:
    """The torch package of the environment that is installed into.

    Never imported: pip's build isolation hides it, and its headers and one library are enough.
    """
    installed = Path(sysconfig.get_path("platlib")) / "torch"
    if not (installed / "include").is_dir():
        code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
        # -I: without the PYTHONPATH through which pip isolates the build.
        origin = subprocess.run(
            [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
        ).stdout.strip()
        installed = Path(origin).parent if origin else installed
    if not (installed / "include" / "torch" / "csrc" / "stable").is_dir():
        python = Path(sys.executable).name
        sys.exit(
            "twophase_ext needs torch >= 2.11 in this environment before it is installed: "
            f"run `{python} -m pip install torch` first, then repeat this command"
        )
    return installed


class NeedsTorch(dist_info):
    """pip asks for metadata first: stop here, before it downloads torch as a dependency."""

    def run(self) -> None:
        """Look for torch, then go on."""
        find_torch()
        super().run()


def pybind11_include(torch: Path) -> str:
    """pybind11's headers: the build requirement's, or the copy that torch carries."""
    try:
        return import_module("pybind11").get_include()
    except ImportError:
        return str(torch / "include")


def pythons() -> list[list[str]]:
    """[include folder, suffix of extension modules, wheel tag] of each Python that is built for."""
    code = (
        "import sys, sysconfig as s; print(s.get_path('include'), s.get_config_var('EXT_SUFFIX'), "
        "'cp%d%d' % sys.version_info[:2], sep='\\n')"
    )
    found = []
    for python in [sys.executable, *os.environ.get("TWOPHASE_PYTHONS", "").split()]:
        try:
            told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"TWOPHASE_PYTHONS: {python} does not run: {error}")
        include, suffix, tag = told.stdout.splitlines()
        if not (Path(include) / "Python.h").is_file():
            sys.exit(f"TWOPHASE_PYTHONS: {python} has no Python.h in {include}")
        if [include, suffix, tag] not in found:
            found.append([include, suffix, tag])
    return found


class Wheel(bdist_wheel):
    """A wheel for every Python that was built for."""

    def get_tag(self) -> tuple[str, str, str]:
        """Their tags, and the platform's."""
        tags = ".".join(tag for _, _, tag in pythons())
        return tags, tags, super().get_tag()[2]


class CMakeBuild(build_ext):
    """Runs CMake and ninja once for both libraries."""

    def run(self) -> None:
        """Configure, compile, and install into the package folder (in place when asked)."""
        torch = find_torch()
        inplace = bool(self.inplace or getattr(self, "editable_mode", False))
        target = ROOT / "twophase_ext" if inplace else Path(self.build_lib) / "twophase_ext"
        sanitize = os.environ.get("TWOPHASE_SANITIZE", "")
        folder = f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = ROOT / "build" / (f"{folder}-sanitize" if sanitize else folder)
        build.mkdir(parents=True, exist_ok=True)
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": str(target.resolve()),
            "TORCH_DIR": str(torch),
            "PYBIND11_INCLUDE": pybind11_include(torch),
            "PYTHON_INCLUDES": ";".join(include for include, _, _ in pythons()),
            "MODULE_SUFFIXES": ";".join(suffix for _, suffix, _ in pythons()),
            "TWOPHASE_VERSION": version(),
            "TWOPHASE_SOURCES": digest(ROOT),
            "TWOPHASE_CUDA": os.environ.get("TWOPHASE_CUDA", "AUTO").upper(),
            "TWOPHASE_CUDA_ARCHS": os.environ.get("TWOPHASE_CUDA_ARCHS", "90"),
            "TWOPHASE_SANITIZE": sanitize,
        }
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        # A cache from an isolated build names tools in a folder that has vanished.
        cache = build / "CMakeCache.txt"
        if cache.exists() and not all(
            Path(tool).exists()
            for tool in re.findall(
                r"^CMAKE_(?:COMMAND|MAKE_PROGRAM):\w+=(.+)", cache.read_text(), re.M
            )
        ):
            configure.append("--fresh")
        if ninja := shutil.which("ninja"):
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        configure += [f"-D{key}={value}" for key, value in definitions.items()]
        compile_, install = ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]
        for command in (configure, compile_, install):
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                sys.exit("cmake was not found: install it (pip install cmake ninja) and repeat")
            except subprocess.CalledProcessError as error:
                sys.exit(f"building twophase_ext failed in: {' '.join(error.cmd)}")


setup(
    packages=[
        *find_packages(include=["twophase_ext*"]),
        "twophase",
        *(f"twophase.{package}" for package in find_packages("python/twophase")),
    ],
    package_dir={"twophase": "python/twophase"},
    package_data={"twophase_ext": ["py.typed"], "twophase.report": ["*.jinja"]},
    ext_modules=[Extension("twophase_ext._C", sources=[])],
    cmdclass={"bdist_wheel": Wheel, "build_ext": CMakeBuild, "dist_info": NeedsTorch},
)
