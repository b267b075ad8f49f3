"""Build the native libraries with CMake; everything else stands in pyproject.toml.

Environment: TWOPHASE_CUDA=ON|OFF|AUTO, TWOPHASE_CUDA_ARCHS="90;100",
TWOPHASE_SANITIZE=address,undefined (the CPU code, in a build folder of its own).
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

from setuptools import Extension, find_packages, setup
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
            "PYTHON_INCLUDE": sysconfig.get_path("include"),
            "MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
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
    cmdclass={"build_ext": CMakeBuild, "dist_info": NeedsTorch},
)
