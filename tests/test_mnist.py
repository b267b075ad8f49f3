"""The paper's comparison in small: base algorithm and two phases on 2,000 real MNIST images."""

import pytest
import torch
import torch.nn.functional as F

import twophase_ext as tp
from twophase import data, models
from twophase_ext.core.seeds import epoch_order

N, EPOCHS, SEED = 2000, 20, 1
SETTINGS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5}


def build():
    with torch.random.fork_rng():
        torch.manual_seed(tp.stream_seed(SEED, "init"))
        return models.SmallConvNet(1, 10, width=8, wide=tp.nn.wide_units(N))


def train_base(images, labels):
    """The base algorithm alone, in plain PyTorch, over the same orders of samples."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
    for epoch in range(EPOCHS):
        for index in epoch_order(SEED, epoch, N).split(64):
            loss = F.cross_entropy(model(data.as_float(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def measure(model, images, labels):
    outputs = torch.cat([model(data.as_float(part)) for part in images.split(500)])
    accuracy = (outputs.argmax(1) == labels).double().mean()
    return float(F.cross_entropy(outputs, labels)), float(accuracy)


@pytest.mark.data
@pytest.mark.slow
def test_two_phases_keep_the_accuracy_and_lower_the_training_loss(data_dir):
    images, labels = (part[:N] for part in data.load("mnist", "train", data_dir))
    test = tuple(part[:2500] for part in data.load("mnist", "test", data_dir))
    base = train_base(images, labels)
    result = tp.Trainer(
        build(), epochs=EPOCHS, seed=SEED, run_dir=False, verify=False, progress=False
    ).fit((images, labels), test)
    base_loss, _ = measure(base, images, labels)
    _, base_accuracy = measure(base, *test)
    assert base_accuracy > 0.9  # the comparison means something
    assert result.final["val_accuracy"] >= base_accuracy - 0.01
    assert result.final["train_loss"] < base_loss
