"""Shared by the benchmarks, and the convention that bench/table.py reads.

Every benchmark is one row:
    benchmark.group = "<op> <size>"             rows of one group are compared with each other,
                                                for example "softplus forward float32 16M"
    benchmark.extra_info["role"]                "ours", "baseline" (any number of them; the fastest
                                                counts) or "limit" (what the hardware allows: a copy
                                                of the same bytes, a GEMM of the same size)
    benchmark.extra_info["name"]                what it is: "twophase_ext", "torch.nn.Softplus(100)"
    benchmark.extra_info["bytes"], ["flops"]    optional, of one call: GB/s and GFLOP/s in the JSON
Fixture `row` sets these in one call. Compared is the median.

Fixture `small`: true under --benchmark-disable, where each benchmark runs once for correctness; use
sizes that take milliseconds then.
Freed memory is kept by the process (fixture `kept_memory`), as jemalloc, tcmalloc and torch's own
allocator on CUDA keep it: otherwise glibc hands every tensor above 32 MB back to the system, and
page faults drown what is measured. Fixture `fresh_memory` turns that off, for a row that shows it.
Fixture `interleaved` times a row while the other rows of its group run untimed between its rounds,
so that all rows see the same caches, clock and neighbours.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's <malloc.h>
DEFAULT_ROUNDS = 5  # pytest-benchmark's own default of --benchmark-min-rounds


def pytest_configure(config: pytest.Config) -> None:
    # Medians of short runs on shared machines: more rounds and a warm-up, unless asked otherwise.
    if getattr(config.option, "benchmark_min_rounds", None) == DEFAULT_ROUNDS:
        config.option.benchmark_min_rounds = 11
    if getattr(config.option, "benchmark_warmup", None) == "auto":
        config.option.benchmark_warmup = True
        config.option.benchmark_warmup_iterations = 3


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    import twophase_ext

    build = twophase_ext.build_info()
    machine_info["torch"] = torch.__version__
    machine_info["isa"] = build["isa"]
    machine_info["compiler"] = build["compiler"]
    machine_info["cores"] = len(os.sched_getaffinity(0))
    machine_info["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["cuda"] = torch.version.cuda


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    for entry in output_json["benchmarks"]:
        info, median = entry["extra_info"], entry["stats"]["median"]
        for quantity, unit in (("bytes", "GB/s"), ("flops", "GFLOP/s")):
            if quantity in info and median > 0:
                info[unit] = round(info[quantity] / median / 1e9, 2)


def keep_freed_memory(keep: bool) -> None:
    """Whether freed blocks of any size stay with this process; nothing where libc is not glibc."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0 if keep else 65536)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 128 << 10)


@pytest.fixture(autouse=True)
def kept_memory() -> Iterator[None]:
    keep_freed_memory(True)
    yield
    keep_freed_memory(False)


@pytest.fixture
def fresh_memory(kept_memory) -> None:
    keep_freed_memory(False)


@pytest.fixture
def small(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("benchmark_disable"))


@pytest.fixture
def report_bytes() -> Callable[..., None]:
    """report_bytes(benchmark, bytes): what one call reads and writes at least."""

    def report(benchmark, count: int) -> None:
        benchmark.extra_info["bytes"] = int(count)

    return report


@pytest.fixture
def row(benchmark) -> Callable[..., None]:
    """row(group, role, name, bytes=None, flops=None): place this benchmark in the table."""

    def place(group: str, role: str, name: str, **counts: int) -> None:
        if role not in ("ours", "baseline", "limit"):
            raise ValueError(f"role: expected ours, baseline or limit, got {role}")
        if unknown := counts.keys() - {"bytes", "flops"}:
            raise TypeError(f"row: unknown arguments {sorted(unknown)}")
        benchmark.group = group
        benchmark.extra_info.update(role=role, name=name, threads=torch.get_num_threads(), **counts)

    return place


@pytest.fixture
def interleaved(benchmark) -> Callable[..., object]:
    """interleaved(target, others, rounds=15): time target(), each round after one of each other."""

    def run(
        target: Callable[[], object],
        others: Sequence[Callable],
        rounds: int = 15,
        warmup_rounds: int = 3,
    ) -> object:
        def neighbours() -> None:
            for other in others:
                other()

        return benchmark.pedantic(
            target, setup=neighbours, rounds=rounds, warmup_rounds=warmup_rounds
        )

    return run
