"""From pixels to a verdict, and beside it what numerical libraries take to count a rank.

    python bench/from_pixels.py N WIDTH certificate|separation [--peers]

N of MNIST's training images (TWOPHASE_DATA names their folder), PreActResNet18 of WIDTH with 1.1 N
softplus units, random weights, w="witness". Ours: from pixels, features included. The peers are
given h of the witness, in float64, and prove nothing: numpy.linalg.matrix_rank(h), and product and
LAPACK's Cholesky factorization of h h^T. The certificate's sweep over all pairs stands beside
torch's float32 products of as many operations. One process each for figures of memory.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack

import twophase_ext as tp
from twophase.data import as_float, load
from twophase.models import PreActResNet18

PANEL = 1024  # rows of a product


def timed(what: str, run: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds), printed."""
    began = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {seconds:.2f} s (peak {peak:.2f} GiB)", flush=True)
    return found, seconds


@torch.no_grad()
def peers(model: torch.nn.Module, x: torch.Tensor, verdict: tp.Verdict, ours: float) -> None:
    """Times of what is run on h."""
    model.load_state_dict(verdict.witness or {}, strict=False)
    model.eval()
    caught: list[torch.Tensor] = []
    last = model.get_submodule(verdict.last_layer)
    last.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].double()))
    for part in x.split(250):
        model(part)
    h = torch.cat(caught).numpy()
    np.linalg.matrix_rank(h[:64])

    def cholesky() -> int:
        gram = h @ h.T
        return int(lapack.dpotrf(gram, lower=True, overwrite_a=True, clean=False)[1])

    for name, run in (
        ("LAPACK Cholesky of h h^T, its info", cholesky),
        ("numpy.linalg.matrix_rank(h)", lambda: int(np.linalg.matrix_rank(h))),
    ):
        answer, seconds = timed(name, run)
        print(f"  says {answer}; {seconds / ours:.1f} x our time")


def sweep_beside_product(verdict: tp.Verdict, n: int) -> None:
    """n^2 d operations each: the sweep's n / 2 neurons a sample, and n / 2 rows times n columns."""
    sweep = next(s for s in verdict.stages if s["name"] == "kinks at the samples")
    q = torch.randn(n, int(verdict.constants["directions"]))
    out, took = q.new_empty(PANEL, n), []
    for _ in range(3):
        began = time.perf_counter()
        for rows in q[: n // 2].split(PANEL):
            torch.mm(rows, q.T, out=out[: len(rows)])
        took.append(time.perf_counter() - began)
    ratio, product = sweep["seconds"] / sorted(took)[1], sorted(took)[1]
    print(f"  sweep {sweep['seconds']:.2f} s, float32 products {product:.2f} s: {ratio:.2f} times")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("method", choices=("certificate", "separation"))
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    x = as_float(load("mnist", "train", download=False)[0][: options.n])
    torch.manual_seed(0)
    model = PreActResNet18(1, 10, width=options.width, wide=tp.nn.wide_units(options.n))
    verdict, seconds = timed(
        f"{options.method}, n = {options.n:,}, width {options.width}",
        lambda: tp.verify_expressivity(
            model, x, w="witness", method=options.method, progress=False
        ),
    )
    print(f"  {verdict.status}, margin {verdict.margin}, sigma_min >= {verdict.sigma_min_lower}")
    if options.method == "certificate" and verdict.witness is not None:
        sweep_beside_product(verdict, options.n)
    if options.peers and verdict.witness is not None:
        peers(model, x, verdict, seconds)


if __name__ == "__main__":
    main()
