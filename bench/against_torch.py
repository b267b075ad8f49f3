"""What docs/speed-against-torch.md says: ours beside torch and scikit-learn, one thread each.

    python bench/against_torch.py [epoch] [sgd] [softplus] [probe]

Prints the rows of its tables: medians of the process's CPU time, the candidates of a row in turns,
so that a machine that others use slows all of them alike.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.linear_model import SGDClassifier
from torch import nn

import twophase_ext as tp
from twophase.models import PreActResNet18
from twophase_ext.ops import last_layer_epoch_

BATCH = 64
RULE = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-5}
# samples, features, outputs; samples of a timed epoch
HEADS = [
    (20_000, 512, 10, 20_000),
    (20_000, 512, 100, 20_000),
    (20_000, 512, 1_000, 2_048),
    (4_096, 4_096, 1_000, 2_048),
    (4_000, 768, 32_000, 256),
]


def medians(
    calls: dict[str, Callable[[], object]], repeats: int, rounds: int = 11
) -> dict[str, float]:
    """Microseconds of CPU time a call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(repeats):
                call()
            times[name].append(1e6 * (time.process_time() - start) / repeats)
    return {name: statistics.median(found) for name, found in times.items()}


def show(name: str, found: dict[str, float], best: str) -> None:
    values = ", ".join(f"{key} {value:.1f} us" for key, value in found.items())
    print(f"{name}: {values}; {best} / ours {found[best] / found['ours']:.2f}", flush=True)


def epoch() -> None:
    for n, m, k, taken in HEADS:
        h, y = torch.rand(n, m).mul_((3 / m) ** 0.5), torch.randint(k, (n,))
        order, layer = torch.randperm(n)[:taken], nn.Linear(m, k)
        optimizer = torch.optim.SGD(layer.parameters(), **RULE, fused=True)
        weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        state = (weight, bias, torch.zeros_like(weight), torch.zeros_like(bias))
        x, delta = h[:BATCH].clone(), torch.randn(BATCH, k)

        def ours(state=state, h=h, y=y, order=order):
            last_layer_epoch_(*state, h, y, order, batch_size=BATCH, **RULE)

        def eager(h=h, y=y, order=order, layer=layer, optimizer=optimizer):
            for i in order.split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(layer(h[i]), y[i]).backward()
                optimizer.step()

        def products(x=x, delta=delta, weight=weight, steps=-(-taken // BATCH)):
            for _ in range(steps):
                x @ weight.t()
                delta.t() @ x

        found = medians({"ours": ours, "eager": eager, "products": products}, 1, 7)
        show(f"last layer {n} x {m} -> {k}", found, "eager")


def mlp(activation: Callable[[], nn.Module], hidden: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(16, 64), activation()]
    for _ in range(hidden - 1):
        layers += [nn.Linear(64, 64), activation()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def sgd() -> None:
    networks = {
        "MLP of 6 tensors": (mlp(nn.ReLU, 2), 1000),
        "PreActResNet18, width 8": (PreActResNet18(width=8), 200),
        "PreActResNet18, width 32": (PreActResNet18(width=32), 30),
    }
    for name, (network, repeats) in networks.items():
        plain, twin = copy.deepcopy(network), copy.deepcopy(network)
        for tensors in zip(
            network.parameters(), plain.parameters(), twin.parameters(), strict=True
        ):
            for p in tensors:
                p.grad = (
                    torch.randn_like(tensors[0]) if p is tensors[0] else tensors[0].grad.clone()
                )
        ours = tp.optim.SGD(network.parameters(), **RULE)
        reference = torch.optim.SGD(twin.parameters(), **RULE, foreach=False)
        for _ in range(3):
            ours.step()
            reference.step()
        pairs = zip(network.parameters(), twin.parameters(), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        fused = torch.optim.SGD(plain.parameters(), **RULE, fused=True)
        found = medians({"ours": ours.step, "fused": fused.step}, repeats)
        show(f"SGD.step, {name}, bits of foreach=False: {same}", found, "fused")


def softplus() -> None:
    for shape in ((8, 16), (64, 128), (64, 512)):
        x, grad = torch.randn(shape), torch.randn(shape)
        leaf = x.clone().requires_grad_()
        for what, ours, theirs in (
            ("forward", lambda x=x: tp.softplus(x, 100.0), lambda x=x: F.softplus(x, 100.0)),
            (
                "forward and backward",
                lambda x=leaf, g=grad: tp.softplus(x, 100.0).backward(g),
                lambda x=leaf, g=grad: F.softplus(x, 100.0).backward(g),
            ),
        ):
            show(
                f"softplus {shape}, {what}", medians({"ours": ours, "torch": theirs}, 500), "torch"
            )
    x, y = torch.randn(BATCH, 16), torch.randint(10, (BATCH,))
    steps = {}
    kinds = {"ours": tp.nn.Softplus, "torch": lambda: nn.Softplus(100), "ReLU": nn.ReLU}
    for name, activation in kinds.items():
        network = mlp(activation)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

        def step(network=network, optimizer=optimizer):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()

        steps[name] = step
    show("a step of a 3-layer MLP of width 64", medians(steps, 200), "torch")


def probe() -> None:
    n, m, k, epochs = 20_000, 512, 10, 20
    x = torch.rand(n, m) - 0.5
    y = (x @ torch.randn(m, k) + torch.randn(n, k)).argmax(1)
    arrays = x.numpy(), y.numpy()

    def ours():
        layer = nn.Linear(m, k).eval()
        tp.fit_last_layer(layer, tp.FeatureCache(layer, (x, y)), epochs=epochs)
        return layer

    def scikit():
        return SGDClassifier(loss="log_loss", max_iter=epochs, tol=None).fit(*arrays)

    def eager():
        layer = nn.Linear(m, k)
        optimizer = torch.optim.SGD(layer.parameters(), **{**RULE, "lr": 0.01}, fused=True)
        for _ in range(epochs):
            for i in torch.randperm(n).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(layer(x[i]), y[i]).backward()
                optimizer.step()

    right = float((ours()(x).argmax(1) == y).float().mean())
    print(f"training accuracy: ours {right:.3f}, scikit-learn {scikit().score(*arrays):.3f}")
    found = medians({"ours": ours, "scikit-learn": scikit, "eager": eager}, 1, 3)
    show(f"linear probe {n} x {m}, {epochs} epochs", found, "scikit-learn")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {"epoch": epoch, "sgd": sgd, "softplus": softplus, "probe": probe}
    for chosen in sys.argv[1:] or parts:
        parts[chosen]()
