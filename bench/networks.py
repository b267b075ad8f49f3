"""Real networks, family by family: analytic after conversion, widened, proved, trained, seconds.

Outside CI, in an environment of its own (CPU):

    pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0 \\
        torch_geometric==2.8.1 vit-pytorch==1.26.14
    pip install --no-build-isolation .
    python bench/networks.py --out networks.json [family or family/name ...]
    python bench/networks.py --page networks.json   # the tables of docs/networks.md

Every network has random weights, small inputs and N samples with random labels. A row is what
`tp.nn.analytic`, `tp.nn.widen`, `tp.verify_expressivity(w="witness")` and `tp.Trainer` (six epochs,
two of them after tau) gave, each with its seconds of processor time; SECONDS for all of it.
"""

import argparse
import json
import logging
import math
import platform
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from network_list import CLASSES, FAMILIES, Made

import twophase_ext as tp

SECONDS = 480  # of processor time, for all of a network's row


class _TooLong(BaseException):
    """Not an Exception, which somebody on the way would keep."""


def _late(*_: Any) -> None:
    raise _TooLong


@torch.no_grad()
def labels(model: torch.nn.Module, x: Any) -> torch.Tensor:
    """Of every sample, or of every token or pixel where the model gives an output for each."""
    output = model(**x) if isinstance(x, dict) else model(x)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    last = logits.dim() < 4  # of images the channels come second
    shape = logits.shape[:-1] if last else (len(logits), *logits.shape[2:])
    return (torch.arange(math.prod(shape)) % CLASSES).view(shape)


def row(make: Callable[[], Made]) -> dict[str, Any]:
    """What became of one network."""
    found: dict[str, Any] = {"seconds": {}}
    step = "build"
    started = time.process_time()

    def done(name: str) -> None:
        nonlocal started
        found["seconds"][name] = round(time.process_time() - started, 2)
        started = time.process_time()

    signal.signal(signal.SIGPROF, _late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        torch.manual_seed(0)
        model, x = make()
        y = labels(model.eval(), x)
        found["parameters"] = sum(p.numel() for p in model.parameters())
        done("build")
        step = "analytic"
        report = tp.nn.analytic(model, example_input=x)
        left = [f for f in report.remaining]
        found["analytic"] = report.is_analytic
        found["kinks"] = sorted({f.kind for f in left if f.status == "not analytic"})
        found["unknown"] = sorted({f"{f.kind}: {f.reason}"[:90] for f in left})[:4]
        done(step)
        step = "widen"
        tp.nn.widen(model, x)
        done(step)
        step = "verify"
        verdict = tp.verify_expressivity(model, x, w="witness")
        found |= {"status": verdict.status, "method": verdict.method, "reason": verdict.reason}
        found["n"] = verdict.n
        found["backbone"] = verdict.constants.get("backbone")
        done(step)
        step = "train"
        trainer = tp.Trainer(
            model, epochs=6, tau=2 / 3, batch_size=8, run_dir=False, progress=False, verify=False
        )
        result = trainer.fit((x, y))
        found |= {"trained": result.status == "completed", "cache": str(result.feature_cache)}
        done(step)
    except _TooLong:
        found["failed"] = f"{step}: more than {SECONDS} s"
    except Exception as error:  # whatever a network raises is its row
        found["failed"] = f"{step}: {type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return found


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The tables of docs/networks.md."""
    lines = [
        "| family | networks | no kink left | proved of these | of all | trained | CPU s, median |",
        f"|{'---|' * 7}",
    ]
    total = [0] * 5

    def counts(found: list[dict[str, Any]]) -> list[int]:
        smooth = [r for r in found if r.get("analytic")]
        return [
            len(found),
            len(smooth),
            sum(r.get("status") == "proved" for r in smooth),
            sum(r.get("status") == "proved" for r in found),
            sum(bool(r.get("trained")) for r in found),
        ]

    for family in dict.fromkeys(name.split("/")[0] for name in rows):
        found = [r for name, r in rows.items() if name.split("/")[0] == family]
        own = counts(found)
        total = [a + b for a, b in zip(total, own, strict=True)]
        seconds = sorted(sum(r["seconds"].values()) for r in found)[len(found) // 2]
        lines.append(f"| {family} | {' | '.join(map(str, own))} | {seconds:.1f} |")
    lines.append(f"| **all** | {' | '.join(f'**{k}**' for k in total)} | |")
    lines += [
        "",
        "| network | analytic | proved | trained | what stands in the way |",
        "|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        why = r.get("failed") or (r.get("reason") if r.get("status") != "proved" else "")
        why = "; ".join(filter(None, [*r.get("kinks", []), *r.get("unknown", [])[:1], why]))
        if r.get("analytic") and r.get("status") == "proved" and r.get("trained"):
            continue
        cells = [r.get("analytic"), r.get("status") == "proved", r.get("trained")]
        marks = " | ".join("yes" if cell else "no" for cell in cells)
        lines.append(f"| {name} | {marks} | {why[:160].replace('|', '/')} |")
    return "\n".join(lines)


def main() -> None:
    """Run the families or networks named, all by default; or print the tables of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="family or family/name")
    parser.add_argument("--out", type=Path, help="JSON, written after every network; goes on there")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    if options.page:
        print(page(json.loads(options.page.read_text("utf-8"))["rows"]))
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: dict[str, dict[str, Any]] = {}
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text("utf-8"))["rows"]
    for family, networks in FAMILIES.items():
        wanted = [n for n in options.names if n.split("/")[0] == family]
        if options.names and not wanted:
            continue
        for name, make in networks():
            key = f"{family}/{name}"
            if key in rows or (wanted and family not in wanted and key not in wanted):
                continue
            rows[key] = row(make)
            r = rows[key]
            print(
                f"{key}: analytic {r.get('analytic')}, {r.get('status')}, trained "
                f"{r.get('trained')}, {sum(r['seconds'].values()):.1f} s {r.get('failed', '')}",
                flush=True,
            )
            if options.out:
                machine = {"processor": platform.processor(), "threads": torch.get_num_threads()}
                options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
