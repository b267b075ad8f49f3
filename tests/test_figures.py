"""Figures of a run folder, from its files alone."""

import json
import xml.etree.ElementTree as ET

import pytest

import twophase_ext as tp
from helpers import quiet, toy_data, toy_mlp
from twophase import figures


def trained(folder, **settings) -> tp.Result:
    x, y = toy_data()
    return quiet(toy_mlp(), folder, **settings).fit((x, y), (x[:20], y[:20]))


def text_of(path) -> str:
    return "".join(ET.parse(path).getroot().itertext())


@pytest.mark.parametrize("mode", ["base", "gd", "sgd", "none"])
def test_a_run_s_figure(tmp_path, mode):
    result = trained(tmp_path / "run", second_phase=mode, epochs=6, tau=3)
    svg, png = figures.run_figure(result.run_dir)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 5000
    root = ET.parse(svg).getroot()
    assert root.tag.endswith("svg")
    axes = [g for g in root.iter() if (g.get("id") or "").startswith("axes_")]
    assert len(axes) == (2 if mode in ("gd", "sgd") else 1)
    history, curve, summary = figures.read_run(result.run_dir)
    assert [row["train_loss"] for row in history] == [r["train_loss"] for r in result.history]
    assert [p["bound"] for p in curve] == [p["bound"] for p in result.guarantee.curve]
    assert summary["guarantee"]["mode"] == mode
    assert summary["guarantee"] == json.loads(json.dumps(result.guarantee.as_dict()))
    again = figures.run_figure(result.run_dir)[0].read_bytes()
    assert again == svg.read_bytes()  # the same picture of the same run


def test_no_run_no_figure(tmp_path):
    with pytest.raises(FileNotFoundError):
        figures.run_figure(tmp_path)
