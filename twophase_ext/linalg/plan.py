"""Where the tiles go, and what a certificate costs before it starts."""

import math
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.memory import available_memory
from .gram_tiles import PANEL
from .tiles import Grid

SHARE = 0.9  # of the memory that is free
TILE, LARGE_TILE = 1440, 2080  # as PANEL no powers of two: such strides cost a BLAS a tenth


@dataclass(frozen=True)
class Plan:
    """What `certify_gram` will use; print it."""

    n: int
    columns: int
    tile: int  # rows
    panel: int  # columns
    gram: str  # where G's tiles lie: "device" (CUDA), "host" (memory) or "file"
    factor: str  # where L's lie
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    group_bytes: int  # sums that one pass over the columns can hold
    passes: int  # over the columns for G, at least
    flops: float
    seconds: float  # of one attempt, at the measured rate of a product, panels not counted

    def __str__(self) -> str:
        """One line."""
        sizes = [("device memory", self.device_bytes), ("memory", self.host_bytes)]
        sizes += [("disk", self.disk_bytes)]
        used = ", ".join(f"{b / 2**30:.3g} GiB of {name}" for name, b in sizes if b)
        return (
            f"n = {self.n:,}, {self.columns:,} columns: {used}; {self.flops:.2e} operations, about "
            f"{self.seconds / 60:.1f} min; passes over the columns: {self.passes} or more; "
            f"tiles of {self.tile} in {self.gram} (G) and {self.factor} (L)"
        )


def plan(
    n: int,
    columns: int,
    *,
    tile: int | None = None,
    panel: int = PANEL,
    folder: Path | None = None,
    memory: int | None = None,
    device: torch.device | None = None,
    rate: float | None = None,
) -> Plan:
    """How G = M M^T and its factor L fit, M [n, columns].

    With lower = the bytes of all lower tiles, about 4 n (n + tile), and
    work = 8 (3 n panel + n tile + 4 tile^2): a panel with what its source and its scaling need
    beside it, a row of L, buffers:
        without a folder   work + 2 lower <= memory
        with a folder      work + lower <= memory and 2 lower <= disk (G and a copy of L), or
                           work + tiles <= memory: L is read from the file, and a group of sums that
                           fits makes a pass over the columns
    On CUDA the same for the device's memory, then for the host's, where tiles are pinned.
    memory: bytes that may be used on the device that computes (default: SHARE of what is free).
    rate: operations a second (default: measured). Raises ValueError for sizes below 1 (columns: 0),
    MemoryError with the numbers where nothing fits.
    """
    panel_name = [("n", n, 1), ("columns", columns, 0), ("panel", panel, 1), ("tile", tile, 1)]
    for name, value, least in panel_name:
        if value is not None and value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    device = device or torch.device("cpu")
    tile = min(tile or (TILE if n <= 20_000 else LARGE_TILE), n)
    grid = Grid(n, tile)
    lower = grid.bytes
    work = 8 * (3 * n * min(panel, max(columns, 1)) + n * tile + 4 * tile**2)
    have = {"host": int(SHARE * available_memory(torch.device("cpu")))}
    main = "host"
    if device.type == "cuda":
        main = "device"
        have[main] = int(SHARE * available_memory(device))
    if memory is not None:
        have[main] = memory
    if folder is not None:
        existing = sum(f.stat().st_blocks * 512 for f in folder.glob("tiles.bin"))
        have["file"] = shutil.disk_usage(folder).free + existing
    places = [place for place in ("device", "host") if place in have]
    refused = []
    for factor in [*places, *(["file"] if folder else [])]:
        for gram in ["file"] if folder else places:
            need: Counter[str] = Counter({main: work})
            if folder is not None:
                need["file"] = 2 * grid.file_bytes
            for place in (gram, factor):
                need[place] += lower if place != "file" else 0
            if all(need[place] <= have[place] for place in need):
                group = max(8 * tile**2, have[main] - work)
                flops = float(n) * (n + tile) * columns + n**3 / 3 + float(n) ** 2 * tile
                return Plan(
                    n=n,
                    columns=columns,
                    tile=tile,
                    panel=panel,
                    gram=gram,
                    factor=factor,
                    device_bytes=need["device"],
                    host_bytes=need["host"],
                    disk_bytes=need["file"],
                    group_bytes=group,
                    passes=math.ceil(lower / group),
                    flops=flops,
                    seconds=flops / (rate or _measured_rate(device, min(n, 1024))),
                )
            refused.append(
                " and ".join(f"{b / 2**30:.3g} GiB of {place}" for place, b in need.items() if b)
            )
    free = ", ".join(f"{b / 2**30:.3g} GiB of {place}" for place, b in have.items())
    advice = "" if folder else "; with a folder, tiles go to a file"
    raise MemoryError(f"n = {n} rows need {' or '.join(refused)}; there are {free}{advice}")


def _measured_rate(device: torch.device, size: int) -> float:
    """Operations a second of one float64 product of `size` rows."""
    x = torch.ones(size, size, dtype=torch.float64, device=device)
    float((x @ x.T)[0, 0])
    began = time.perf_counter()
    float((x @ x.T)[0, 0])
    return 2.0 * size**3 / max(time.perf_counter() - began, 1e-9)
