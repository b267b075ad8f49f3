"""Labels that are text: numbered in sorted order, kept in the result, given back."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_data, toy_mlp
from twophase_ext.model.labels import as_text

X, Y = toy_data(40)
NAMES = np.array(["zebra", "ant", "mouse"])  # not in sorted order
TEXT = NAMES[Y.numpy()]
SORTED = torch.tensor([2, 0, 1])[Y]


def test_text_trains_as_its_numbers_and_comes_back(tmp_path):
    plain = quiet(toy_mlp()).fit((X, SORTED), (X[:9], SORTED[:9]))
    assert plain.classes is None
    assert torch.equal(plain.predict(X, labels=True), plain.predict(X).argmax(1))
    for y in (TEXT, TEXT.tolist(), TEXT[:, None], TEXT.astype(object), pd.Series(TEXT)):
        result = quiet(toy_mlp()).fit((X, y), (X[:9], y[:9]))
        assert result.classes == ("ant", "mouse", "zebra")
        assert same_bits(bits(result.model), bits(plain.model)) and result.final == plain.final
    folder = tmp_path / "run"
    result = quiet(toy_mlp(), folder).fit((X, TEXT, np.arange(40.0)), (X[:9], TEXT[:9]))
    said = result.predict(X, labels=True)
    assert said.dtype.kind == "U" and (said == np.sort(NAMES)[result.predict(X).argmax(1)]).all()
    again = tp.load_run(folder, toy_mlp())
    assert again.classes == result.classes and (again.predict(X, labels=True) == said).all()
    assert again.score((X, TEXT)) == result.score((X, TEXT))
    assert json.loads((folder / "config.json").read_text())["classes"] == ["ant", "mouse", "zebra"]
    with pytest.raises(ValueError, match="resume: the training data"):  # the same numbers
        renamed = np.char.add("a", TEXT)
        quiet(toy_mlp(), folder).fit((X, renamed), (X[:9], renamed[:9]), resume=True)


def test_floors_and_minima_take_text():
    x = X.clone()
    x[20:] = x[:20]
    found = tp.loss_floor(x, TEXT)
    assert found.lower == tp.loss_floor(x, SORTED).lower > 0
    assert tp.global_minimum(toy_mlp(), x, TEXT).floor.lower == found.lower


def test_whole_floats_and_columns_are_labels():
    truth = bits(quiet(toy_mlp()).fit((X, Y)).model)
    for y in (Y.double(), Y.float()[:, None], Y.numpy().astype(np.float32).tolist()):
        result = quiet(toy_mlp()).fit((X, y))
        assert same_bits(bits(result.model), truth) and result.classes is None


def test_what_is_no_text_is_left_alone():
    for y in (
        Y,
        Y.numpy(),
        Y.tolist(),
        [],
        None,
        np.array([]),
        pd.Series(Y.numpy()),
        "ant",
        [[1], [2, 3]],
    ):
        assert as_text(y) is None


def test_unusable_text_is_named():
    def refused(message, train, val=None, kind=ValueError, model=None, **settings):
        model = model or toy_mlp()
        before = bits(model)
        with pytest.raises(kind, match=message):
            quiet(model, **settings).fit(train, val)
        assert same_bits(bits(model), before)

    other = TEXT.astype("U9")
    other[5] = "aardvark"
    text = (X, TEXT)
    refused(
        r"val\[1\]: 'aardvark' at sample 5 is no class .* 'ant', 'mouse', 'zebra'", text, (X, other)
    )
    refused("val: expected labels that are text as train's, got numbers", text, (X, Y))
    refused("val: expected labels that are numbers as train's, got text", (X, Y), text)
    few = nn.Sequential(nn.Linear(5, 9), tp.nn.Softplus(), nn.Linear(9, 2))
    refused(
        "train: 3 classes, 'ant', 'mouse', 'zebra', where the last layer has 2", text, model=few
    )
    refused("the labels are text, 'ant', which bce_with_logits does not take", text, loss="bce")
    missing = [None, *TEXT[1:]]
    refused("expected text labels alone, got None at sample 0", (X, missing), kind=TypeError)
    pairs = [(X[i], str(TEXT[i])) for i in range(40)]

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return pairs[i]

    refused("labels that are text are taken as one array", Pairs(), kind=TypeError)
    result = quiet(toy_mlp()).fit(text)
    with pytest.raises(ValueError, match="data: expected labels that are text, 'ant'"):
        result.score((X, Y))
    real = quiet(toy_mlp(), loss="squared_error").fit((X, torch.randn(40, 3)))
    with pytest.raises(ValueError, match="labels: expected False, squared_error has none"):
        real.predict(X, labels=True)
