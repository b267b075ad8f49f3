"""One of two processes of test_sharded.py: python -m sharded_cases STORE RANK."""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import twophase_ext as tp

STORE, RANK = sys.argv[1], int(sys.argv[2])
RULE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def whole(t):
    return t.full_tensor().detach() if isinstance(t, DTensor) else t.detach()


def trained(optimizer, mesh, batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), tp.nn.Softplus(), nn.Linear(16, 3))
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    own = optimizer(model.parameters(), **RULE)
    for x, y in batches:
        own.zero_grad()
        F.cross_entropy(model(x), y).backward()
        own.step()
    buffers = [own.state[p]["momentum_buffer"] for p in model.parameters()]
    assert all(isinstance(b, DTensor) == (mesh is not None) for b in buffers)
    return [whole(t) for t in (*model.parameters(), *buffers)]


def main():
    dist.init_process_group("gloo", store=dist.FileStore(STORE, 2), rank=RANK, world_size=2)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    g = torch.Generator().manual_seed(3)
    data = [(torch.randn(8, 6, generator=g), torch.arange(8) % 3) for _ in range(4)]
    half = [(x[4 * RANK : 4 * RANK + 4], y[4 * RANK : 4 * RANK + 4]) for x, y in data]
    ours, theirs = (trained(o, mesh, half) for o in (tp.optim.SGD, torch.optim.SGD))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))  # 1: torch's bits
    alone = trained(torch.optim.SGD, None, data)
    for a, b in zip(ours, alone, strict=True):  # 2: one process's, but for the order of sums
        assert torch.allclose(a, b, atol=1e-6)

    x = torch.randn(5, 7, generator=g)  # 3 and 2 rows
    for placement in (Shard(0), Shard(1), Replicate()):  # 3: softplus to the second derivative
        parts, expected = [], []
        for own, found in ((distribute_tensor(x, mesh, [placement]), parts), (x.clone(), expected)):
            own.requires_grad_()
            y = tp.softplus(own, 2.0)
            (first,) = torch.autograd.grad(y.square().sum(), own, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), own)
            found += [whole(t) for t in (y, first, second)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parts, expected, strict=True))
        assert torch.equal(parts[0], expected[0])
        d = distribute_tensor(x, mesh, [placement])  # 4: in place
        assert tp.softplus_(d, 2.0) is d and torch.equal(whole(d), expected[0])
        d, plain = distribute_tensor(x, mesh, [placement]), x.clone()  # 5: noise
        tp.perturb_({"w": d}, 0.1, seed=7)
        tp.perturb_({"w": plain}, 0.1, seed=7)
        assert torch.equal(whole(d), plain) and d.placements == (placement,)

    p = nn.Parameter(distribute_tensor(x, mesh, [Shard(0)]))  # 6: another layout
    p.grad = distribute_tensor(x, mesh, [Shard(0)])
    optimizer = tp.optim.SGD([p], **RULE)
    optimizer.step()
    before = whole(p).clone()
    optimizer.state[p]["momentum_buffer"] = distribute_tensor(x, mesh, [Replicate()])
    try:
        optimizer.step()
    except TypeError as error:
        assert "expected a momentum buffer laid out as its parameter" in str(error)
        assert torch.equal(whole(p), before)
        print("all 6 hold", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
