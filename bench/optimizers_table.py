"""Every optimizer of the packages below under the Trainer, beside a plain loop; outside CI.

    python bench/optimizers_table.py install FOLDER          the packages, without what they need
    python bench/optimizers_table.py run FOLDER OUT.json     [--only PACKAGE]: an hour for all
    python bench/optimizers_table.py table OUT.json docs/optimizers.md

Each optimizer runs in a process of its own, with a limit of time: a two-phase run, the first phase
against a plain loop, a branch against the run of its own, two kills and resumptions against the
uninterrupted run. All compare bits.
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import types
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from optimizer_judge import CHECKS, factory_of, judge

# package -> (the module with its optimizers, what that imports besides)
PACKAGES: dict[str, tuple[str, list[str]]] = {
    "torch": ("torch.optim", []),
    "pytorch_optimizer==4.1.0": ("pytorch_optimizer", []),
    "torch_optimizer==0.3.0": ("torch_optimizer", ["pytorch-ranger==0.1.1"]),
    "timm==1.0.31": ("timm.optim", []),
    "heavyball==3.2.1": ("heavyball", []),
    "schedulefree==1.4.1": ("schedulefree", []),
    "prodigyopt==1.1.2": ("prodigyopt", []),
    "prodigy-plus-schedule-free==2.0.1": ("prodigyplus", []),
    "dadaptation==3.2": ("dadaptation", []),
    "lion-pytorch==0.2.5": ("lion_pytorch", []),
    "muon-optimizer==0.1.0": ("muon", []),
    "adam-atan2-pytorch==0.4.1": ("adam_atan2_pytorch", []),
    "torchao==0.18.0": ("torchao.optim", []),
    "transformers==5.24.0": (
        "transformers.optimization",
        [
            "regex",
            "huggingface-hub",
            "safetensors",
            "tokenizers",
            "pyyaml",
            "requests",
            "tqdm",
            "filelock",
            "packaging",
            "httpx2",
            "httpcore2",
            "truststore",
        ],
    ),
    "galore-torch==1.0": ("galore_torch", []),
    "apollo-torch==1.0.3": ("apollo_torch", []),
    "came-pytorch==0.1.3": ("came_pytorch", []),
    "adabelief-pytorch==0.2.1": ("adabelief_pytorch", ["colorama", "tabulate"]),
    "ranger-adabelief==0.1.0": ("ranger_adabelief", []),
    "adamp==0.3.0": ("adamp", []),
    "ranger21==0.1.0": ("ranger21", []),
    "madgrad==1.3": ("madgrad", []),
    "adan-pytorch==0.1.0": ("adan_pytorch", []),
    "Sophia-Optimizer==0.2.5": ("sophia.sophia", []),
    "lomo-optim==0.1.1": ("lomo_optim", []),
    "bitsandbytes==0.50.2": ("bitsandbytes.optim", []),
    "grokfast-pytorch==0.0.11": ("grokfast_pytorch", []),
}
LIMIT = 180  # seconds for one optimizer
BEGIN, END = "<!-- optimizers: begin -->", "<!-- optimizers: end -->"


def install(folder: Path) -> None:
    """What PACKAGES names, by pip."""
    wanted = [p for p in PACKAGES if "==" in p]
    for needed in [*wanted, *(n for _, more in PACKAGES.values() for n in more)]:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, needed], check=False)


# --- a package -------------------------------------------------------------------------------


def load(module: str) -> types.ModuleType:
    """Import it; a package whose own __init__ needs more than is there is stepped over."""
    try:
        return importlib.import_module(module)  # noqa: TID251  of its own list
    except Exception:
        name, _, rest = module.partition(".")
        spec = importlib.util.find_spec(name)
        if not rest or spec is None or spec.submodule_search_locations is None:
            raise
        for known in [m for m in sys.modules if m.split(".")[0] == name]:
            del sys.modules[known]
        bare = sys.modules[name] = types.ModuleType(name)
        bare.__path__ = list(spec.submodule_search_locations)
        models = sys.modules[f"{name}.models"] = types.ModuleType(f"{name}.models")
        models.group_parameters = None  # type: ignore[attr-defined]  # timm's, for its schedules
        return importlib.import_module(module)  # noqa: TID251  of its own list


def optimizers(module: types.ModuleType) -> dict[str, type]:
    """Its optimizer classes by name."""
    root = module.__name__.split(".")[0]
    found: dict[str, type] = {}
    for name in sorted(vars(module)):
        kind = getattr(module, name)
        if not inspect.isclass(kind) or not issubclass(kind, torch.optim.Optimizer):
            continue
        own = kind.__module__.split(".")[0] == root
        if own and not inspect.isabstract(kind) and not name.startswith("_"):
            found.setdefault(kind.__name__, kind)
    found.pop("Optimizer", None)
    found.pop("BaseOptimizer", None)
    return found


def _child(kind: type, path: str) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")
    try:
        found = judge(factory_of(kind))
    except BaseException as error:
        found = {"made": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    Path(path).write_text(json.dumps(found))


def judge_apart(kind: type) -> dict[str, Any]:
    """`judge` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "found.json")
        child = multiprocessing.get_context("fork").Process(target=_child, args=(kind, path))
        child.start()
        child.join(LIMIT)
        if child.is_alive():
            child.kill()
            child.join()
            return {"made": f"not done in {LIMIT} s"}
        if not Path(path).exists():
            return {"made": f"the process ended with {child.exitcode}"}
        return json.loads(Path(path).read_text())


