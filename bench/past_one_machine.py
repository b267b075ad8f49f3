"""Past one machine: the certificate over MPI ranks, and separation from a file, measured; a plan.

    python bench/past_one_machine.py gram            4 ranks against one process, n = 4,000
    python bench/past_one_machine.py separation      n = 1,000,000, d = 512, from a mapped file
    python bench/past_one_machine.py plan            n = 1,280,000 on a cluster, computed

`gram` needs mpirun and ScaLAPACK. Results go to bench/results/past-one-machine-<machine>.json, the
tables to standard output; docs/past-one-machine.md quotes them.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from certificate_points import ERROR, SEED, SOFTPLUS, status, wide_source
from certificate_scale import default_results, machine

from twophase_ext.expressivity.certify import WideSource, certify_matrix
from twophase_ext.expressivity.separation import separate, working_bytes
from twophase_ext.expressivity.triangular import preactivation_error
from twophase_ext.linalg.bounds import gamma
from twophase_ext.linalg.certificate import certify_gram
from twophase_ext.linalg.distributed import BLOCK, PANEL, certify_distributed, rank_bytes
from twophase_ext.linalg.progress import Stages
from twophase_ext.linalg.scalapack import Scalapack, squarest

ROWS = 1 << 14  # of the synthetic file, at a time
CLASSES, SPREAD = 1000, 0.3  # samples lie around so many centres


def synthetic(path: Path, n: int, d: int) -> None:
    """Write float64 [n, d], in blocks: clusters, as backbone features of classes are."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(n, d))
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((CLASSES, d))
    for start in range(0, n, ROWS):
        rows = out[start : start + ROWS]
        rng.standard_normal(out=rows)
        rows *= SPREAD
        rows += centres[rng.integers(CLASSES, size=len(rows))]
    out.flush()


