"""Rank n for many images, from pixels to a verdict, in a process that may be killed and goes on.

    python bench/million.py N FOLDER [WIDTH]

N distinct images of 28 x 28: MNIST's and Fashion-MNIST's own (TWOPHASE_DATA names their folder),
then seeded affine copies of them. The network is PreActResNet18 of WIDTH (32) with N softplus units
before its last layer, random weights. FOLDER keeps images, features and the sweep: the same command
goes on after Ctrl-C or SIGKILL. Prints stages, the verdict, seconds and peak memory; the verdict is
FOLDER/verdict.json.
"""

import math
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import twophase_ext as tp
from twophase.data import load
from twophase.models import PreActResNet18

BATCH = 10_000


def real() -> Tensor:
    """MNIST's and Fashion-MNIST's images, [140,000, 28, 28] float32 in [0, 1], distinct ones."""
    names = [(name, part) for name in ("mnist", "fashion-mnist") for part in ("train", "test")]
    images = torch.cat([load(*which, download=False)[0] for which in names]).flatten(1)
    distinct = np.sort(np.unique(images.numpy(), axis=0, return_index=True)[1])
    return images[distinct].view(-1, 28, 28) / 255


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each turned by up to 20 degrees, scaled by 0.85 to 1.15 and shifted by up to 3 pixels."""

    def drawn(low: float, high: float) -> Tensor:
        return torch.rand(len(images), generator=generator) * (high - low) + low

    angle, scale = drawn(-20, 20) * math.pi / 180, drawn(0.85, 1.15)
    across, down = drawn(-3, 3) / 14, drawn(-3, 3) / 14
    cos, sin = angle.cos() * scale, angle.sin() * scale
    maps = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = F.affine_grid(maps, [len(images), 1, 28, 28], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def images_in(path: Path, n: int) -> None:
    """Write float32 [n, 1, 28, 28]."""
    own = real()
    part = path.with_suffix(".part")
    out = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=(n, 1, 28, 28))
    first = min(n, len(own))
    out[:first, 0] = own[:first]
    generator = torch.Generator().manual_seed(0)
    for start in range(first, n, BATCH):
        chosen = own[torch.randint(len(own), (min(BATCH, n - start),), generator=generator)]
        out[start : start + len(chosen), 0] = moved(chosen, generator)
    out.flush()
    part.rename(path)


def main() -> None:
    """See the module."""
    n, folder = int(sys.argv[1]), Path(sys.argv[2])
    width = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"images-{n}.npy"
    began = time.perf_counter()
    if not path.exists():
        images_in(path, n)
        print(f"images: {time.perf_counter() - began:.0f} s", flush=True)
    x = torch.from_numpy(np.load(path, mmap_mode="c"))  # pages of the file
    torch.manual_seed(0)
    model = PreActResNet18(1, 10, width=width, wide=n)
    began = time.perf_counter()
    verdict = tp.verify_expressivity(
        model,
        x,
        w="witness",
        method="certificate",
        factorization="triangular",
        folder=folder,
        progress=True,
    )
    print(verdict)
    verdict.save(folder / "verdict.json")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"real {time.perf_counter() - began:.0f} s, peak {peak:.2f} GiB, images' file included")


if __name__ == "__main__":
    main()