def run(folder: Path, out: Path, only: str | None) -> None:
    """Judge all, package by package, and write what was found as it comes."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiled steps have other bits, and take minutes
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = json.loads(out.read_text()) if out.exists() else {"packages": {}}
    results["torch"] = torch.__version__
    for package, (module, _) in PACKAGES.items():
        name = package.split("==")[0]
        if only is not None and name != only:
            continue
        if only is None and name in results["packages"]:
            continue  # go on where an earlier call ended
        version = torch.__version__ if name == "torch" else metadata.version(name)
        entry: dict[str, Any] = {"version": version.split("+")[0], "optimizers": {}}
        results["packages"][name] = entry
        try:
            kinds = optimizers(load(module))
        except Exception as error:  # of any package
            entry["import"] = f"{type(error).__name__}: {error}".splitlines()[0]
            kinds = {}
        for kind in kinds:
            entry["optimizers"][kind] = judge_apart(kinds[kind])
            print(name, kind, entry["optimizers"][kind], flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


# --- the table -------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Markdown: a line a package, then every optimizer that misses a check, with the reason."""
    lines = ["| package | version | optimizers | run | first phase | branch | resumed |"]
    lines.append("|---|---|---|---|---|---|---|")
    sums, exceptions = [0] * 5, []
    for name, entry in results["packages"].items():
        found = entry["optimizers"]
        counts = [len(found), *(sum(f.get(c) is True for f in found.values()) for c in CHECKS)]
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        cells = counts[:2] + [f"{c} of {counts[1]}" for c in counts[2:]]
        lines.append(f"| {name} | {entry['version']} | {' | '.join(map(str, cells))} |")
        if "import" in entry:
            exceptions.append(f"| {name} | import | {_cell(entry['import'])} |")
        for kind, checks in found.items():
            for check, value in checks.items():
                if value is not True:
                    why = "other bits" if value is False else _cell(str(value))
                    exceptions.append(f"| {name}.{kind} | {check} | {why} |")
    cells = sums[:2] + [f"{c} of {sums[1]}" for c in sums[2:]]
    lines.append(f"| all | torch {results['torch']} | {' | '.join(map(str, cells))} |")
    lines += ["", "| optimizer | check | why not |", "|---|---|---|", *exceptions]
    return "\n".join(lines)


def _cell(text: str) -> str:
    text = re.sub(r"^ValueError: optimizer: (\w+ failed in the first step: )?", "", text)
    text = re.sub(r"\.? For every mini-batch .*|: torch\.load\(.*", "", text)
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")[:200]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install").add_argument("folder", type=Path)
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("out", type=Path)
    running.add_argument("--only")
    showing = commands.add_parser("table")
    showing.add_argument("results", type=Path)
    showing.add_argument("page", type=Path)
    given = parser.parse_args()
    if given.command == "install":
        install(given.folder)
    elif given.command == "run":
        run(given.folder, given.out, given.only)
    else:
        text = given.page.read_text()
        begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        shown = table(json.loads(given.results.read_text()))
        given.page.write_text(f"{text[:begin]}\n{shown}\n{text[end:]}")


if __name__ == "__main__":
    main()
