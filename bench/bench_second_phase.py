"""An epoch of the second phase: cached features against the frozen backbone recomputed every step.

PreActResNet18 (64 channels) with a wide softplus layer of ceil(1.1 * 512) units on 512 MNIST images
(random images of their size where TWOPHASE_DATA is not set). The baseline is what a user does in
plain PyTorch: hidden layers frozen by requires_grad_(False), a full forward pass, SGD on the head.

And the last layer alone, over 2,200 softplus features of 2,000 MNIST images, to a training loss of
1e-3, from zero and everything included: "agd" and "exact" against torch's L-BFGS with line search.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from accelerated_problem import Rows
from twophase import data, models
from twophase_ext.model.losses import CROSS_ENTROPY
from twophase_ext.model.network import Network
from twophase_ext.training.data.samples import Samples
from twophase_ext.training.features.cache import Features
from twophase_ext.training.steps.accelerated import Iterate
from twophase_ext.training.steps.last_layer import LastLayerStep
from twophase_ext.training.steps.metric import Problem
from twophase_ext.training.steps.quasi_newton import QuasiNewton
from twophase_ext.training.steps.sides import made

GROUP = "phase-2 epoch PreActResNet18, 512 images"
SETTINGS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5}


@pytest.fixture
def problem(small):
    n, width = (64, 4) if small else (512, 64)
    try:
        images, labels = data.load("mnist", "train", download=False)
        images, labels = images[:n], labels[:n]
    except FileNotFoundError:
        images = torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8)
        labels = torch.randint(10, (n,))
    torch.manual_seed(0)
    model = models.PreActResNet18(1, 10, width=width, wide=tp.nn.wide_units(n)).eval()
    return model, images, labels, torch.randperm(n).split(64)


@pytest.mark.parametrize("mode", ["hidden", "backbone"])
def test_cached(benchmark, row, problem, mode):
    model, images, labels, batches = problem
    samples = Samples.of(
        (images, labels), name="train", device=torch.device("cpu"), dtype=torch.float32
    )
    network = Network(model, images[:2].float())
    samples.prepare(CROSS_ENTROPY, 10)
    features = Features(samples, network, mode)
    step = LastLayerStep(
        network.last.module, CROSS_ENTROPY, tp.optim.SGD(model.parameters(), **SETTINGS)
    )
    assert step.fused

    order = torch.cat(batches)
    bounds = [*range(0, len(order), 64), len(order)]

    def epoch():
        step.run(features, order, bounds)

    row(GROUP, "ours", f"features cached: {mode}")
    benchmark(epoch)


def test_recomputed(benchmark, row, problem):
    model, images, labels, batches = problem
    head = model.head[-1]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(head.parameters(), **SETTINGS)
    x = data.as_float(images)

    def epoch():
        for index in batches:
            loss = F.cross_entropy(model(x[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    row(GROUP, "baseline", "frozen backbone recomputed")
    benchmark.pedantic(epoch, rounds=1 if benchmark.disabled else 3, warmup_rounds=1)
    assert isinstance(head, nn.Linear)


def test_reading_h_once(benchmark, row, problem):
    model, images, _, _ = problem
    with torch.no_grad():
        h = Network(model, images[:2].float()).hidden(data.as_float(images))
    row(GROUP, "limit", "read h once", bytes=h.numel() * 4)
    benchmark(h.sum)


TARGET, PASSES = 1e-3, 60  # training loss; steps that "agd" may need at its default damping
TO_TARGET = "last layer to a loss of 1e-3, 2,000 x 2,200"


@pytest.fixture(scope="module")
def pixels(request):
    n, width = (60, 66) if request.config.getoption("--benchmark-disable") else (2000, 2200)
    try:
        images, labels = data.load("mnist", "train", download=False)
    except FileNotFoundError:
        pytest.skip("needs MNIST in TWOPHASE_DATA")
    torch.manual_seed(0)
    wide, x = nn.Linear(784, width), data.as_float(images[:n]).flatten(1)
    with torch.no_grad():
        return Rows(tp.softplus(wide(x), 100.0), labels[:n].long())


def metric_of(pixels):
    layer = nn.Linear(pixels.h.shape[1], 10)
    for p in layer.parameters():
        nn.init.zeros_(p)
    norms = (pixels.h.double().square().sum(1) + 1).sqrt()
    return made(Problem(pixels, [layer.weight, layer.bias], layer, CROSS_ENTROPY, norms, 1.0, 0.1))


def test_accelerated_steps(benchmark, row, pixels):
    def run():
        side = metric_of(pixels)
        place = Iterate(side.zeros(), side.zeros())
        while place.advance(side) > TARGET:
            assert pixels.n < 2000 or place.steps < PASSES
        return place.steps

    row(TO_TARGET, "ours", "agd, damping 0.1")
    benchmark.extra_info["steps"] = benchmark.pedantic(
        run, rounds=1 if benchmark.disabled else 3, warmup_rounds=1
    )


def test_the_minimum(benchmark, row, pixels):
    def run():
        side = metric_of(pixels)
        return QuasiNewton(side, side.zeros()).run(50, lambda value, *_: value <= TARGET)

    row(TO_TARGET, "ours", "exact: L-BFGS in the metric")
    found = benchmark.pedantic(run, rounds=1 if benchmark.disabled else 3, warmup_rounds=1)
    assert found.value <= TARGET
    benchmark.extra_info["steps"] = found.iterations


def test_lbfgs_of_torch(benchmark, row, pixels):
    layer = nn.Linear(pixels.h.shape[1], 10)

    def run():
        for p in layer.parameters():
            nn.init.zeros_(p)
        optimizer = torch.optim.LBFGS(
            layer.parameters(), max_iter=20, line_search_fn="strong_wolfe"
        )
        passes = 0

        def closure():
            nonlocal passes
            passes += 1
            optimizer.zero_grad()
            loss = F.cross_entropy(layer(pixels.h), pixels.y)
            loss.backward()
            return loss

        for _ in range(50):
            if float(optimizer.step(closure)) <= TARGET:
                break
        return passes

    row(TO_TARGET, "baseline", "torch.optim.LBFGS, strong Wolfe")
    benchmark.extra_info["steps"] = benchmark.pedantic(
        run, rounds=1 if benchmark.disabled else 3, warmup_rounds=1
    )