class Peak(threading.Thread):
    """The largest anonymous memory of this process: pages of a mapped file do not count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = status("RssAnon")
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(2e-3):
            self.peak = max(self.peak, status("RssAnon"))

    def stop(self) -> int:
        """Bytes beyond those at the beginning."""
        self.ended.set()
        self.join()
        return self.peak - self.before


def measure_separation(arguments: argparse.Namespace) -> dict[str, Any]:
    n, d = arguments.n or 1_000_000, arguments.d
    with tempfile.TemporaryDirectory(prefix="separation-") as folder:
        path = Path(folder) / "features.npy"
        synthetic(path, n, d)
        print(f"{time.strftime('%H:%M:%S')} written", file=sys.stderr, flush=True)
        z = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        error = ERROR * torch.linalg.vector_norm(z, dim=1)
        separate(z[:64], error[:64])
        watch = Peak()
        watch.start()
        found = separate(z, error)
        return {
            "n": n,
            "d": d,
            "relative_error": ERROR,
            "file_bytes": path.stat().st_size,
            "peak_bytes": watch.stop(),
            "formula_bytes": working_bytes(n, d),
            "load": os.getloadavg()[1],
            **asdict(found),
        }


def layer(path: Path) -> tuple[WideSource, torch.Tensor]:
    """(M, bounds of the errors of its backbone features) from a file, the features mapped."""
    z = torch.from_numpy(np.load(path / "z.npy", mmap_mode="c", allow_pickle=False))
    weight, bias = (
        torch.from_numpy(np.load(path / f"{name}.npy", allow_pickle=False))
        for name in ("weight", "bias")
    )
    return WideSource(z, weight, bias, SOFTPLUS, True), ERROR * z.norm(dim=1)


def run_point(kind: str, path: Path) -> None:
    """One process: alone, or a rank of an mpirun; the first writes what was proved."""
    source, error = layer(path)
    m = len(source.weight)
    source.block(0, 9, 0, 9) @ source.block(0, 9, 0, 9).T
    ranks = Scalapack() if kind == "rank" else None
    before = status("VmRSS")
    began = time.perf_counter()
    if ranks is None:
        proof, count = certify_gram(source, scale_rows=False), 1
    else:
        proof = certify_distributed(source.block, source.n, m, ranks, scale_rows=False)
        count = ranks.count
    seconds, taken = time.perf_counter() - began, status("VmHWM") - before
    if ranks is not None:
        ranks.close()
        if ranks.rank:
            return
    found = certify_matrix(
        source,
        preactivation_error(source.z, error, source.weight, source.bias),
        factorization="gram",
        folder=None,
        stages=Stages(False, None),
        constants={},
        assumptions=[],
        gram=proof,
    )
    names = ("status", "sigma_min_lower", "logabsdet_lower", "margin")
    exact = {name: getattr(found, name) for name in names}
    memory = {"peak_bytes": proof.peak_bytes, "taken_bytes": taken}
    result = {"ranks": count, "seconds": seconds, "exact": exact} | memory
    stages = [{k: s[k] for k in ("name", "seconds")} for s in proof.stages]
    text = json.dumps(result | proof.constants() | {"stages": stages})
    (path / f"{kind}.json").write_text(text, encoding="utf-8")


def measure_gram(arguments: argparse.Namespace) -> dict[str, Any]:
    n, ranks = arguments.n or 4_000, str(arguments.ranks)
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise RuntimeError("mpirun: expected it on the PATH, found none")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    launch = {"single": [], "rank": [mpirun, *root, "--oversubscribe", "-n", ranks]}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        path = Path(folder)
        generator = torch.Generator().manual_seed(SEED)
        z = torch.randn(n, arguments.d, generator=generator, dtype=torch.float64)
        source = wide_source(z, ERROR * z.norm(dim=1))
        for name in ("z", "weight", "bias"):
            np.save(path / f"{name}.npy", getattr(source, name).numpy())
        points = {}
        for kind, start in launch.items():
            command = [*start, sys.executable, __file__, kind, "--folder", folder]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=environment, check=True)
            points[kind] = json.loads((path / f"{kind}.json").read_text(encoding="utf-8"))
    bytes_ = rank_bytes(n, source.columns, squarest(arguments.ranks))
    load = os.getloadavg()[1]
    return {"n": n, "columns": source.columns, "formula_bytes": bytes_, "load": load, **points}


def show_gram(found: dict[str, Any]) -> None:
    single, many = found["single"], found["rank"]
    print(f"| n = {found['n']:,}, p = {found['columns']:,} | one process | {many['ranks']} ranks |")
    print("|---|---|---|")
    for name in ("sigma_min_lower", "logdet_lower", "shift", "e_G", "e_C"):
        print(f"| {name} | {single[name]!r} | {many[name]!r} |")
    for name in ("status", "sigma_min_lower", "logabsdet_lower"):
        print(f"| exact function: {name} | {single['exact'][name]!r} | {many['exact'][name]!r} |")
    for stage in ("Gram", "Cholesky", "residual"):
        times = [
            sum(s["seconds"] for s in point["stages"] if s["name"].startswith(stage))
            for point in (single, many)
        ]
        print(f"| {stage}, s | " + " | ".join(f"{t:.1f}" if t else "-" for t in times) + " |")
    print(f"| in all, s | {single['seconds']:.1f} | {many['seconds']:.1f} |")
    taken, formula = many["taken_bytes"] / 2**20, found["formula_bytes"] / 2**20
    print(f"a rank took {taken:.0f} MiB, {formula:.0f} MiB by its formula")
    print(f"load of the machine: {found['load']:.0f}")


def show_separation(found: dict[str, Any]) -> None:
    print(f"separation, n = {found['n']:,}, d = {found['d']}: proved {found['proved']}")
    print(f"margin {found['margin']:.3g}; pairs that no line separates: {found['overlapping']}")
    print(f"{found['seconds']:.1f} s at a load of {found['load']:.0f}")
    print(f"a file of {found['file_bytes'] / 2**30:.2f} GiB; beside it", end=" ")
    peak, formula = found["peak_bytes"] / 2**20, found["formula_bytes"] / 2**20
    print(f"{peak:.0f} MiB, {formula:.0f} MiB by the formula")


def show_plan(arguments: argparse.Namespace) -> None:
    """Memory and time of the Gram route, from the formulas of distributed.py."""
    n, d, rate, link = arguments.n or 1_280_000, arguments.d, arguments.rate, arguments.link
    m = math.ceil(1.1 * n)
    P, Q = squarest(arguments.nodes * arguments.per_node)
    blocks = -(-n // BLOCK)
    rows, columns = BLOCK * math.ceil(blocks / P), BLOCK * math.ceil(blocks / Q)
    whole = rate * arguments.nodes
    work = {
        "features, 2 n m d": 2.0 * n * m * d,
        "Gram, n^2 (m + 1)": float(n) ** 2 * (m + 1),
        "Cholesky, n^3 / 3": n**3 / 3,
        "residual, n^3 / 3": n**3 / 3,
    }
    print(f"n = {n:,}, m = {m:,}, d = {d}; {arguments.nodes} nodes, {P} x {Q} ranks")
    print(f"G in full {8 * n * n / 1e12:.2f} TB, its lower half packed {4 * n * n / 1e12:.2f} TB")
    print(f"h {8 * n * m / 1e12:.2f} TB (never stored), z {8 * n * d / 1e9:.2f} GB")
    rank = rank_bytes(n, m + 1, (P, Q))
    print(f"a rank {rank / 1e9:.1f} GB, a node {rank * arguments.per_node / 1e9:.0f} GB")
    print(f"entries of G a rank {rows * columns:,} of {2**31 - 1:,}")
    for name, operations in work.items():
        seconds = operations / whole
        print(f"| {name} | {operations:.2e} | {seconds:,.0f} s | {seconds / 3600:.2f} h |")
    total = sum(work.values()) / whole
    print(f"| in all | {sum(work.values()):.2e} | {total:,.0f} s | {total / 3600:.2f} h |")
    sent = {"Gram": 8.0 * (m + 1) * (rows + columns), "residual": 4.0 * n * (rows + columns)}
    for name, size in sent.items():
        seconds = size * arguments.per_node / link
        print(f"received by a rank, {name}: {size / 1e9:,.0f} GB, {seconds:,.0f} s a node's link")
    own, any_order = PANEL + math.ceil((m + 1) / PANEL), m + 1
    for name, k in (("panels of our own", own), ("any order", any_order)):
        print(f"e_G / trace, {name}: K = {k:,}, {gamma(k):.2e}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("gram", "separation", "plan", "single", "rank"))
    parser.add_argument("--n", type=int, help="samples")
    parser.add_argument("--d", type=int, default=512, help="backbone features")
    parser.add_argument("--ranks", type=int, default=4, help="of gram")
    parser.add_argument("--nodes", type=int, default=128, help="of plan")
    parser.add_argument("--per_node", type=int, default=8, help="ranks of a node")
    parser.add_argument("--rate", type=float, default=2e12, help="float64 operations/s of a node")
    parser.add_argument("--link", type=float, default=12.5e9, help="bytes/s of a node's network")
    parser.add_argument("--folder", type=Path, help="of single and rank, which gram starts")
    name = re.sub("^certificate", "past-one-machine", default_results().name)
    parser.add_argument("--out", type=Path, default=default_results().with_name(name))
    arguments = parser.parse_args()
    if arguments.part in ("single", "rank"):
        run_point(arguments.part, arguments.folder)
        return
    if arguments.part == "plan":
        show_plan(arguments)
        return
    measure = {"gram": measure_gram, "separation": measure_separation}[arguments.part]
    found = measure(arguments)
    results = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    results[arguments.part] = {"machine": machine(), "result": found}
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    {"gram": show_gram, "separation": show_separation}[arguments.part](found)


if __name__ == "__main__":
    main()
