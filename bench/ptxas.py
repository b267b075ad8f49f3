"""Registers, spills and shared memory of every CUDA kernel, from `nvcc -Xptxas -v`.

Needs nvcc and torch's headers, no GPU. `python bench/ptxas.py` rewrites the table in
docs/cuda-kernels.md.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cuda-kernels.md"
ARCHITECTURE = "90"
# What CMakeLists.txt gives nvcc.
FLAGS = ["-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr"]

SIGNATURE = r"'(?:void )?(?:twophase::)?(?:\(anonymous namespace\)::)?([^(]+)"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: sizes in bytes, registers per thread."""

    source: str
    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def parse(source: str, text: str) -> list[Kernel]:
    """The kernels in ptxas's demangled output, sorted by name.

    Raises RuntimeError where an entry function has no sizes.
    """
    kernels = []
    for part in text.split("Compiling entry function ")[1:]:
        signature = re.match(SIGNATURE, part)
        spills = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        registers = re.search(r"Used (\d+) registers", part)
        if not (signature and spills and registers):
            raise RuntimeError(f"{source}: ptxas said no sizes of a kernel: {part[:200]}")
        shared = re.search(r"(\d+) bytes smem", part)
        kernels.append(
            Kernel(
                source,
                signature[1].replace("twophase::", ""),
                int(registers[1]),
                *(int(count) for count in spills.groups()),
                int(shared[1]) if shared else 0,
            )
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def compile_kernels(source: Path) -> list[Kernel]:
    """Compile one .cu file for ARCHITECTURE and read its kernels.

    Raises RuntimeError where nvcc fails.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise RuntimeError("torch's headers were not found: install torch")
    include = Path(torch.origin).parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch=sm_{ARCHITECTURE}", "-Xptxas", "-v", "-cubin"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-I{ROOT / 'csrc'}"]
        for path in (include, include / "torch" / "csrc" / "api" / "include"):
            command += ["-isystem", str(path)]
        command += ["-o", f"{folder}/kernel.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name}: nvcc failed\n{done.stdout}{done.stderr}")
    demangled = subprocess.run(
        ["c++filt"], input=done.stdout + done.stderr, capture_output=True, text=True, check=True
    )
    return parse(source.name, demangled.stdout)


def all_kernels() -> list[Kernel]:
    """Every kernel of csrc/cuda/*.cu, compiled two files at a time."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        return [kernel for found in pool.map(compile_kernels, sources) for kernel in found]


def table(kernels: list[Kernel]) -> str:
    """The Markdown table of docs/cuda-kernels.md."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release [\d.]+, V([\d.]+)", version.stdout)
    lines = [
        f"nvcc {release[1] if release else 'unknown'}, sm_{ARCHITECTURE}, `{' '.join(FLAGS)}`",
        "",
        "| source | kernel | registers | stack | spill stores | spill loads | static shared |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {k.source} | `{k.name}` | {k.registers} | {k.stack} | {k.spill_stores} "
        f"| {k.spill_loads} | {k.shared} |"
        for k in kernels
    ]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the table between the page's two markers."""
    if shutil.which("nvcc") is None:
        sys.exit("nvcc was not found: put it on PATH")
    begin, end = "<!-- ptxas: begin -->", "<!-- ptxas: end -->"
    head, rest = PAGE.read_text(encoding="utf-8").split(begin)
    tail = rest.split(end)[1]
    text = table(all_kernels())
    PAGE.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
