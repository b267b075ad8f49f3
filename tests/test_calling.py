"""Models of several inputs, and of outputs that are no tensor, in every entry point."""

import copy
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import twophase_ext as tp
from twophase_ext.model.calling import Packing, dismiss, one_tensor, pack

N = 24


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


TOKENS = torch.randint(1, 40, (N, 6), generator=generator())
MASK = (torch.arange(6) < torch.randint(2, 7, (N, 1), generator=generator(1))).long()
REAL = torch.randn(N, 2, 3, generator=generator(2))
Y = torch.arange(N) % 3


@dataclass
class Output:
    loss: None
    logits: torch.Tensor


Named = namedtuple("Named", ["out", "aux"])


class Reader(nn.Module):
    """Tokens with a mask, as tokenizers make them; beside real numbers, it may be."""

    def __init__(self, kind=dict):
        super().__init__()
        self.kind = kind
        self.table, self.mix, self.head = nn.Embedding(40, 16), nn.Linear(22, 16), nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask=None, real=None, scale=1.0):
        h = self.table(input_ids)
        if attention_mask is not None:
            assert attention_mask.dtype in (torch.long, torch.bool)
            h = h * attention_mask[..., None]
        extra = h.new_zeros(len(h), 6) if real is None else real.flatten(1)
        logits = self.head(torch.tanh(self.mix(torch.cat([h.sum(1) * scale, extra], 1))))
        if self.kind is Output:
            return Output(None, logits)
        if self.kind is Named:
            return Named(logits, logits * 2)
        return {"hidden": h, "logits": logits} if self.kind is dict else self.kind([logits, h])


INPUTS = {
    "dict": {"input_ids": TOKENS, "attention_mask": MASK, "scale": 2.0, "real": None},
    "bool mask": {"input_ids": TOKENS, "attention_mask": MASK.bool()},
    "mixed": {"input_ids": TOKENS, "real": REAL},
    "numpy": {"input_ids": TOKENS.numpy(), "attention_mask": MASK.numpy()},
    "tuple": (TOKENS, MASK),
    "one": TOKENS,
}


def model_of(kind=dict):
    torch.manual_seed(0)
    return Reader(kind)


def call(model, x):
    if isinstance(x, dict):
        x = {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in x.items()}
        found = model(**x)
    else:
        found = model(*x) if isinstance(x, tuple) else model(x)
    if isinstance(found, dict):
        return found["logits"]
    return found.logits if isinstance(found, Output) else found[0]


@pytest.mark.parametrize("kind", [dict, Output, Named, tuple, list])
@pytest.mark.parametrize("name", INPUTS)
def test_packed_inputs_give_the_same_logits(kind, name):
    if kind is not dict and name not in ("dict", "one"):
        return
    model, x = model_of(kind), INPUTS[name]
    expected = (
        call(model, x)
        if kind is not Output
        else model(**x).logits
        if name == "dict"
        else model(x).logits
    )
    with one_tensor(model, x) as packed:
        assert torch.is_tensor(packed) and len(packed) == N
        assert packed.dtype == (torch.float32 if name == "mixed" else torch.int64)
        assert torch.equal(model(packed), expected)
        copied = copy.deepcopy(model)
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert torch.equal(copied(packed), expected)
    dismiss(copied)
    assert not copied._forward_hooks and not copied._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("name", INPUTS)
def test_every_entry_point_takes_them(name, tmp_path):
    model, x = model_of(), INPUTS[name]
    example = (
        {k: v[:2] if hasattr(v, "shape") else v for k, v in x.items()} if isinstance(x, dict) else x
    )
    if isinstance(x, dict):
        assert tp.nn.analytic(model, example_input=example).is_analytic
        assert all(f.status == "analytic" for f in tp.nn.classify(model, example_input=example))
    tp.nn.widen(model, N, example_input=x)
    assert tp.check_assumptions(model, x).hold
    verdict = tp.verify_expressivity(model, x, w="witness")
    assert verdict.status == "proved", str(verdict)
    assert verdict.recheck(model, x, say=lambda _: None)
    other = {**x, "input_ids": x["input_ids"] + 0} if isinstance(x, dict) else x
    assert verdict.recheck(model, other, say=lambda _: None)
    trainer = tp.Trainer(model, epochs=4, tau=0.5, run_dir=tmp_path, progress=False)
    result = trainer.fit((x, Y), (x, Y))
    assert result.status == "completed" and result.verdict.status == "proved"
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert result.final["val_loss"] == pytest.approx(result.final["train_loss"], rel=1e-4)
    loss = nn.functional.cross_entropy(call(model.eval(), x), Y)
    assert float(loss) == pytest.approx(result.final["train_loss"], rel=1e-4)


