"""twophase report: one HTML file that holds what the run folders hold."""

import base64
import csv
import json
import re
import shutil
from itertools import pairwise

import pytest
import torch

import twophase.cli
import twophase_ext as tp
from helpers import quiet, toy_data, toy_images, toy_mlp
from interrupts import End
from report_page import report
from twophase.pictures import culprit_picture
from twophase.report import curves, page, words, write_report
from twophase.report.gather import read_folder
from twophase_ext.linalg.bounds import bound_text

HOSTILE = "<script>alert(1)<&\"'$x^2$"


def fit(folder, mode="gd", images=False, **settings) -> tp.Result:
    if images:
        x, y = toy_images(30)
        for group in ((3, 17, 21), (5, 9)):  # 1e-30 apart: within rounding of each other
            for k, i in enumerate(group):
                x[i] = x[group[0]]
                x[i, 0, 0, 0] = k * 1e-30
        x[12] = x[8]
        model = torch.nn.Sequential(torch.nn.Flatten(), *toy_mlp(d=36))
        return quiet(model, folder, verify="auto", **settings).fit((x, y))
    x, y = toy_data()
    given = {"second_phase": mode, "epochs": 6, "tau": 3, "verify": "auto", **settings}
    return quiet(toy_mlp(), folder, **given).fit((x, y), (x[:20], y[:20]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs by name; never changed by a test."""
    root = tmp_path_factory.mktemp("runs")
    for mode in ("gd", "sgd", "base", "none"):
        fit(root / mode, mode)
    result = fit(root / "copies", images=True)
    culprit_picture(toy_images(30)[0], result.verdict.culprits, root / "copies" / "culprits.png")
    lazy = {"smoothness": 1e4}
    fit(root / "lazy", "lazy", lazy=lazy)
    fit(root / HOSTILE, "gd")
    (root / HOSTILE / "options.yaml").write_text(
        "data_name: </style><img src=x onerror=alert(1)>\n"
    )
    return root


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of a run, to be damaged."""
    return lambda name: shutil.copytree(runs / name, tmp_path / name)


ALL = ["gd", "sgd", "base", "none", "copies", "lazy", HOSTILE]


@pytest.mark.parametrize(
    "names", [*([name] for name in ALL), ALL], ids=lambda names: str(len(names))
)
def test_well_formed_self_contained_and_accessible(runs, tmp_path, names):
    out = tmp_path / "r.html"
    found = report(*(runs / name for name in names), out=out)
    text = out.read_text(encoding="utf-8")
    assert len(found.ids) == len(set(found.ids))
    kinds = [tag for tag, _ in found.elements]
    assert not {"script", "iframe", "object", "base", "form", "style"} & set(kinds) - {"style"}
    assert kinds.count("style") == 1 and "@import" not in text and "://" not in text
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, found.ids[0]) in found.ids
        for name in ("href", "src"):
            target = attributes.get(name, "data:")
            assert target.startswith("data:") or (target[0] == "#" and target[1:] in found.ids)
        for target in re.findall(r"url\((.*?)\)", " ".join(attributes.values())):
            assert target[0] == "#" and target[1:] in found.ids
        if attributes.get("role") == "img":
            assert tag == "svg" and {"aria-labelledby", "aria-describedby"} <= attributes.keys()
        if tag == "img":
            assert len(attributes["alt"]) > 10
    assert ("html", {"lang": "en"}) in found.elements
    assert any(a.get("name") == "viewport" for t, a in found.elements if t == "meta")
    assert all(kinds.count(tag) == 1 for tag in ("header", "main", "footer", "nav"))
    assert found.elements.count(("title", {})) == 1  # those of charts have an id
    levels = [level for level, _ in found.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert kinds.count("figure") >= len(names)


def test_numbers_are_those_of_the_files(runs):
    folder = runs / "gd"
    found = report(folder, out=runs / "gd.html")
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    shown = found.table("epoch")
    assert len(shown) == len(rows) == 6
    columns = ["epoch", "phase", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    for cells, row in zip(shown, rows, strict=True):
        expected = [float(row[name]) for name in [*columns, "learning_rate", "seconds"]]
        assert [float(cell) for cell in cells[:7]] == pytest.approx(expected[:7], rel=5e-6)
        assert float(cells[7]) == pytest.approx(expected[7], rel=5e-4)
    points = list(csv.DictReader((folder / "guarantee.csv").read_text().splitlines()))
    for cells, point in zip(found.table("steps since tau"), points, strict=True):
        expected = [float(point[name]) for name in ("steps", "bound", "loss")]
        assert [float(cell) for cell in cells] == pytest.approx(expected, rel=5e-6)
    result = json.loads((folder / "result.json").read_text())
    pairs = dict(found.pairs)
    for stage, seconds in result["timings"].items():
        assert float(pairs[page.STAGES[stage]]) == pytest.approx(seconds, rel=5e-4)
    verdict = tp.Verdict.load(folder / "verdict.json")
    assert pairs["status"] == verdict.status == "proved" and pairs["rank, counted"] == "60"
    assert (pairs["samples n"], pairs["width m_H"]) == ("60", "80")
    lower = float(pairs["sigma_min of [h_X, 1], proved"].removeprefix("≥ "))
    assert 0.999 * verdict.sigma_min_lower < lower <= verdict.sigma_min_lower
    for line in str(verdict).splitlines():
        if line.strip().startswith("assumed:"):  # a list of its own on the page
            assert all(assumption in found.text for assumption in verdict.assumptions)
            continue
        assert line.strip()[1:] in found.text
    assert float(pairs["L_H"]) == pytest.approx(result["guarantee"]["constants"]["L_H"], rel=5e-6)
    config = json.loads((folder / "config.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    for name, value in [*words.flat(config), *words.flat(environment)]:
        assert (name, value) in found.pairs
    assert pairs["tau_epoch"] == "3" and pairs["optimizer.groups[0].momentum"] == "0.9"
    for text in (f"{result['final']['train_loss']:.4g}", environment["torch"], "60 samples"):
        assert text in found.text


@pytest.mark.parametrize("name", ["gd", "sgd", "base", "none", "copies", "lazy"])
def test_every_premise_with_word_and_symbol(runs, name):
    found = report(runs / name, out=runs / f"{name}.html")
    result = json.loads((runs / name / "result.json").read_text())
    premises = result["guarantee"]["premises"]
    assert len(premises) >= 5
    assert found.table("premise") == [
        [what, f"{words.SYMBOLS[state]} {state}", why] for what, state, why in premises
    ]


def test_the_answer(runs, copied):
    text = report(runs / "gd", out=runs / "gd.html").text
    assert "The guarantee held, and every premise held. Theorem 1 bounds the training loss" in text
    assert "after 3 steps" in text and "proved at these weights" in text
    assert (
        "No bound of Theorem 1 is claimed for this run: of 12 premises, 3 failed"
        in report(runs / "base", out=runs / "base.html").text
    )
    assert "on average over the draws" in report(runs / "sgd", out=runs / "sgd.html").text
    copies = report(runs / "copies", out=runs / "copies.html").text
    assert "rank [h_X', 1] = N = 29 distinct inputs of n = 30" in copies
    assert "1 group of repeated inputs, 1 with targets that disagree" in copies
    assert "Samples 8, 12 have equal inputs" in copies
    folder = copied("gd")
    rows = (folder / "guarantee.csv").read_text().splitlines()
    steps, _, bound, comparator = rows[-1].split(",")
    rows[-1] = f"{steps},{2 * float(bound)!r},{bound},{comparator}"
    (folder / "guarantee.csv").write_text("\n".join(rows))
    text = report(folder).text
    assert "The guarantee held" not in text and "above the bound at 1 of 4 points" in text
    result = json.loads((runs / "gd" / "result.json").read_text())
    result["guarantee"]["premises"][5][1] = "not checked"
    (folder / "result.json").write_text(json.dumps(result))
    shutil.copy(runs / "gd" / "guarantee.csv", folder)
    text = report(folder).text
    assert "premises that are not established: of 14 premises, 1 was not checked" in text


def test_what_is_missing_is_said(copied):
    folder = copied("gd")
    said = {
        "result.json": [
            "unfinished: there is no result.json",
            "not known before the run has ended",
        ],
        "verdict.json": ["There is no verdict.json", "Not known without a verdict"],
        "environment.json": ["there is no environment.json"],
        "guarantee.csv": ["no guarantee.csv"],
        "metrics.csv": ["metrics.csv has no row", "No loss is recorded", "No time is recorded"],
    }
    before = report(folder).text
    for name, sentences in said.items():
        (folder / name).unlink()
        found = report(folder)
        for sentence in sentences:
            assert sentence not in before and sentence in found.text
        before = found.text
    assert [text for _, text in found.headings[1:]] == [
        "Curves",
        "Expressivity condition",
        "Premises of Theorem 1",
        "Configuration",
        "Time",
        "Samples in the way",
        "Environment",
    ]


def test_what_cannot_be_read_is_said(copied):
    folder = copied("gd")
    (folder / "verdict.json").write_text(
        (folder / "verdict.json").read_text().replace('"n": 60', '"n": 61')
    )
    (folder / "result.json").write_text("{")
    (folder / "metrics.csv").write_text("epoch,phase\n0,1\n")
    (folder / "environment.json").write_text("[]")
    text = report(folder).text
    assert re.search("verdict.json cannot be read: [^.]*.json has been changed since", text)
    assert "Status: unknown: result.json cannot be read" in text
    assert "metrics.csv cannot be read: expected numbers in the columns epoch, phase" in text
    assert "environment.json cannot be read: expected a mapping, got list" in text


def test_an_interrupted_run(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", callbacks=(End(1, by=KeyboardInterrupt),))
    found = report(tmp_path / "run")
    assert "metrics.csv has 2 of 6 epochs" in found.text
    assert "tau: not marked" in found.text and "tau" not in found.svg_text
    assert "In the last recorded epoch, 1, the mean training loss was" in found.text


def test_no_run_is_an_error(runs, tmp_path, capsys):
    out = tmp_path / "r.html"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="runs: expected at least one run folder, got none"):
        write_report([], out)
    for path, message in [
        (tmp_path / "nowhere", f"runs: {tmp_path / 'nowhere'} is no folder"),
        (tmp_path / "empty", f"runs: {tmp_path / 'empty'} is no run folder: it holds no config"),
    ]:
        with pytest.raises(FileNotFoundError) as error:
            write_report([runs / "gd", path], out)
        assert str(error.value).startswith(message)
        assert twophase.cli.main(["report", str(path), "--out", str(out)]) == 2
        captured = capsys.readouterr().err
        assert message in captured and captured.count("\n") == 1
    (tmp_path / "empty" / "config.json").write_text("not JSON")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        write_report([tmp_path / "empty"], out)
    (tmp_path / "empty" / "config.json").write_text('{"model": "a", "n": 1, "width": 1}')
    with pytest.raises(ValueError, match="is not of a run: it lacks loss, epochs, tau_epoch"):
        write_report([tmp_path / "empty"], out)
    (tmp_path / "empty" / "config.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99, this version reads up to 1"):
        write_report([tmp_path / "empty"], out)
    config = json.loads((runs / "gd" / "config.json").read_text())
    assert config["format"] == 1
    assert not out.exists()


def test_the_command_line(copied, tmp_path, monkeypatch, capsys):
    folder = copied("gd")
    assert twophase.cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    first = (folder / "report.html").read_bytes()
    assert twophase.cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == first  # the same page of the same run
    monkeypatch.chdir(tmp_path)
    assert twophase.cli.main(["report", "gd", "gd", "--out", "two.html"]) == 0
    assert "2 runs" in (tmp_path / "two.html").read_text(encoding="utf-8")


def test_strings_come_out_as_text(runs):
    found = report(runs / HOSTILE, out=runs / "hostile.html")
    assert found.headings[0][1] == f"Two-phase training: {HOSTILE}"
    assert not any(tag in ("script", "img") for tag, _ in found.elements)
    assert ("data_name", "</style><img src=x onerror=alert(1)>") in found.pairs
    both = report(runs / HOSTILE, runs / "gd", out=runs / "hostile.html")
    assert both.text.count(HOSTILE) >= 5 and "script" not in [tag for tag, _ in both.elements]


def test_several_runs(runs, tmp_path):
    names = ["gd", "sgd", "base", "copies"]
    found = report(*(runs / name for name in names), out=tmp_path / "r.html")
    assert "4 runs, 4 completed. The guarantee: gd (held), sgd (bound met), base (no" in found.text
    table = {row[0]: row for row in found.table("run")}
    assert list(table) == names
    losses = {}
    for name in names:
        final = json.loads((runs / name / "result.json").read_text())["final"]
        losses[name] = final["train_loss"]
        assert float(table[name][4]) == pytest.approx(losses[name], rel=5e-4)
    lowest = min(losses, key=losses.get)
    assert f"{losses[lowest]:.4g}, is that of {lowest}." in found.text
    settings = {row[0]: row[1:] for row in found.table("setting")}
    assert settings["second_phase"] == ["gd", "sgd", "base", "base"]
    assert settings["n"] == ["60", "60", "60", "30"] and "loss" not in settings
    assert [text for level, text in found.headings if level == 2] == ["Comparison", *names]
    lazy = report(runs / "gd", runs / "gd", out=tmp_path / "r.html")
    assert lazy.table("run")[0][0] == str(runs / "gd")  # the name alone would not tell them apart
    assert "Every setting in config.json is the same" in lazy.text


def test_lines_differ_in_more_than_colour():
    lines = [curves.Line.numbered(i, str(i), []) for i in range(24)]
    assert len({(line.colour, line.dash) for line in lines}) == 24
    assert all(a.dash != b.dash for a, b in pairwise(lines))


def test_culprits_are_named_and_shown(runs, copied):
    found = report(runs / "copies", out=runs / "copies.html")
    assert "3, 17, 21" in found.text and "5, 9" in found.text
    (image,) = [attributes for tag, attributes in found.elements if tag == "img"]
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    assert data == (runs / "copies" / "culprits.png").read_bytes()
    assert "3, 17, 21; 5, 9" in image["alt"]
    folder = copied("copies")
    (folder / "culprits.png").unlink()
    found = report(folder)
    assert "No picture: the folder holds no culprits.png" in found.text and "3, 17" in found.text


def test_charts_take_the_pages_colours_and_say_their_ends(runs):
    write_report([runs / "gd"], runs / "gd.html")
    text = (runs / "gd.html").read_text(encoding="utf-8")
    charts = re.findall(r'<svg viewBox="[^"]*" class="chart".*?</svg>', text, re.DOTALL)
    assert len(charts) == 3
    record = read_folder(runs / "gd")
    for chart in charts:
        assert not re.search("#[0-9a-fA-F]{6}|font-family|font:", chart)
        assert "var(--line-0)" in chart and "currentColor" in chart and "<text" in chart
        assert "fill: #" not in chart and "white" not in chart
    first, last = record.history[0]["train_loss"], record.history[-1]["train_loss"]
    assert f"training: {first:.4g} at epoch 0, {last:.4g} at epoch 5." in charts[0]
    assert "tau before epoch 3." in charts[0] and ">tau<" in charts[0] and ">tau<" in charts[1]
    bound = record.curve[-1]["bound"]
    assert f"{bound:.4g} at step 3." in charts[2] and ">tau<" not in charts[2]


def test_values_that_are_not_finite(copied):
    folder = copied("base")
    rows = (folder / "metrics.csv").read_text().splitlines()
    cells = rows[-1].split(",")
    rows[-1] = ",".join([*cells[:2], "inf", cells[3], "nan", *cells[5:]])
    (folder / "metrics.csv").write_text("\n".join(rows))
    found = report(folder)
    assert found.table("epoch")[-1][2] == "inf"
    assert found.svg_text.count("1 of its values are not finite and not drawn.") == 2
    only = [curves.Line("a", [(0, float("nan"))])]
    assert curves.chart("c", "t", only, xlabel="x", ylabel="y") is None


def test_long_runs_are_thinned_and_say_so(copied):
    folder = copied("base")
    head, *rows = (folder / "metrics.csv").read_text().splitlines()
    cells = rows[0].split(",")
    rows = [",".join([str(i), *cells[1:]]) for i in range(1000)]
    (folder / "metrics.csv").write_text("\n".join([head, *rows]))
    found = report(folder)
    epochs = [int(row[0]) for row in found.table("epoch")]
    assert len(epochs) == 200 and (epochs[0], epochs[-1]) == (0, 999)
    assert len(set(epochs)) == 200 and epochs == sorted(epochs)
    assert "200 of 1000 rows of metrics.csv" in found.text


def test_shown_bounds_stay_bounds():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator, dtype=torch.float64).mul(20).sinh().tolist()
    for value in [*values, 0.0, 1.0, -1.0, 5e-324]:
        below, above = float(bound_text(value)), float(bound_text(value, upper=True))
        assert below <= value <= above
        assert above - below <= 2e-3 * abs(value)
    assert bound_text(float("inf")) == "inf"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast(runs):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    write_report([runs / "gd"], runs / "gd.html")
    style = (runs / "gd.html").read_text(encoding="utf-8").partition("</style>")[0]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    for block in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        assert len(colours) == 11
        for name, colour in colours.items():
            if name not in ("paper", "rule"):
                assert contrast(colour, colours["paper"]) >= 4.5, name
