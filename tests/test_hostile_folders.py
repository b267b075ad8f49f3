"""Folders and certificates of somebody else: strings are text, links lead nowhere.

What is the reader's own (the folder that he names, a file that he names) may be a link.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import twophase_ext as tp
from helpers import quiet, toy_data, toy_mlp
from interrupts import End
from report_page import Page, report
from twophase.figures import run_figure
from twophase.report import write_report
from twophase.reproduce import cells
from twophase.verification import verify
from twophase_ext.core.files import inside, write_atomically
from twophase_ext.training.persistence import checkpoint

SECRET = b"epoch,phase,train_loss,seconds\n41178,1,0.5,1\n"  # of another folder
PAYLOADS = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)><a href='javascript:alert(1)'>x</a>",
    "</style></title></desc></svg><svg onload=alert(1)><foreignObject>]]><!--",
    'javascript:alert(1) " onmouseover="alert(1)" style=\'x:expression(1)\' {{ 7 * 7 }}',
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder with a bound, a verdict and every file that a report reads."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    x, y = toy_data()
    settings = {"second_phase": "gd", "epochs": 4, "tau": 2, "verify": "auto"}
    quiet(toy_mlp(), folder, **settings).fit((x, y), (x[:20], y[:20]))
    options = {"data_name": "digits", "model": "small", "n": 5, "width": 2, "ratio": 1.1, "seed": 1}
    (folder / "options.yaml").write_text(yaml.safe_dump(options))
    shutil.copy(
        Path(__file__).parent.parent / "bench/results/reproduce-small/figure2.png",
        folder / "culprits.png",
    )
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def outside(tmp_path):
    """A folder beside the run's; nothing in it may change."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_bytes(SECRET)
    yield folder
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"file": SECRET}


# ---- strings


def poisoned(value, payload: str):
    """Every string replaced, and one more key and value in every mapping."""
    if isinstance(value, dict):
        numbers = value and all(isinstance(v, int | float) for v in value.values())
        more = {payload: 1.5 if numbers else payload}
        return {k: poisoned(v, payload) for k, v in value.items()} | more
    if isinstance(value, list):
        return [poisoned(v, payload) for v in value]
    return payload if isinstance(value, str) else value


@pytest.fixture(scope="module")
def clean(finished):
    return report(finished), report(finished, finished)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_string_comes_out_as_text(folder, clean, payload):
    for name in ("config.json", "environment.json", "result.json"):
        given = json.loads((folder / name).read_text())
        text = poisoned(given, payload)
        if name == "result.json":  # the audit has the fields that it has
            del text["guarantee"][payload]
        (folder / name).write_text(json.dumps(text))
    options = yaml.safe_load((folder / "options.yaml").read_text())
    (folder / "options.yaml").write_text(yaml.safe_dump(poisoned(options, payload)))
    verdict = tp.Verdict.load(folder / "verdict.json")
    fields = poisoned(verdict.as_dict(), payload)
    del fields[payload]
    fields |= {"status": "proved", "culprits": [[3, 7]], "explanation": [payload]}
    fields |= {"assumptions": [payload], "hashes": {payload: payload}, "reason": payload}
    tp.Verdict(**fields).save(folder / "verdict.json")
    for name in ("metrics.csv", "guarantee.csv"):
        head, *rows = (folder / name).read_text().splitlines()
        cell = '"' + payload.replace('"', '""') + '"'
        (folder / name).write_text("\n".join(f"{line},{cell}" for line in [head, *rows]))
    hostile = folder.with_name(payload.replace("/", "|"))
    folder.rename(hostile)
    for runs, expected in zip(([hostile], [hostile, hostile]), clean, strict=True):
        found = report(*runs)
        check(found, expected)
        drawn = [[tag for tag, _ in page.elements].count("svg") for page in (found, expected)]
        assert drawn[0] == drawn[1] > 3
        assert found.text.count(" ".join(payload.split())) > 20


