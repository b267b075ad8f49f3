"""An epoch of the second phase in two processes of one thread against one process of two threads.

The paper's setting: 4,096 samples, 66,001 features, 10 classes, batches of 64, float32, momentum
and weight decay. Each process is a child of this one and runs an epoch when it is told to, as the
Trainer does: two processes take up their columns, share the logits of every step, and put the last
layer together again.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from torch import nn

import twophase_ext as tp
from twophase_ext.model.losses import CROSS_ENTROPY
from twophase_ext.model.network import Network
from twophase_ext.training.data.samples import Samples
from twophase_ext.training.distributed.ranks import joined
from twophase_ext.training.steps.last_layer import LastLayerStep
from twophase_ext.training.steps.sharded import OwnShard, ShardedStep, cached

SIZE, SMALL = (4096, 66_001), (130, 65)
RULE = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-5}  # the features are large
BATCH, CLASSES = 64, 10


def epochs(n: int, m: int) -> None:
    """In a child: an epoch for every line of standard input, answered by the mean loss."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1:
        store = dist.FileStore(os.environ["STORE"], size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    ranks = joined()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, m), tp.nn.Softplus(), nn.Linear(m, CLASSES))
    x, y, order = torch.randn(n, 16), torch.randint(CLASSES, (n,)), torch.randperm(n)
    samples = Samples.of((x, y), name="train", device=x.device, dtype=x.dtype)
    network = Network(model, x[:2])
    samples.prepare(CROSS_ENTROPY, CLASSES)
    features = cached(samples, network, "hidden", None, None, ranks)
    layer = network.last.module
    optimizer = tp.optim.SGD(layer.parameters(), **RULE)
    bounds = [*range(0, n, BATCH), n]

    def epoch() -> list[float]:
        if ranks.size == 1:
            return LastLayerStep(layer, CROSS_ENTROPY, optimizer).run(features, order, bounds)
        with OwnShard(layer, optimizer, ranks):
            return ShardedStep(layer, CROSS_ENTROPY, optimizer).run(features, order, bounds)

    print("ready", flush=True)
    for _ in sys.stdin:
        print(sum(epoch()) / (len(bounds) - 1), flush=True)


def processes(stack: ExitStack, count: int, threads: int, n: int, m: int) -> Callable[[], float]:
    """A call that runs an epoch in `count` children of `threads` threads; rank 0's mean loss."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    children = []
    for rank in range(count):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "STORE": f"{folder}/store",
        }
        child = subprocess.Popen(
            [sys.executable, __file__, str(n), str(m)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        stack.enter_context(child)  # closes its standard input, which ends it
        children.append(child)

    def answers() -> list[str]:
        return [child.stdout.readline() for child in children if child.stdout is not None]

    assert all(answer == "ready\n" for answer in answers())

    def epoch() -> float:
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        return float(answers()[0])

    return epoch


@pytest.fixture(scope="module")
def calls(request) -> Iterator[dict[str, Callable[[], float]]]:
    n, m = SMALL if request.config.getoption("benchmark_disable") else SIZE
    with ExitStack() as stack:
        yield {
            "2 processes, 1 thread each": processes(stack, 2, 1, n, m),
            "1 process, 2 threads": processes(stack, 1, 2, n, m),
        }


@pytest.mark.parametrize("which", ["2 processes, 1 thread each", "1 process, 2 threads"])
def test_epoch(calls, which, row, interleaved, small):
    first, second = (call() for call in calls.values())
    assert first == pytest.approx(second, rel=1e-4)
    role = "ours" if which.startswith("2") else "baseline"
    row("last-layer epoch 4096x66001->10, processes", role, which)
    others = [call for name, call in calls.items() if name != which]
    interleaved(calls[which], others, rounds=1 if small else 11, warmup_rounds=1)


if __name__ == "__main__":
    epochs(int(sys.argv[1]), int(sys.argv[2]))
