"""The threaded CPU code under ThreadSanitizer, in a program of its own (tests/shim/run_cpu.cpp):
inside Python the sanitizer would see torch's threads and not their locks."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc" / "cpu"
SOURCES = {name: (CPU / f"last_layer_{name}.cpp").read_text() for name in ("epoch", "gradient")}
BARRIERS = sum(source.count("team.barrier();") for source in SOURCES.values())
KERNELS = ("last_layer_loss", "last_layer_step", "sgd", "perturb")
CHECKS = {"last_layer_epoch": 14, "multi_tensor": 15}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """run_cpu, each barrier behind a question whether it is left out."""
    folder = tmp_path_factory.mktemp("threads")
    numbers = iter(range(BARRIERS))
    for name, source in SOURCES.items():
        asking = re.sub(
            r"team\.barrier\(\);",
            lambda _: f"if (!::skipped({next(numbers)})) team.barrier();",
            source,
        )
        (folder / f"{name}.cpp").write_text(asking)
    common = ["g++", "-std=c++20", "-g1", "-fsanitize=thread", "-fvisibility=hidden"]
    includes = [f"-isystem{path}" for path in include_paths()]
    target = re.search(r"TORCH_TARGET_HEX \"(\w+)\"", (ROOT / "CMakeLists.txt").read_text())
    jobs = {
        "run_cpu.o": [
            *("-O0", *includes, f"-I{CPU}", f"-DTORCH_TARGET_VERSION={target[1]}"),
            *(f'-D{name.upper()}="{folder / name}.cpp"' for name in SOURCES),
            ROOT / "tests" / "shim" / "run_cpu.cpp",
        ],
        "isa.o": ["-O1", CPU / "isa.cpp"],
    }
    for name in KERNELS:
        flags = ["-O1", "-fopenmp-simd", "-ffp-contract=off", "-DTP_ISA=baseline"]
        jobs[f"{name}.o"] = [*flags, CPU / "kernels" / f"{name}.cpp"]
    running = {
        name: subprocess.Popen(
            [*common, "-c", *map(str, flags), "-o", str(folder / name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, flags in jobs.items()
    }
    for name, process in running.items():
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, f"{name}: {output}"
    # Only the baseline kernels run; what of torch's library is declared is not called.
    link = ["-no-pie", "-pthread", "-Wl,--unresolved-symbols=ignore-all"]
    objects = [str(folder / name) for name in jobs]
    subprocess.run([*common, *objects, *link, "-o", str(folder / "run_cpu")], check=True)
    return folder / "run_cpu"


def run(program: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=1",
        "TWOPHASE_ISA": "baseline",
        **environment,
    }
    for prefix in ([], ["setarch", platform.machine(), "-R"]):
        done = subprocess.run(
            [*prefix, str(program)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        # older TSan under newer kernels' randomisation
        if "unexpected memory mapping" not in done.stdout:
            break
    return done


@pytest.mark.slow
def test_no_race_with_1_2_and_4_threads(program):
    done = run(program)
    assert done.returncode == 0, done.stdout
    counts = re.findall(r"^(\w+): (\d+) checks, 0 failed$", done.stdout, re.MULTILINE)
    assert {name: int(count) for name, count in counts} == CHECKS, done.stdout


@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_a_missing_barrier_is_reported(program, barrier):
    """The program can fail: without this barrier ThreadSanitizer sees a race."""
    done = run(program, TP_SKIP_BARRIER=str(barrier))
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stdout, done.stdout


def test_there_are_barriers():
    assert BARRIERS == 4  # two an epoch's step, two a block of the gradient
