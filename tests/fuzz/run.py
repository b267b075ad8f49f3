"""The long run of `make fuzz`: so many calls, in processes whose crash costs one case.

A case is named by (module, name, seed): `run.py --case ops:sgd:17` runs it again.
"""

import argparse
import collections
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODULES = (
    "fuzz.ops",
    "fuzz.exact",
    "fuzz.last_layer",
    "fuzz.models",
    "fuzz.altered",
    "fuzz.minima",
    "fuzz.files",
)
BLOCK = 5_000  # cases that one child runs
HANG = 10  # seconds of the processor for one case
WAIT = 300  # seconds in all for one case: a lock takes no processor time
SHOWN = 20  # failures that are kept in full


def schedule(modules: list[str]) -> list[tuple[str, str, float]]:
    """(module, case, weight) of every case."""
    return [
        (module, name, weight)
        for module in modules
        for name, (_, weight) in importlib.import_module(module).CASES.items()
    ]


def child(modules: list[str], first: int, count: int, hang: float, state: Path) -> None:
    """Run cases first .. first + count; `state` holds the one that runs, then the counts."""
    import torch

    from fuzz.harness import CALLS

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = schedule(modules)
    failures: list[dict[str, Any]] = []
    for kind in (signal.SIGALRM, signal.SIGPROF):  # a hang ends the process, C++ or not
        signal.signal(kind, signal.SIG_DFL)
    with open(state.with_suffix(".now"), "w") as now:
        for seed in range(first, first + count):
            module, name, _ = random.Random(f"case {seed}").choices(
                cases, [weight for *_, weight in cases]
            )[0]
            now.seek(0)
            now.write(json.dumps([module, name, seed, sum(CALLS.values())]).ljust(120))
            now.flush()
            signal.setitimer(signal.ITIMER_PROF, hang)
            signal.alarm(WAIT)
            try:
                importlib.import_module(module).CASES[name][0](random.Random(seed))
            except Exception:
                failures.append({"case": [module, name, seed], "why": traceback.format_exc()})
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    state.write_text(json.dumps({"calls": CALLS, "failures": failures}))


class Total:
    """What all children found."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.failures: list[dict[str, Any]] = []
        self.crashes: list[dict[str, Any]] = []

    def add(self, process: subprocess.Popen[str], state: Path) -> int | None:
        """Take in a child that ended; the seed to go on from where it crashed."""
        output = process.communicate()[0]
        if process.returncode == 0 and state.exists():
            found = json.loads(state.read_text())
            self.calls.update(found["calls"])
            self.failures += found["failures"]
            return None
        now = state.with_suffix(".now")
        text = now.read_text().strip() if now.exists() else ""
        if not text:
            raise SystemExit(f"a child did not start:\n{output}")
        module, name, seed, calls = json.loads(text)
        code = process.returncode
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        why = "hang" if code in (-signal.SIGALRM, -signal.SIGPROF) else why
        self.calls["(in a child that crashed)"] += calls
        self.crashes.append({"case": [module, name, seed], "why": f"{why}\n{output[-2000:]}"})
        return seed + 1


def run(calls: int, jobs: int, modules: list[str], first: int, block: int, hang: float) -> Total:
    """Start children until `calls` calls have been made."""
    total, running, begun = Total(), {}, time.monotonic()
    todo: list[tuple[int, int]] = []  # (seed, count) that a crash left over
    with tempfile.TemporaryDirectory() as folder:
        shown, known = begun, 0
        while sum(total.calls.values()) < calls or running:
            while len(running) < jobs and sum(total.calls.values()) < calls:
                seed, count = todo.pop() if todo else (first, block)
                first = max(first, seed + count)
                state = Path(folder) / f"{seed}.json"
                command = [sys.executable, __file__, "--child", str(seed), str(count), str(hang)]
                process = subprocess.Popen(
                    [*command, str(state), "--modules", *modules],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
                running[process] = state, seed + count
            time.sleep(0.02)
            for process in [p for p in running if p.poll() is not None]:
                state, end = running.pop(process)
                after = total.add(process, state)
                for one in (total.crashes + total.failures)[known:]:
                    print(f"found {':'.join(map(str, one['case']))}: {one['why']}", flush=True)
                known = len(total.crashes + total.failures)
                if after is not None and after < end:
                    todo.append((after, end - after))
                if time.monotonic() - shown > 30:
                    shown = time.monotonic()
                    print(f"{sum(total.calls.values()):,} calls, {shown - begun:.0f} s, "
                          f"{len(total.failures)} failures, {len(total.crashes)} crashes",
                          flush=True)  # fmt: skip
    return total


def report(total: Total, seconds: float) -> None:
    """Counts by function, every crash and failure with what runs it again, the total."""
    for name, count in sorted(total.calls.items(), key=lambda item: -item[1]):
        print(f"{name:<32} {count:>10,}")
    for kind, found in (("crash", total.crashes), ("failure", total.failures)):
        for one in found[:SHOWN]:
            print(f"{kind}: --case {':'.join(map(str, one['case']))}\n{one['why']}")
    calls = sum(total.calls.values())
    print(
        f"{calls:,} calls in {seconds:.0f} s ({calls / seconds:.0f} a second): "
        f"{len(total.crashes)} crashes, {len(total.failures)} failures"
    )


def main() -> int:
    """The command line; 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--modules", nargs="+", default=list(MODULES), help="with CASES")
    parser.add_argument("--block", type=int, default=BLOCK, help="cases that one child runs")
    parser.add_argument("--hang", type=float, default=HANG, help="seconds of the processor")
    parser.add_argument("--case", help="module:name:seed to run again, here")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    if args.child:
        first, count, hang, state = args.child
        child(args.modules, int(first), int(count), float(hang), Path(state))
        return 0
    if args.case:
        module, name, seed = args.case.split(":")
        importlib.import_module(module).CASES[name][0](random.Random(int(seed)))
        return 0
    begun = time.monotonic()
    total = run(args.calls, args.jobs, args.modules, args.seed, args.block, args.hang)
    report(total, time.monotonic() - begun)
    return 1 if total.crashes or total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
