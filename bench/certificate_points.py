"""One point of bench/certificate_scale.py, in a process of its own, so that its memory is its own.

python bench/certificate_points.py KIND FEATURES.npy N [more]      JSON on standard output
"""

import json
import math
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twophase_ext.expressivity.certify import WideSource, certify_matrix
from twophase_ext.expressivity.kinks import local_kinks
from twophase_ext.expressivity.one_sided import exact_softplus
from twophase_ext.expressivity.separation import separate
from twophase_ext.expressivity.triangular import certify_triangular, preactivation_error
from twophase_ext.expressivity.witness import spread_kinks, whiten
from twophase_ext.linalg.certificate import certify_gram
from twophase_ext.linalg.plan import plan
from twophase_ext.linalg.progress import Stage, Stages
from twophase_ext.linalg.tiles import Grid

SOFTPLUS, SEED = exact_softplus(100.0), 0
ERROR = 1e-11  # of a sample's features relative to its norm, in the place of a backbone's
GEMM = (4096, 8000)
REPEATS, ENOUGH = 5, 20.0  # the best of so many, but no further run after so many seconds


def features(path: Path, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(z [n, 512], bounds of its errors [n]); what the file holds beyond n rows is not read."""
    z = torch.from_numpy(np.load(path, mmap_mode="r", allow_pickle=False)[:n].copy())
    if len(z) < n:
        raise ValueError(f"n: expected {len(z)} or less, the samples of the data, got {n}")
    return z, ERROR * z.norm(dim=1)


def wide_source(z: torch.Tensor, error: torch.Tensor) -> WideSource:
    """M of a witness with kinks at the samples' mean, m = 1.1 n neurons with float32 weights."""
    m = math.ceil(1.1 * len(z))
    generator = torch.Generator().manual_seed(SEED)
    weight, bias = spread_kinks(whiten(z, error, torch.float32), m, torch.float32, generator)
    return WideSource(z, weight, bias, SOFTPLUS, True)


def status(name: str) -> int:
    """Bytes of a field of /proc/self/status. Unlike getrusage it knows nothing of the parent."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status: expected a field {name}, got none")
    return 1024 * int(found[1])


def timed(run: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What the fastest of several runs returns, its time, and the bytes taken and held before."""
    before = status("VmRSS")
    with suppress(OSError):  # VmHWM starts anew; where that is forbidden it is an upper bound
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < ENOUGH:
        began = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - began)
        if seconds[-1] == min(seconds):
            best = result
    peak = status("VmHWM")
    return best, {"seconds": min(seconds), "runs": len(seconds), "peak": peak, "before": before}


def gemm_rates(n: int) -> dict[str, float]:
    """Size: operations a second of torch.mm in float64, the best of several."""
    rates = {}
    for size in sorted({min(size, n) for size in GEMM}):
        a, b = (torch.rand(size, size, dtype=torch.float64) for _ in range(2))
        c = torch.mm(a, b)
        best = math.inf
        for _ in range(5):
            began = time.perf_counter()
            torch.mm(a, b, out=c)
            best = min(best, time.perf_counter() - began)
        rates[str(size)] = 2.0 * size**3 / best
    return rates