class Records(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"input_ids": TOKENS[i], "attention_mask": MASK[i], "labels": int(Y[i])}


@pytest.mark.parametrize("loader", [False, True])
def test_samples_that_are_dicts(loader):
    data = DataLoader(Records(), batch_size=8) if loader else Records()
    weights = []
    for source in (data, ({"input_ids": TOKENS, "attention_mask": MASK}, Y)):
        model = tp.nn.widen(model_of(), N, last_layer="head")
        torch.manual_seed(0)
        model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
        trainer = tp.Trainer(model, epochs=3, batch_size=8, run_dir=False, progress=False)
        assert trainer.fit(source).status == "completed"
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_branches_give_models_back_as_they_came(tmp_path):
    x = INPUTS["dict"]
    model = tp.nn.widen(model_of(), N, last_layer="head")
    trainer = tp.Trainer(model, epochs=4, tau=0.5, run_dir=False, progress=False)
    results = trainer.branch({"base": {"second_phase": "none"}, "two": {}}, (x, Y))
    for result in results.values():
        assert not result.model._forward_hooks and not result.model._forward_pre_hooks
        assert isinstance(result.model(**x), dict)


def test_equal_samples_are_found():
    x = {"input_ids": TOKENS.clone(), "attention_mask": MASK.clone()}
    for part in x.values():
        part[5] = part[2]
    model = tp.nn.widen(model_of(), N, example_input=x)
    verdict = tp.verify_expressivity(model, x)
    assert verdict.status == "proved" and verdict.repeated == [[2, 5]]


