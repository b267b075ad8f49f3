"""Load the compiled operators, or say why they cannot be loaded. Importing never compiles."""

import importlib
from types import ModuleType

import torch


def load() -> ModuleType:
    """Import twophase_ext._C, which registers torch.ops.twophase.* by being loaded.

    Raises ImportError that names the likely cause.
    """
    try:
        return importlib.import_module("twophase_ext._C")
    except ModuleNotFoundError as error:
        if error.name != "twophase_ext._C":
            raise
        raise ImportError(
            "twophase_ext has no compiled library beside it. Either it was imported from its "
            "source folder (change to another folder, or run "
            "`pip install -e . --no-build-isolation` there), or it was built for another Python "
            "version (run `pip install --force-reinstall --no-deps .`)."
        ) from error
    except ImportError as error:
        raise ImportError(
            f"the compiled library of twophase_ext could not be loaded ({error}). It was built for "
            f"torch 2.11 or newer; this is torch {torch.__version__}. Likely causes: an older "
            "torch, a torch that was replaced half-way, or another C++ runtime. Reinstall with "
            "`pip install --force-reinstall --no-deps .`."
        ) from error


_C = load()
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
