"""Datasets and DataLoaders where inputs are asked for: the same verdict as of their arrays."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import twophase_ext as tp
from helpers import toy_data, toy_mlp
from twophase_ext.model.datasets import inputs_of

X, Y = toy_data(64)


class Given(Dataset):
    def __init__(self, get):
        self.get = get

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.get(i)


SOURCES = {
    "tensors": TensorDataset(X, Y),
    "inputs alone": TensorDataset(X),
    "pairs": Given(lambda i: (X[i], Y[i])),
    "triples": Given(lambda i: (X[i], Y[i], 1.0)),
    "weighted tensors": TensorDataset(X, Y, Y),
    "weighted dicts": Given(lambda i: {"image": X[i], "label": "text", "weight": 1.0}),
    "samples": Given(lambda i: X[i]),
    "dicts": Given(lambda i: {"image": X[i], "label": Y[i]}),
    "loader": DataLoader(Given(lambda i: (X[i], Y[i])), batch_size=7, shuffle=True, num_workers=2),
    "loader of tensors": DataLoader(TensorDataset(X, Y), batch_size=7, drop_last=True),
    "subset": Subset(Given(lambda i: (X[i % 64], 0)), range(64)),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_inputs_are_those_of_all_samples_in_order(kind):
    assert torch.equal(inputs_of(SOURCES[kind], "x"), X)


def test_verdict_table_width_and_outputs_of_a_loader():
    loader, model = DataLoader(SOURCES["pairs"], batch_size=5), toy_mlp()
    verdict = tp.verify_expressivity(model, loader)
    assert verdict.status == "proved"
    assert verdict.hashes == tp.verify_expressivity(model, X).hashes
    assert verdict.recheck(model, loader) and verdict.recheck(model, X)
    assert str(tp.check_assumptions(model, loader)) == str(tp.check_assumptions(model, X))
    wide = [tp.nn.widen(toy_mlp(), data) for data in (X, loader)]
    assert len({str(m) for m in wide}) == 1


def test_several_inputs_by_name():
    pairs = Given(lambda i: {"a": X[i, :2], "b": X[i, 2:], "labels": Y[i]})
    found = inputs_of(DataLoader(pairs), "x")
    assert torch.equal(found["a"], X[:, :2]) and torch.equal(found["b"], X[:, 2:])
    found = inputs_of(Given(lambda i: ((X[i, :2], X[i, 2:]), Y[i])), "x")
    assert isinstance(found, tuple) and torch.equal(torch.cat(found, 1), X)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Given(lambda i: X[i] + torch.rand(())), "sample 0 was another one .* turn off"),
        (DataLoader(SOURCES["pairs"], sampler=[1, 1]), r"list, .*|cannot be honoured"),
        (Subset(SOURCES["pairs"], []), "x: the data set is empty"),
        (Given(lambda i: (X[i], Y[i], 1, 1)), r"expected samples x, .* \(x, y, weight\), got 4"),
    ],
)
def test_samples_that_no_proof_is_about_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        tp.verify_expressivity(toy_mlp(), data)