def stage_sums(stages: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Operations and seconds of Gram and Cholesky, failed attempts included."""
    sums = {}
    for name in ("Gram", "Cholesky"):
        mine = [s for s in stages if s["name"].split(",")[0] == name]
        sums[name] = {k: sum(s[k] for s in mine) for k in ("flops", "seconds")}
    return sums


def point_rates(path: Path, n: int) -> dict[str, Any]:
    source = wide_source(*features(path, n))
    before = gemm_rates(n)
    proof = certify_gram(source, scale_rows=False)
    after = gemm_rates(n)
    return {
        "columns": source.columns,
        "status": proof.status,
        "attempts": proof.attempts,
        "passes": proof.passes,
        "sigma_min_lower": proof.sigma_min_lower,
        "stages": stage_sums(proof.stages),
        "dgemm": {"before": before, "after": after},
    }


def point_gram(path: Path, n: int) -> dict[str, Any]:
    z, error = features(path, n)
    source = wide_source(z, error)
    certify_gram(wide_source(z[:64], error[:64]), scale_rows=False)
    planned = plan(n, source.columns).host_bytes
    proof, cost = timed(lambda: certify_gram(source, scale_rows=False))
    return cost | {
        "proved": proof.proved,
        "sigma_min_lower": proof.sigma_min_lower,
        "planned": planned,
        "stages": stage_sums(proof.stages),
    }


def triangular(z: torch.Tensor, error: torch.Tensor):
    """The witness with a kink for each sample, and its certificate."""
    kinks = local_kinks(z, whiten(z, error, torch.float32), torch.float32, SOFTPLUS)
    return certify_triangular(
        z, error, kinks.weight, kinks.bias, kinks.order, SOFTPLUS, near=kinks.near
    )


def point_triangular(path: Path, n: int) -> dict[str, Any]:
    z, error = features(path, n)
    triangular(z[:64], error[:64])
    proof, cost = timed(lambda: triangular(z, error))
    return cost | {"proved": proof.proved, "sigma_min_lower": proof.sigma_min_lower}


def point_separation(path: Path, n: int) -> dict[str, Any]:
    z, error = features(path, n)
    separate(z[:64].clone(), error[:64].clone())
    proof, cost = timed(lambda: separate(z, error))
    return cost | {"proved": proof.proved, "margin": proof.margin}


def point_numpy(path: Path, n: int) -> dict[str, Any]:
    z, error = features(path, n)

    def gram() -> dict[str, Any]:
        source = wide_source(z, error)
        spread = preactivation_error(z, error, source.weight, source.bias)
        return certify_matrix(
            source,
            spread,
            factorization="gram",
            folder=None,
            stages=Stages(False, None),
            constants={},
            assumptions=[],
        )

    by_gram, gram_cost = timed(gram)
    by_kinks, kinks_cost = timed(lambda: triangular(z, error))
    source = wide_source(z, error)
    array = source.panel(0, source.columns).numpy()
    np.linalg.matrix_rank(array[:64])
    rank, numpy_cost = timed(lambda: int(np.linalg.matrix_rank(array)))  # h is given to it
    return {
        "columns": source.columns,
        "numpy": numpy_cost | {"rank": rank},
        "gram": gram_cost | {k: by_gram[k] for k in ("status", "sigma_min_lower")},
        "triangular": kinks_cost
        | {
            "status": "proved" if by_kinks.proved else "undecided",
            "sigma_min_lower": by_kinks.sigma_min_lower,
        },
    }


class CountedStages(Stages):
    """Stages that leave their count in a file, where it outlives the process."""

    def __init__(self, path: Path) -> None:
        """path: gets two float64: operations executed, and those since a tile was last kept."""
        super().__init__(False, None)
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.log = path.with_suffix(".stages")  # of all processes: stages that came to their end
        self.executed = self.kept = 0.0

    @contextmanager
    def stage(self, name: str, total: float, unit: str = "operations") -> Iterator[Stage]:
        with super().stage(name, total, unit) as stage:
            before, tiles = self.executed, 0

            def show() -> None:
                nonlocal tiles
                self.executed = before + stage.count
                if stage.tiles > tiles:
                    tiles, self.kept = stage.tiles, self.executed
                os.pwrite(self.file, struct.pack("dd", self.executed, self.executed - self.kept), 0)

            stage.show = show
            yield stage
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{name}\n")


def read_count(path: Path) -> tuple[float, float]:
    """(operations executed, those since a tile was last kept) of a process, dead or alive."""
    raw = path.read_bytes() if path.exists() else b""
    return struct.unpack("dd", raw) if len(raw) == 16 else (0.0, 0.0)


def point_kill(path: Path, n: int, folder: Path, tile: int, count: Path) -> dict[str, Any]:
    source = wide_source(*features(path, n))
    columns = Grid(n, tile).count
    began = time.perf_counter()
    proof = certify_gram(
        source,
        folder=folder,
        key=f"{n} {source.columns} {SEED}",
        scale_rows=False,
        tile=tile,
        passes=columns,
        stages=CountedStages(count),
    )
    bits = {k: getattr(proof, k) for k in ("sigma_min_lower", "ell", "logdet_lower", "shift")}
    return {
        "status": proof.status,
        "seconds": time.perf_counter() - began,
        "bits": {k: None if v is None else float(v).hex() for k, v in bits.items()},
        "columns": source.columns,
    }


def main(words: list[str]) -> None:
    """A point's result as JSON on standard output, as plain data without NaN or infinity."""
    kind, path, n, *more = words
    points = {
        "rates": point_rates,
        "gram": point_gram,
        "triangular": point_triangular,
        "separation": point_separation,
        "numpy": point_numpy,
    }
    if kind == "kill":
        folder, tile, count = more
        result = point_kill(Path(path), int(n), Path(folder), int(tile), Path(count))
    else:
        result = points[kind](Path(path), int(n))
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
