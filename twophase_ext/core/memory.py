"""How much memory can be allocated now, and how fast this machine multiplies."""

import os
import time
from pathlib import Path

import torch


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now (RAM: MemAvailable, a cgroup's limit)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        limit, current = ((group / f"memory.{part}").read_text() for part in ("max", "current"))
        available = min(available, int(limit) - int(current))
    except (OSError, ValueError, KeyError):  # not Linux, no cgroup, or no limit ("max")
        pass
    return available


def float64_rate(device: torch.device) -> float:
    """Float64 operations a second of a matrix product of 512 on this device."""
    a = torch.ones(512, 512, dtype=torch.float64, device=device)  # no draw: the caller's generator
    (a @ a).sum().item()
    started = time.perf_counter()
    (a @ a).sum().item()
    return 2 * 512**3 / max(time.perf_counter() - started, 1e-6)
