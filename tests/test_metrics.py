"""The user's own metrics: measured over whole sets, reported wherever the loss is."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_data, toy_mlp
from twophase.report import write_report
from twophase_ext.training.control.progress import Progress

X, Y = toy_data(48)
VAL = (X[:20], Y[:20])


def macro_f1(logits, y):
    return f1_score(y, logits.argmax(1), average="macro")


def auc(logits, y):
    return roc_auc_score(y, logits.softmax(1), multi_class="ovr")


METRICS = {"macro f1": macro_f1, "auc": auc, "margin": lambda q, y: (q.max(1)[0]).mean()}


class Watch:
    def __init__(self):
        self.rows, self.seen = [], []

    def on_epoch_end(self, run, record):
        self.rows.append(dict(record))
        with torch.no_grad():
            training = run.network.model.training
            logits = run.network.model.eval()(X)
            run.network.model.train(training)
        self.seen.append((macro_f1(logits, Y), macro_f1(logits[:20], Y[:20])))


@pytest.mark.parametrize("phase", ["base", "agd"])
def test_metrics_are_of_the_network_at_each_epochs_end(tmp_path, monkeypatch, phase):
    said = []
    monkeypatch.setattr(Progress, "advance", lambda *texts: said.append(str(texts[-1])))
    watch, plain, model, folder = Watch(), toy_mlp(), toy_mlp(), tmp_path / "run"
    trainer = tp.Trainer(
        model,
        epochs=4,
        tau=2,
        batch_size=8,
        verify=False,
        second_phase=phase,
        run_dir=folder,
        metrics=METRICS,
        callbacks=[watch],
    )
    result = trainer.fit((X, Y, torch.arange(48)), VAL)  # one sample counts nowhere
    last = said[-1]
    quiet(plain, second_phase=phase, tau=2).fit((X, Y, torch.arange(48)), VAL)
    assert same_bits(bits(model), bits(plain))  # they change nothing
    for row, (_, held_out) in zip(result.history, watch.seen, strict=True):
        assert row["val_macro f1"] == pytest.approx(held_out)
    logits = result.predict(X)
    assert result.final["train_macro f1"] == pytest.approx(macro_f1(logits[1:], Y[1:]))
    assert result.final["train_auc"] == pytest.approx(auc(logits[1:], Y[1:]))
    assert result.final["val_auc"] == pytest.approx(auc(logits[:20], Y[:20]))
    assert result.history[-1]["train_auc"] == pytest.approx(result.final["train_auc"])
    assert watch.rows[0].keys() == result.history[0].keys()
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [float(r["val_macro f1"]) for r in rows] == [r["val_macro f1"] for r in result.history]
    assert json.loads((folder / "result.json").read_text())["final"] == result.final
    text = f"macro f1 {result.final['val_macro f1']:.4g}, auc {result.final['val_auc']:.4g}"
    assert text in str(result).replace("\n", " ")
    assert f", val {text.replace(', ', ', val ')}" in last
    again = tp.load_run(folder)
    assert again.history[-1]["val_auc"] == result.history[-1]["val_auc"]
    if phase == "base":
        page = tmp_path / "report.html"
        write_report([folder], page)
        html = page.read_text()
        assert text in html and "Macro f1 by epoch" in html and "train_macro f1" in html


def test_metrics_of_other_losses_get_their_targets():
    y = torch.randn(48, 3)
    y[0] = 100.0

    def worst(outputs, targets):
        assert outputs.shape == targets.shape and not targets.requires_grad
        return float((outputs - targets).abs().max())

    result = quiet(toy_mlp(), loss="huber", metrics={"worst": worst}).fit((X, y))
    assert result.final["train_worst"] > 90 and "val_worst" not in result.history[0]
    infinite = quiet(toy_mlp(), metrics={"inf": lambda q, y: np.float32("inf")}).fit((X, Y))
    assert infinite.final["train_inf"] is None


def test_metrics_that_give_no_number_are_named_before_training():
    def broken(logits, y):
        raise KeyError("oops")

    for given, message in (
        ({"broken": broken}, r"metrics: broken fails on logits \[48, 3\] and y \[48\]: KeyError"),
        ({"rows": lambda q, y: q}, "metrics: rows: expected a number for .*, got Tensor"),
        ({"none": lambda q, y: None}, "got NoneType"),
        ({"bool": lambda q, y: True}, "got bool"),
    ):
        model, steps = toy_mlp(), []
        model[0].register_full_backward_hook(lambda *_, steps=steps: steps.append(1))
        before = bits(model)
        with pytest.raises(ValueError, match=message):
            quiet(model, metrics=given).fit((X, Y))
        assert same_bits(bits(model), before) and not steps
    for given, kind in (
        ({"loss": macro_f1}, ValueError),
        ({"a\nb": macro_f1}, ValueError),
        ({"x": 3}, TypeError),
        ([macro_f1], TypeError),
    ):
        with pytest.raises(kind, match="metrics: "):
            quiet(toy_mlp(), metrics=given)
