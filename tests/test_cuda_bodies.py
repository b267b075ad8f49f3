"""Every CUDA kernel body, run on the CPU by tests/shim, under sanitizers; no GPU, no torch."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "shim"
BODIES = ROOT / "csrc" / "cuda" / "bodies"
CHECKS = {
    "softplus": 192,
    "smooth_max_pool": 66,
    "perturb_": 20,
    "sgd_": 120,
    "last_layer_step_": 38,
    "last_layer_epoch_": 13,
    "gram_logdet": 105,
}
# A file whose barriers another operator's body calls too is shown by one of them.
SHOWN_BY = {"gram_logdet": "gram_logdet", "last_layer_step": "last_layer_step_"}
SHOWN_BY |= {"reduce": "last_layer_step_", "last_layer_epoch": "last_layer_epoch_"}
BARRIERS = [
    f"{body.name}:{number}"
    for body in sorted(BODIES.glob("*.h"))
    for number, line in enumerate(body.read_text().splitlines(), 1)
    if re.match(r"\s*ctx\.(grid_)?sync\(\);", line)
]
VARIANTS = {
    # TP_BREAK_SYNC does nothing until TP_SKIP_SYNC names a barrier.
    "thread": ["-fsanitize=thread", "-DTP_BREAK_SYNC"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def executables(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shim")
    common = ["g++", "-std=c++20", "-O0", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    running = {}
    for name, flags in VARIANTS.items():
        command = [*common, *flags, str(SHIM / "run_bodies.cpp"), "-o", str(folder / name)]
        running[name] = subprocess.Popen(
            [*command, "-pthread"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for name, process in running.items():
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, f"{name}: {output}"
    return {name: folder / name for name in VARIANTS}


def run(executable: Path, *ops: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Stops at the first report.
    environment = {
        **os.environ,
        "TSAN_OPTIONS": "halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **environment,
    }

    def once(*prefix: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, str(executable), *ops],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )

    done = once()
    if "unexpected memory mapping" in done.stdout:  # older TSan under newer kernels' randomisation
        done = once("setarch", platform.machine(), "-R")
    return done


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_bodies(variant, executables):
    done = run(executables[variant])
    assert done.returncode == 0, done.stdout
    counts = re.findall(r"^(\w+): (\d+) checks, 0 failed$", done.stdout, re.MULTILINE)
    assert {op: int(count) for op, count in counts} == CHECKS, done.stdout


def test_barriers_are_found():
    assert {name.split(".")[0] for name in BARRIERS} == SHOWN_BY.keys()


@pytest.mark.slow
@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_reported(barrier, executables):
    """The harness can fail: without this barrier ThreadSanitizer sees a race."""
    op = SHOWN_BY[barrier.split(".")[0]]
    done = run(executables["thread"], op, TP_SKIP_SYNC=barrier)
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stdout, done.stdout


@pytest.fixture
def ptxas(monkeypatch):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    sys.modules.pop("ptxas", None)
    import ptxas

    return ptxas


@pytest.mark.slow
def test_no_kernel_spills(ptxas):
    kernels = ptxas.all_kernels()
    sources = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert {kernel.source for kernel in kernels} == sources
    spilling = [k for k in kernels if k.spill_stores or k.spill_loads or k.stack]
    assert not spilling
    # The page lists the same kernels; registers may differ with the compiler's version.
    page = ptxas.PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \S+\.cu \| `(.+?)` \|", page, re.MULTILINE)) == {
        kernel.name for kernel in kernels
    }


def test_spills_are_read(ptxas):
    text = (
        "ptxas info : Compiling entry function 'void twophase::(anonymous namespace)::f<float>"
        "(float*)' for 'sm_90'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info : Used 40 registers, used 1 barriers, 16 bytes smem\n"
    )
    (kernel,) = ptxas.parse("f.cu", text)
    assert kernel == ptxas.Kernel("f.cu", "f<float>", 40, 8, 4, 12, 16)
