"""The tile engine killed (SIGKILL), torn, interrupted: what it resumes and what it refuses."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twophase_ext.linalg.certificate import certify_gram
from twophase_ext.linalg.gram_tiles import MatrixSource
from twophase_ext.linalg.journal import RecordedTiles
from twophase_ext.linalg.tiles import Grid, TileFile

N, P, TILE = 90, 130, 16  # 6 tile columns, 21 tiles


pytestmark = pytest.mark.usefixtures("one_thread")


def matrix():
    g = torch.Generator().manual_seed(5)
    return torch.randn(N, P, generator=g, dtype=torch.float64)


def certify(folder: Path, **settings):
    settings = {"key": "m", "tile": TILE, "panel": 32, "passes": 6, **settings}
    return certify_gram(MatrixSource(matrix()), folder=folder, **settings)


def lines(folder):
    return [json.loads(line) for line in (folder / "tiles.journal").read_text().splitlines()]


def tiles_in(folder, name):
    return [(r[1], r[2]) for r in lines(folder) if r[0] == name]


def facts(c):
    return {k: v for k, v in c.constants().items() if k not in ("passes", "storage")}


def computed(c, stage):
    return next(s["tiles"] for s in c.stages if s["name"].startswith(stage))


def die_at(write: int, torn: bool) -> None:
    """SIGKILL at the given tile written: whole, or with half of it in the file and no line."""
    original, count = RecordedTiles.write, [0]

    def counted(self, i, j, tile, note=0.0):
        if count[0] == write:
            if torn:
                self._file.write(i, j, torch.cat([tile[:4], tile[4:] * 0]))
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        original(self, i, j, tile, note)

    RecordedTiles.write = counted


if __name__ == "__main__":  # no thread has started here, so a fork is safe
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    report = {"whole": facts(certify(root / "whole")), "kills": []}
    for write in (0, 9, 14, 12, 6):  # in each run, after what was restored
        child = os.fork()
        if child == 0:
            die_at(write, torn=write % 2 == 0)
            certify(root / "killed")
            os._exit(0)
        killed = os.WTERMSIG(os.waitpid(child, 0)[1])
        made = {name: tiles_in(root / "killed", name) for name in ("G", "L1")}
        report["kills"].append({"signal": killed, "made": made})
    last = certify(root / "killed")
    report |= {"last": facts(last), "gram": computed(last, "Gram")}
    report |= {"factor": computed(last, "Cholesky")}
    (root / "report.json").write_text(json.dumps(report))
    os._exit(0)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    for name in ("whole", "killed"):
        (root / name).mkdir()
    subprocess.run([sys.executable, __file__, str(root)], check=True, timeout=100)
    return root


def test_a_killed_run_ends_with_the_same_bits(killed):
    report = json.loads((killed / "report.json").read_text())
    assert [kill["signal"] for kill in report["kills"]] == [signal.SIGKILL] * 5
    assert report["last"] == report["whole"] and report["whole"]["status"] == "proved"
    whole, again = (TileFile(killed / name / "tiles.bin", Grid(N, TILE), 2)
                    for name in ("whole", "killed"))  # fmt: skip
    for region in (0, 1):
        for i, j in Grid(N, TILE).lower():
            assert torch.equal(whole.read(region, i, j), again.read(region, i, j))


def test_nothing_recorded_is_computed_twice(killed):
    report = json.loads((killed / "report.json").read_text())
    for name, stage in (("G", "gram"), ("L1", "factor")):
        made = tiles_in(killed / "killed", name)
        assert len(made) == len(set(made)) == 21
        before = len(report["kills"][-1]["made"][name])
        assert report[stage] == 21 - before
    counts = [len(kill["made"]["G"]) + len(kill["made"]["L1"]) for kill in report["kills"]]
    assert counts == [0, 9, 23, 35, 41]  # each kill lost the tile it was writing, or none


def spoil(folder, region, i, j):
    file = TileFile(folder / "tiles.bin", Grid(N, TILE), 2)
    tile = file.read(region, i, j)
    tile[1, 1] += 1e-3
    file.write(region, i, j, tile)


def test_torn_tiles_are_found_and_made_again(tmp_path):
    whole = certify(tmp_path)
    done = certify(tmp_path)
    assert facts(done) == facts(whole)
    assert computed(done, "Gram") == computed(done, "Cholesky") == 0
    spoil(tmp_path, 0, 3, 1)
    spoil(tmp_path, 1, 5, 4)
    again = certify(tmp_path)
    assert facts(again) == facts(whole)
    assert computed(again, "Gram") == 1
    assert computed(again, "Cholesky") == 2  # and the last column, made from it
    spoil(tmp_path, 1, 0, 0)
    again = certify(tmp_path)
    assert facts(again) == facts(whole) and computed(again, "Cholesky") == 21


def test_what_was_made_from_a_torn_tile_stays_forgotten(tmp_path):
    """A second kill, just after the torn column was mended, must not bring back what follows it."""
    certify(tmp_path)
    spoil(tmp_path, 1, 2, 1)

    class Stop(Exception):
        pass

    original = RecordedTiles.write

    def once(self, i, j, tile, note=0.0):
        original(self, i, j, tile, note)
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(RecordedTiles, "write", once)
        certify(tmp_path)
    assert computed(certify(tmp_path), "Cholesky") == 4 + 3 + 2 + 1


def test_torn_last_line(tmp_path):
    whole = certify(tmp_path)
    path = tmp_path / "tiles.journal"
    text = path.read_bytes()
    path.write_bytes(text[:-9])
    again = certify(tmp_path)
    assert facts(again) == facts(whole) and computed(again, "Cholesky") == 1
    assert path.read_bytes() == text


def test_interrupt_leaves_a_state_to_resume(tmp_path):
    original, count = RecordedTiles.write, [0]

    def interrupted(self, i, j, tile, note=0.0):
        count[0] += 1
        if count[0] == 30:
            raise KeyboardInterrupt
        original(self, i, j, tile, note)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecordedTiles, "write", interrupted)
        certify(tmp_path)
    again = certify(tmp_path)
    assert again.proved and computed(again, "Gram") == 0
    assert computed(again, "Cholesky") == 21 - (29 - 21)


def test_failed_attempts_are_not_repeated(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twophase_ext.linalg.gram_run.extrapolated", lambda *x: 1e3)
        whole = certify(tmp_path)
        again = certify(tmp_path)
    assert whole.proved and whole.attempts >= 2
    assert facts(again) == facts(whole)
    assert len([s for s in again.stages if s["name"].startswith("Cholesky")]) == 1


def test_another_computation_is_refused(tmp_path):
    certify(tmp_path)
    with pytest.raises(ValueError, match="key is 'm' there, 'other' here"):
        certify(tmp_path, key="other")
    with pytest.raises(ValueError, match=r"shift is None there, 0\.1 here"):
        certify(tmp_path, shift=0.1)
    with pytest.raises(ValueError, match="tile is 16 there, 8 here"):
        certify(tmp_path, tile=8)
    with pytest.raises(ValueError, match="columns is 130 there, 129 here"):
        certify_gram(MatrixSource(matrix()[:, 1:]), folder=tmp_path, key="m", tile=TILE, panel=32)
    with pytest.raises(ValueError, match="key: expected"):
        certify_gram(MatrixSource(matrix()), folder=tmp_path)
    assert computed(certify(tmp_path), "Gram") == 0  # a refusal leaves the state
    c = certify(tmp_path, key="other", resume=False)
    assert c.proved and computed(c, "Gram") == 21


def test_two_processes_do_not_share_a_folder(tmp_path):
    with open(tmp_path / "tiles.journal", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process"):
            certify(tmp_path)
    assert certify(tmp_path).proved
