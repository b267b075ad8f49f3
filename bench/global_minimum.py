"""A global minimum by construction on MNIST, and what a pass of the model itself takes.

    python bench/global_minimum.py [N] [WIDTH]

N (60,000) of MNIST's training images (TWOPHASE_DATA names their folder), PreActResNet18 of WIDTH
(64) with 1.1 N softplus units, float32, cross-entropy. Prints the seconds of `tp.global_minimum`,
those of the proof in it, and those of one plain pass of the model over the images, which a loss "by
the model itself" needs whatever found the weights.
"""

import sys
import time

import torch
import torch.nn.functional as F

import twophase_ext as tp
from twophase.data import as_float, load
from twophase.models import PreActResNet18


@torch.no_grad()
def one_pass(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """(mean cross-entropy, accuracy) over all images, in batches of 256."""
    losses = right = 0.0
    for some, labels in zip(x.split(256), y.split(256), strict=True):
        outputs = model(some)
        losses += float(F.cross_entropy(outputs.double(), labels, reduction="sum"))
        right += float((outputs.argmax(1) == labels).sum())
    return losses / len(x), right / len(x)


def main() -> None:
    """See the module."""
    n, width = (*map(int, sys.argv[1:3]), *(60_000, 64)[len(sys.argv) - 1 :])
    images, labels = (part[:n] for part in load("mnist", "train", download=False))
    x, y = as_float(images), labels.long()
    torch.manual_seed(0)
    model = PreActResNet18(1, 10, width=width, wide=tp.nn.wide_units(n))
    began = time.perf_counter()
    found = tp.global_minimum(model, x, y)
    seconds = time.perf_counter() - began
    print(found)
    model.load_state_dict(found.state)
    model.eval()
    began = time.perf_counter()
    loss, accuracy = one_pass(model, x, y)
    alone = time.perf_counter() - began
    print(
        f"n = {n:,}, width {width}: {seconds:.1f} s, the proof {found.verdict.seconds:.1f} of them"
    )
    print(f"one pass of the model alone: {alone:.1f} s; loss {loss:.3g}, accuracy {accuracy:.4%}")


if __name__ == "__main__":
    main()