REFUSED = {
    "lengths": ({"a": TOKENS, "b": MASK[:3]}, ValueError, "expected inputs of one length"),
    "empty": ({"a": TOKENS[:0], "b": REAL[:0]}, ValueError, "the data set is empty"),
    "a scalar": ({"a": TOKENS, "b": torch.tensor(1)}, ValueError, "expected inputs of one length"),
    "no array": ({"a": None, "b": "text"}, TypeError, "expected arrays, got"),
    "text": ({"a": TOKENS, "b": ["some", "text"]}, TypeError, r"x\['b'\]"),
    "large": ({"a": TOKENS + (1 << 25), "b": REAL}, ValueError, "whole numbers beside real"),
    "not finite": (
        {"a": TOKENS, "b": REAL / 0},
        ValueError,
        "x: sample|x: expected finite|NaN|inf",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed(name):
    x, error, message = REFUSED[name]
    model = model_of()
    with pytest.raises(error, match=message):
        tp.verify_expressivity(model, x)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_samples_of_other_shapes_are_refused():
    class Ragged(Records):
        def __getitem__(self, i):
            return {**super().__getitem__(i), "attention_mask": MASK[i, : 6 - (i == 9)]}

    with pytest.raises(ValueError, match=r"pad all samples to one length|collate"):
        tp.Trainer(model_of(), epochs=2, run_dir=False, progress=False).fit(Ragged())


def test_the_order_of_a_dict_says_nothing():
    x = INPUTS["mixed"]
    turned = dict(reversed(x.items()))
    assert torch.equal(pack(x, "x")[0], pack(turned, "x")[0])
    model = tp.nn.widen(model_of(), N, last_layer="head")
    trainer = tp.Trainer(model, epochs=2, run_dir=False, progress=False)
    final = trainer.fit((x, Y), (turned, Y)).final
    assert final["val_loss"] == pytest.approx(final["train_loss"], rel=1e-5)
    for other in (INPUTS["dict"], {**x, "real": REAL[:, :1]}, TOKENS):
        with pytest.raises(ValueError, match="val: expected inputs as those of train"):
            tp.Trainer(model, epochs=2, run_dir=False, progress=False).fit((x, Y), (other, Y))


def test_packing_is_a_value():
    x, packing = pack({"a": TOKENS, "b": REAL.double()}, "x")
    assert x.dtype == torch.float64 and packing.width == 12
    assert packing == pack({"a": TOKENS[:3], "b": REAL[:3].double()}, "x")[1]
    assert packing != Packing(packing.names, packing.shapes, packing.dtypes, (("c", 1),))
    _, found = packing.unpack(x[2:4])
    assert torch.equal(found["a"], TOKENS[2:4]) and torch.equal(found["b"], REAL[2:4].double())


class Convolution(nn.Module):
    """A graph convolution: sums over neighbours by index, normalised by degrees."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.mix = nn.Linear(inputs, outputs)

    def forward(self, x, edges):
        source, target = edges
        degree = x.new_ones(len(x)).index_add(0, target, x.new_ones(len(target)))
        scale = degree.pow(-0.5)
        scale = scale.masked_fill(scale == float("inf"), 0.0)
        h = self.mix(x) * scale[:, None]
        index = target[:, None].expand(-1, h.shape[1])
        gathered = torch.zeros_like(h).scatter_add_(0, index, h[source])
        return (h + gathered) * scale[:, None]


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Convolution(4, 16), Convolution(16, 12)

    def forward(self, x, edges, *, twice=False):
        h = self.second(torch.tanh(self.first(x, edges)), edges)
        return {"out": torch.tanh(h) * (2 if twice else 1), "other": None}


def graph():
    torch.manual_seed(0)
    x, edges = torch.randn(N, 4), torch.randint(0, N, (2, 60))
    rows = tp.nn.Rows(Graph(), x, edges=edges, twice=True)
    return nn.Sequential(rows, nn.Linear(12, 3)), x, edges


def test_the_nodes_of_a_graph_are_samples():
    model, x, edges = graph()
    rows = model[0]
    assert set(rows.state_dict()) == {f"model.{k}" for k in rows.model.state_dict()}
    whole = rows.model(x, edges, twice=True)["out"]
    assert torch.equal(rows(torch.tensor([3, 1, 3])), whole[[3, 1, 3]])
    nodes = torch.arange(N)
    assert tp.nn.analytic(model, example_input=nodes).is_analytic
    tp.nn.widen(model, N, example_input=nodes)
    table = tp.check_assumptions(model, nodes)
    assert table.hold, str(table)
    verdict = tp.verify_expressivity(model, nodes, w="witness")
    assert verdict.status == "proved", str(verdict)
    result = tp.Trainer(model, epochs=4, run_dir=False, progress=False).fit((nodes, Y))
    assert result.status == "completed" and result.verdict.status == "proved"
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        tp.nn.Rows(torch.relu, x)


def test_nodes_that_nothing_tells_apart_are_not_proved():
    model, x, _ = graph()
    x[7], edges = x[3], torch.stack([torch.tensor([3, 7]), torch.tensor([3, 7])])
    model[0] = tp.nn.Rows(Graph(), x, edges)
    nodes = torch.arange(N)
    tp.nn.widen(model, N, example_input=nodes)
    verdict = tp.verify_expressivity(model, nodes, w="witness")
    assert verdict.status == "undecided" and [3, 7] in verdict.culprits, str(verdict)


class PixelHead(nn.Module):
    """Images of one pixel at the end, and a convolution in the place of an affine layer."""

    def __init__(self, kernel=1, pool=1):
        super().__init__()
        self.body, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(pool)
        self.head = nn.Conv2d(8, 3, kernel)

    def forward(self, x):
        return self.head(self.pool(torch.tanh(self.body(x)))).flatten(1)


def test_a_convolution_of_one_pixel_is_an_affine_layer():
    torch.manual_seed(0)
    x, model = torch.randn(N, 3, 6, 6), PixelHead()
    with pytest.raises(ValueError, match="the output comes from the convolution 'head'"):
        tp.verify_expressivity(model, x)
    tp.nn.widen(model, N, example_input=x)
    assert model(x).shape == (N, 3)
    verdict = tp.verify_expressivity(model, x, w="witness")
    assert verdict.status == "proved" and verdict.last_layer == "head.last_layer"
    result = tp.Trainer(model, epochs=4, run_dir=False, progress=False).fit((x, Y))
    assert result.status == "completed" and result.verdict.status == "proved"
    with pytest.raises(ValueError, match="the output comes from the convolution 'head'"):
        tp.nn.widen(PixelHead(2, 2), N, example_input=x)
