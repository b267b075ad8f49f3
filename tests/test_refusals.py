"""Whatever fit() can refuse is refused before a weight, a type or a file has changed."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from helpers import Given, bits, quiet, same_bits, toy_data, toy_mlp


class Listed(Dataset):
    """A map-style dataset that is not a TensorDataset."""

    def __init__(self, x, y, wrap=lambda x, y: (x, y)) -> None:
        self.x, self.y, self.wrap = x, y, wrap

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i):
        return self.wrap(self.x[i], self.y[i])


def refused(model, error, message, data=None, val=None, **settings) -> None:
    before = bits(model)
    with pytest.raises(error, match=message):
        quiet(model, **settings).fit(toy_data() if data is None else data, val)
    assert same_bits(before, bits(model))
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in bits(model).items()}


@pytest.mark.parametrize("kind", [TensorDataset, Listed])
@pytest.mark.parametrize("part", ["train", "val"])
def test_bad_samples_of_a_dataset(kind, part):
    (x, y), good = toy_data(), toy_data()
    x[17, 1] = float("nan")
    bad = kind(x, y)
    data, val = (bad, None) if part == "train" else (good, bad)
    message = f"{part}: NaN or infinity in the input of sample 17"
    refused(toy_mlp(), ValueError, message, data, val)
    x, y = toy_data()
    y[40] = 3
    bad = kind(x, y)
    data, val = (bad, None) if part == "train" else (good, bad)
    refused(toy_mlp(), ValueError, f"{part}: expected labels in 0..2.*sample 40", data, val)


def test_a_float64_model_stays_float64_where_the_data_are_refused():
    x, y = toy_data()
    refused(toy_mlp(dtype=torch.float64), ValueError, "as many targets", (x, y[:9]))
    refused(toy_mlp(dtype=torch.float64), ValueError, "labels in 0..2", (x, y + 1))
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), *toy_mlp(4)).double()
    refused(model, ValueError, "LBFGS", optimizer=torch.optim.LBFGS)
    assert model[1].running_mean.dtype == torch.float64


def test_inputs_that_the_model_does_not_take():
    x, y = toy_data()
    message = r"train: the model does not run on inputs of shape \[n, 4\]"
    refused(toy_mlp(), ValueError, message, (x[:, :4], y))
    message = r"val: the model does not run on inputs of shape \[n, 4\]"
    refused(toy_mlp(), ValueError, message, (x, y), (x[:, :4], y))


@pytest.mark.parametrize("std", [1e-40, 1e19, 1e39])
def test_sigma_outside_float32(std):
    refused(toy_mlp(), ValueError, "noise_std|std of", noise_std=std)


def test_hidden_parameters_that_share_memory():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), *toy_mlp())
    model[2].weight = nn.Parameter(model[0].weight.detach())  # two parameters over one memory
    refused(model, ValueError, "2.weight: expected memory of its own")


def test_a_frozen_last_weight():
    model = toy_mlp()
    model[4].weight.requires_grad_(False)
    refused(model, ValueError, "last_layer: .*4.weight.* does not require")


def test_samples_of_odd_structure():
    x, y = toy_data()
    refused(
        toy_mlp(),
        ValueError,
        r"train: expected samples \(x, y\), got a mapping with \['left', 'right'\]",
        Listed(x, y, lambda x, y: {"left": x, "right": y}),
    )
    ids = Listed(x, y, lambda x, y: ({"ids": x}, y))
    refused(toy_mlp(), ValueError, "train: the model does not run .* argument 'ids'", ids)
    refused(toy_mlp(), ValueError, r"train: .*\(x, y\)", Listed(x, y, lambda x, y: (x, y, 1, 1)))


def test_loaders_whose_order_cannot_be_honoured():
    dataset = TensorDataset(*toy_data())
    replaced = RandomSampler(dataset, replacement=True)
    batches = [[0, 1], [2, 3]]
    for loader in (
        DataLoader(dataset, sampler=replaced),
        DataLoader(dataset, sampler=RandomSampler(dataset, num_samples=10)),
        DataLoader(dataset, batch_sampler=batches),
        DataLoader(dataset, batch_size=None),
    ):
        refused(toy_mlp(), ValueError, "train: .*pass its dataset", loader)


def test_uint8_labels_are_compared_as_numbers():
    x, y = toy_data()
    model = toy_mlp(classes=300)
    result = quiet(model).fit((x, (y + 100).to(torch.uint8)))  # 300 is not a uint8
    assert result.status == "completed"


def test_numpy_integers_are_integers():
    result = quiet(toy_mlp(), epochs=np.int64(4), batch_size=np.int32(8), tau=np.float32(0.5)).fit(
        toy_data()
    )
    assert len(result.history) == 4


@pytest.mark.filterwarnings("error")
def test_readonly_memmap_and_label_columns(tmp_path):
    x, y = toy_data()
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    model, other = toy_mlp(), toy_mlp()
    quiet(model).fit((mapped, y[:, None]))
    quiet(other).fit((x, y))
    assert same_bits(bits(model), bits(other))
    third = toy_mlp()
    quiet(third).fit(Listed(x.numpy(), y.numpy()))  # y: numpy scalars
    assert same_bits(bits(model), bits(third))


def test_steps_on_one_sample():
    x, y = toy_data()
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), *toy_mlp(d=8))
    message = "batch_size: a step would be made on one sample"
    refused(model, ValueError, message, (x, y), batch_size=1)
    refused(model, ValueError, message, (x[:1], y[:1]))
    assert quiet(model, batch_size=59).fit((x, y)).status == "completed"  # 60 samples
    assert quiet(toy_mlp(), batch_size=1).fit((x[:5], y[:5])).status == "completed"


def test_a_scheduler_that_ends_before_the_run():
    def cycle(total):
        kind = torch.optim.lr_scheduler.OneCycleLR
        return lambda optimizer: kind(optimizer, 0.1, total_steps=total)

    settings = {"epochs": 4, "tau": 2}
    message = r"scheduler: expected one for 4 steps, .* OneCycleLR.* for 3"
    refused(toy_mlp(), ValueError, message, scheduler=cycle(3), **settings)
    assert quiet(toy_mlp(), scheduler=cycle(4), **settings).fit(toy_data()).status == "completed"
    # it stops at tau there
    settings |= {"second_phase": "gd", "scheduler": cycle(2)}
    assert quiet(toy_mlp(), **settings).fit(toy_data()).status == "completed"


def test_an_inference_tensor_that_a_step_would_save():
    model = Given(lambda m, x: m.rest(m.first(x) * m.scale), first=nn.Linear(5, 5), rest=toy_mlp())
    with torch.inference_mode():
        model.scale = torch.ones(5)
    message = "model: .* not in training mode: Inference tensors cannot be saved"
    refused(model, ValueError, message)
