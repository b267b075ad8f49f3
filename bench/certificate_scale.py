"""The long measurements of the certificates: minutes to an hour, on a machine that is quiet.

    python bench/certificate_scale.py rates      Gram and Cholesky against a large DGEMM
    python bench/certificate_scale.py growth     time and memory over n, fitted exponents
    python bench/certificate_scale.py numpy      against numpy.linalg.matrix_rank
    python bench/certificate_scale.py kill       killed five times, resumed: same bits, no work lost
    python bench/certificate_scale.py all
    python bench/certificate_scale.py report     the tables once more, nothing is measured

Results go to bench/results/certificate-<processor>-<cores>-cores.json, one entry a part, and from
there as Markdown to docs/certificate-speed.md, between its markers.

Data: MNIST's training images whitened to 512 directions (Gaussian numbers where TWOPHASE_DATA names
no folder), softplus beta 100, m = 1.1 n. Every point is a process of its own, so that its peak
memory is its own; threads and buffers of the libraries are started before the clock is.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from certificate_points import SEED, read_count
from certificate_tables import render
from table import update

from twophase_ext.core.environment import environment_of_run, processor_name
from twophase_ext.expressivity.witness import whiten
from twophase_ext.linalg.tiles import Grid

ROOT = Path(__file__).resolve().parent.parent
POINTS = ROOT / "bench" / "certificate_points.py"
DIRECTIONS, KILLS = 512, 5
GRAM = (2_000, 4_000, 8_000, 16_000, 32_000)
QUICK = (*GRAM, 60_000)  # for triangular and separation
PARTS = ("rates", "growth", "numpy", "kill")


def make_features(path: Path, rows: int) -> str:
    """Write `rows` samples to the file; what they are."""
    if not os.environ.get("TWOPHASE_DATA"):
        generator = torch.Generator().manual_seed(SEED)
        np.save(path, torch.randn(rows, DIRECTIONS, generator=generator, dtype=torch.float64))
        return "Gaussian numbers"
    from twophase import data

    x = data.load("mnist", download=False)[0].flatten(1).double() / 255
    whitening = whiten(x, x.new_zeros(len(x)), torch.float64)
    np.save(path, whitening(x[:rows])[:, :DIRECTIONS].contiguous().numpy())
    return "MNIST pixels, whitened"


def command(path: Path, kind: str, n: int, *more: object) -> list[str]:
    return [sys.executable, str(POINTS), kind, str(path), str(n), *map(str, more)]


def point(path: Path, kind: str, n: int, *more: object) -> dict[str, Any]:
    """Run one point in a process of its own."""
    print(f"{time.strftime('%H:%M:%S')} {kind}, n = {n:,}", file=sys.stderr, flush=True)
    done = subprocess.run(command(path, kind, n, *more), stdout=subprocess.PIPE, check=True)
    return {"n": n, **json.loads(done.stdout)}


def exponent(points: list[dict[str, Any]]) -> float | None:
    """Of time over n, by least squares on logarithms; None for a single point."""
    if len(points) < 2:
        return None
    n, seconds = (np.log([p[k] for p in points]) for k in ("n", "seconds"))
    return float(np.polyfit(n, seconds, 1)[0])


def measure_growth(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    result = {}
    for kind, sizes in (("separation", QUICK), ("triangular", QUICK), ("gram", GRAM)):
        chosen = arguments.sizes or [n for n in sizes if n <= arguments.largest]
        points = [point(path, kind, n) for n in chosen]
        result[kind] = {"points": points, "exponent": exponent(points)}
    return result


def recorded(folder: Path) -> list[tuple[Any, ...]]:
    """(matrix, i, j) of every tile that the journal says was written."""
    lines = (folder / "tiles.journal").read_bytes().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last may be torn
    return [tuple(r[:3]) for r in records if re.fullmatch(r"G|L\d+", r[0])]


def measure_kill(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kills at random shares of the work of a whole run, anywhere within a product or a write.

    A process dies as soon as it has executed the share that lies between two of them: no earlier
    than it would with nothing lost, and before it can end.
    """
    n, tile, rng = arguments.n or 4_000, arguments.tile, random.Random(SEED)
    with tempfile.TemporaryDirectory(prefix="certificate-") as made:
        root = Path(made)
        folder, count, log = root / "killed", root / "count", root / "count.stages"
        (root / "whole").mkdir()
        folder.mkdir()
        whole = point(path, "kill", n, root / "whole", tile, count)
        work, spent, before, kills = read_count(count)[0], 0.0, 0.0, []
        log.unlink()
        for share in sorted(rng.uniform(0.02, 0.95) for _ in range(KILLS)):
            count.unlink(missing_ok=True)
            args = command(path, "kill", n, folder, tile, count)
            child = subprocess.Popen(args, stdout=subprocess.DEVNULL)
            while read_count(count)[0] < (share - before) * work and child.poll() is None:
                time.sleep(1e-3)
            time.sleep(rng.uniform(0, 0.02))
            child.kill()
            if child.wait() != -signal.SIGKILL:
                raise RuntimeError(f"kill at {share:.2f} of the work: the process ended before it")
            executed, lost = read_count(count)
            spent, before = spent + executed, share
            kills.append(
                {"at": share, "executed": executed, "lost": lost, "tiles": len(recorded(folder))}
            )
        count.unlink(missing_ok=True)
        last = point(path, "kill", n, folder, tile, count)
        spent += read_count(count)[0]
        tiles, written = len(recorded(root / "whole")), recorded(folder)
        stages = log.read_text(encoding="utf-8").splitlines()
    return {
        "n": n,
        "tile": tile,
        "tile_columns": Grid(n, tile).count,
        "whole": whole,
        "last": last,
        "same": last["bits"] == whole["bits"] and last["status"] == whole["status"],
        "tiles": tiles,
        "tiles_written": len(written),
        "written_twice": len(written) - len(set(written)),
        "work": work,
        "work_spent": spent,
        "column_work": 2.0 * tile * n * whole["columns"],  # G's first, longest tile column
        "estimates": sum(name.startswith("smallest eigenvalue") for name in stages),
        "kills": kills,
    }