def check(found: Page, clean: Page) -> None:
    """The elements and attributes of the clean page, no others, and no address but its own."""
    tags = {tag for tag, _ in clean.elements}
    assert {tag for tag, _ in found.elements} <= tags | {"img", "ol"}
    assert not {"script", "iframe", "object", "embed", "form", "base", "foreignobject"} & tags
    known = {name for _, a in clean.elements for name in a} | {"src", "alt", "scope"}
    assert not any(name.startswith("on") for name in known)
    for tag, attributes in found.elements:
        assert attributes.keys() <= known, (tag, attributes)
        for name in ("href", "src", "xlink:href", "action", "style", "content", "id", "d"):
            assert "alert" not in attributes.get(name, ""), (tag, attributes)
        if attributes.get("href", "#")[0] != "#":
            assert (tag, attributes["href"]) == ("link", "data:,")
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    policy = [a["content"] for t, a in found.elements if t == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


# ---- paths


def test_inside(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(root)
    (root / "in").symlink_to("sub")
    (root / "out").symlink_to(tmp_path)
    for name in ("a", "sub/b", "in/c", "sub/../d"):
        assert inside(root, name) == root / name
        assert inside(tmp_path / "link", name) == tmp_path / "link" / name
    for name in ("..", "../root2/a", "sub/../../a", "out", "out/a", "/etc/passwd"):
        with pytest.raises(ValueError, match=f"leads out of {root}, to "):
            inside(root, name)


@pytest.mark.parametrize("name", ["a.json", "a.json.part"])
def test_a_file_is_not_written_through_a_link(tmp_path, outside, name):
    (tmp_path / name).symlink_to(outside / "file")
    write_atomically(tmp_path / "a.json", lambda file: file.write(b"new"))
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert not (tmp_path / "a.json").is_symlink() and not (tmp_path / "a.json.part").exists()


def test_a_report_reads_nothing_outside(folder, outside):
    others = ("checkpoint.pt", "checkpoint.previous.pt", "config.json", "lock")
    names = [f.name for f in folder.iterdir() if f.name not in others]
    assert len(names) == 7
    shutil.copy(folder / "culprits.png", outside / "file")
    for name in names:
        (folder / name).unlink()
        (folder / name).symlink_to(outside / "file")
    (folder / "report.html").symlink_to(outside / "file")
    found = report(folder, out=folder / "report.html")
    for name in names:
        assert f"{name} cannot be read: {folder / name}: leads out of {folder}" in found.text
    assert "41178" not in found.text and "img" not in [tag for tag, _ in found.elements]
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(outside / "file")
    with pytest.raises(ValueError, match=r"config.json cannot be read: .* leads out of"):
        write_report([folder], folder / "report.html")
    with pytest.raises(ValueError, match=r"options.yaml: leads out of"):
        verify(run=str(folder))
    (outside / "file").write_bytes(SECRET)


@pytest.mark.parametrize("name", ["guarantee.csv", "result.json", "metrics.csv"])
def test_a_figure_reads_nothing_outside(folder, outside, name):
    (folder / name).unlink()
    (folder / name).symlink_to(outside / "file")
    with pytest.raises(ValueError, match=f"{name}: leads out of"):
        run_figure(folder)


def test_a_checkpoint_that_is_a_link_is_not_read(tmp_path, outside):
    data, settings = toy_data(), {"epochs": 4, "tau": 2}
    quiet(toy_mlp(), tmp_path / "other", callbacks=[End(1)], **settings).fit(data)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (checkpoint.CURRENT, checkpoint.PREVIOUS, checkpoint.FRESH):
        (folder / name).symlink_to(tmp_path / "other" / checkpoint.CURRENT)
    with pytest.raises(ValueError, match=r"no readable checkpoint.*leads out of"):
        quiet(toy_mlp(), folder, **settings).fit(data, resume=True)
    chosen = tmp_path / "mine.pt"  # a file that the user names may be a link
    chosen.symlink_to(tmp_path / "other" / checkpoint.CURRENT)
    result = quiet(toy_mlp(), **settings).fit(data, resume=chosen)
    assert result.status == "completed"


def test_the_lock_is_no_link(tmp_path, outside):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(outside / "file")
    with pytest.raises((OSError, ValueError)):
        quiet(toy_mlp(), tmp_path / "run").fit(toy_data())


def test_branches_stay_in_their_folder(tmp_path, outside):
    trainer = quiet(toy_mlp(), tmp_path / "run", epochs=3, tau=1)
    for name in ("..", ".", "", "a/b", "../a", str(outside), "trunk", "a/../../b"):
        with pytest.raises(ValueError, match="branches: expected the name of a folder"):
            trainer.branch({name: {}}, toy_data())
    (tmp_path / "run").mkdir()
    for name in ("gd", "trunk"):
        (tmp_path / "run" / name).symlink_to(outside)
        with pytest.raises(ValueError, match=f"{name}: leads out of"):
            trainer.branch({"gd": {}}, toy_data())
        (tmp_path / "run" / name).unlink()
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()


@pytest.mark.parametrize("name", ["tiles.bin", "tiles.journal", "features-*.pt"])
def test_tiles_stay_in_their_folder(tmp_path, outside, name):
    folder = tmp_path / "tiles"
    folder.mkdir()
    if name.startswith("features"):  # named by what they follow from
        settings = {"method": "certificate", "factorization": "gram", "folder": tmp_path}
        tp.verify_expressivity(toy_mlp(), toy_data()[0], **settings)
        name = next(tmp_path.glob(name)).name
    (folder / name).symlink_to(outside / "file")
    with pytest.raises(ValueError, match=f"{name}: leads out of"):
        tp.verify_expressivity(
            toy_mlp(),
            toy_data()[0],
            method="certificate",
            factorization="gram",
            folder=folder,
        )


def trunk(**changes) -> cells.Trunk:
    settings = {"data_set": "digits", "augmentation": False, "seed": 1, "n": 20, "n_test": 20}
    settings |= {"width": 1, "epochs": 2, "branches": {"paper": {}}}
    return cells.Trunk(**settings | changes)


def test_a_cell_stays_in_its_folder(tmp_path, outside):
    root = tmp_path / "root"
    root.mkdir()
    (root / trunk().name).symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of"):
        trunk().run(root, torch.device("cpu"))
    with pytest.raises(ValueError, match="leads out of"):
        trunk(data_set="../x").run(root, torch.device("cpu"))


def test_a_finished_cell_deletes_its_own_checkpoints_alone(tmp_path, monkeypatch):
    folder, stray = tmp_path / trunk().name, tmp_path / "stray"
    for place in (folder / "paper", folder / "trunk", stray):
        place.mkdir(parents=True)
        (place / "checkpoint.pt").touch()
    (folder / "link").symlink_to(stray)

    class Trainer:
        def __init__(self, *_, **__):
            pass

        def branch(self, *_, **__):
            return {}

    monkeypatch.setattr(tp, "Trainer", Trainer)
    monkeypatch.setattr(cells, "build_model", lambda *_, **__: toy_mlp())
    monkeypatch.setattr(cells.data, "load", lambda *_, **__: toy_data(20))
    trunk().run(tmp_path, torch.device("cpu"))
    assert sorted(os.listdir(folder)) == ["cell.json", "link", "paper", "trunk"]
    assert not list(folder.glob("[pt]*/checkpoint*")) and (stray / "checkpoint.pt").exists()
