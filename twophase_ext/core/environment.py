"""What computed: versions, processor, threads, commit."""

import platform
import subprocess
import sys
import time
from typing import Any

import numpy
import torch

from .._load import build_info


def environment_of_run(device: torch.device, seed: int) -> dict[str, Any]:
    """Versions, device, seed and the commit of the working folder, as plain data."""
    return {
        "twophase_ext": build_info(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "commit": _commit(),
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def environment() -> dict[str, Any]:
    """What computed: versions, processor, threads."""
    info = build_info()
    return {
        "twophase_ext": info["version"],
        "isa": info["isa"],
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the working folder, None outside a repository or without git."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return found.stdout.strip() or None


def processor_name() -> str:
    """The CPU's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
