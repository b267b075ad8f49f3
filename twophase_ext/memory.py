"""How much memory can be allocated now."""

import os
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