def measure(part: str, path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    if part == "growth":
        return measure_growth(path, arguments)
    if part == "kill":
        return measure_kill(path, arguments)
    return point(path, part, arguments.n or {"rates": 16_000, "numpy": 4_000}[part])


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    found = environment_of_run(torch.device("cpu"), SEED)
    names = ("processor", "threads", "torch", "numpy", "python", "commit", "started")
    cores = len(os.sched_getaffinity(0))
    return {"cores": cores, "isa": found["twophase_ext"]["isa"]} | {k: found[k] for k in names}


def default_results() -> Path:
    processor = re.sub(r"[^a-z0-9]+", "-", processor_name().lower()).strip("-")
    cores = len(os.sched_getaffinity(0))
    return ROOT / "bench" / "results" / f"certificate-{processor}-{cores}-cores.json"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=(*PARTS, "all", "report"))
    parser.add_argument("--n", type=int, help="samples, for every part but growth")
    parser.add_argument("--largest", type=int, default=60_000, help="n of growth (Gram: 32,000)")
    parser.add_argument("--sizes", type=int, nargs="+", help="n of growth, instead of the usual")
    parser.add_argument("--tile", type=int, default=400, help="rows of a tile, for kill")
    parser.add_argument("--out", type=Path, default=default_results(), metavar="RESULTS.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "certificate-speed.md")
    arguments = parser.parse_args()
    parts = {"all": PARTS, "report": ()}.get(arguments.part, (arguments.part,))
    results = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="certificate-") as made:
        path = Path(made) / "features.npy"
        if parts:
            rows = max(arguments.sizes or [arguments.largest]) if "growth" in parts else 0
            if set(parts) != {"growth"}:
                rows = max(rows, arguments.n or 16_000)
            source = make_features(path, rows)
        for part in parts:
            found = measure(part, path, arguments)
            results[part] = {"machine": machine(), "data": source, "result": found}
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = render(results)
    update(arguments.docs, text)
    print(text, end="")


if __name__ == "__main__":
    main()
