"""Load the compiled operators, or say why they cannot be loaded. Importing never compiles."""

import importlib
import importlib.util
import sys
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

import torch

from twophase_ext._sources import digest

_NAME = "twophase_ext._C"


def _installed(here: Path) -> Path | None:
    """The compiled module of another twophase_ext on sys.path: an ordinary installation's."""
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    folders = (Path(entry or ".") / "twophase_ext" for entry in sys.path)
    return next((f / name for f in folders if f.resolve() != here and (f / name).is_file()), None)


def load(here: Path) -> ModuleType:
    """Import twophase_ext._C, which registers torch.ops.twophase.* by being loaded.

    In a clone (csrc lies beside the package's folder) whose package was installed elsewhere, the
    installed library serves, if it was built of these sources. A library in the folder itself that
    was built of others warns.

    Raises ImportError that names the likely cause.
    """
    sources = digest(here.parent)
    try:
        module = importlib.import_module("twophase_ext._C")  # noqa: TID251  this name alone
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            raise
        elsewhere = _installed(here) if sources else None
        if elsewhere is None:
            raise ImportError(
                "twophase_ext has no compiled library beside it. Either it was imported from its "
                "source folder (run `pip install -e . --no-build-isolation` there, or change to "
                "another folder), or it was built for another Python version (run "
                "`pip install --force-reinstall --no-deps .`)."
            ) from error
        module = _load_from(elsewhere)
        if _built_of(module) != sources:
            raise ImportError(
                f"twophase_ext has no compiled library beside it, and the installed one "
                f"({elsewhere}) was built of other sources than those in {here.parent / 'csrc'}: "
                "run `make` or `pip install .` there, or change to another folder."
            ) from error
    except ImportError as error:
        raise _unloadable(error) from error
    if sources and _built_of(module) not in ("", sources):
        warnings.warn(
            f"the compiled library in {here} was built of other sources than those in "
            f"{here.parent / 'csrc'}: compile it again (`make`, or "
            "`python setup.py build_ext --inplace`)",
            RuntimeWarning,
            stacklevel=2,
        )
    return module


def _built_of(module: ModuleType) -> str:
    """The digest of a library's sources; "" where it was compiled by hand, without one."""
    return module.sources() if hasattr(module, "sources") else "an older version's"


def _load_from(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file}: no extension module")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise _unloadable(error) from error
    sys.modules[_NAME] = module
    return module


def _unloadable(error: ImportError) -> ImportError:
    return ImportError(
        f"the compiled library of twophase_ext could not be loaded ({error}). It was built for "
        f"torch 2.11 or newer; this is torch {torch.__version__}. Likely causes: an older "
        "torch, a torch that was replaced half-way, or another C++ runtime. Reinstall with "
        "`pip install --force-reinstall --no-deps .`."
    )


_C = load(Path(__file__).resolve().parent)
_C.build_info()  # ValueError where TWOPHASE_ISA is no instruction set


def build_info() -> dict[str, str | list[str]]:
    """What the compiled library is made of.

    Keys: version; torch_target (the stable-ABI version); compiler; isa (in use) and isa_variants
    (usable on this processor); cuda (the CUDA compiler's version, "" without CUDA kernels);
    cuda_architectures.
    """
    info: dict[str, str | list[str]] = dict(_C.build_info())
    info["isa_variants"] = str(info["isa_variants"]).split(";")
    info["cuda_architectures"] = str(info["cuda_architectures"]).split()
    return info
