"""The tile engine's plans, passes, stages and stores."""

import pytest
import torch

from twophase_ext.linalg import plan as plan_module
from twophase_ext.linalg.certificate import certify_gram
from twophase_ext.linalg.gram_tiles import MatrixSource
from twophase_ext.linalg.plan import plan
from twophase_ext.linalg.tiles import Grid, TileFile

CPU = torch.device("cpu")


def normal(n, p):
    return torch.randn(n, p, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_stages_and_say():
    lines = []
    c = certify_gram(MatrixSource(normal(90, 120)), tile=32, say=lines.append)
    names = [stage["name"] for stage in c.stages]
    assert any(name.startswith("Gram") for name in names)
    assert any(name.startswith("Cholesky") for name in names)
    gram = next(stage for stage in c.stages if stage["name"] == "Gram")
    assert gram["tiles"] == 6 and gram["flops"] >= 90 * 90 * 120 and gram["gflops"] > 0
    assert lines and "n = 90" in lines[0]
    assert c.constants()["ell"] == c.ell and c.peak_bytes > 1 << 20


def test_arguments():
    source = MatrixSource(normal(4, 6))
    with pytest.raises(ValueError, match="shift: expected a positive number, got -1"):
        certify_gram(source, shift=-1)
    with pytest.raises(ValueError, match="passes: expected 1 or more, got 0"):
        certify_gram(source, passes=0)
    with pytest.raises(ValueError, match="tile: expected 1 or more, got 0"):
        certify_gram(source, tile=0)
    with pytest.raises(ValueError, match="n: expected 1 or more, got 0"):
        certify_gram(MatrixSource(torch.zeros(0, 3)))


# --- storage and plans


def test_grid_and_file(tmp_path):
    grid = Grid(37, 10)
    assert grid.count == 4 and len(list(grid.lower())) == 10
    shapes = [grid.shape(i, j) for i, j in grid.lower()]
    assert 8 * sum(r * c for r, c in shapes) == grid.bytes
    assert [grid.index(i, j) for i, j in grid.lower()] == list(range(10))
    file = TileFile(tmp_path / "t", grid, 2)
    tiles = {(k, i, j): normal(*grid.shape(i, j)) + k for k in (0, 1) for i, j in grid.lower()}
    for place, tile in tiles.items():
        file.write(*place, tile)
    assert all(torch.equal(file.read(*place), tile) for place, tile in tiles.items())
    again = TileFile(tmp_path / "t", grid, 2)
    assert torch.equal(again.read(1, 3, 3), tiles[1, 3, 3])


def test_plan_at_sixty_thousand(monkeypatch, tmp_path):
    def plan_with(gib, disk=100, **settings):
        monkeypatch.setattr(plan_module, "available_memory", lambda d: int(gib * 2**30 / 0.9))
        usage = type("Usage", (), {"free": disk * 10**9})
        monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda folder: usage)
        return plan(60_000, 66_001, rate=1e11, **settings)

    p = plan_with(20, folder=tmp_path)
    assert (p.gram, p.factor, p.passes, p.tile) == ("file", "host", 1, 2080)
    assert p.host_bytes < 18 * 2**30 and p.disk_bytes == pytest.approx(30e9, rel=0.05)
    assert p.flops == pytest.approx(2.4e14 + 7.2e13, rel=0.1) and p.seconds == p.flops / 1e11
    assert "GiB of disk" in str(p) and "min" in str(p)
    p = plan_with(10, folder=tmp_path)
    assert (p.gram, p.factor) == ("file", "file") and p.passes == 3 and p.host_bytes < 10 * 2**30
    p = plan_with(40)
    assert (p.gram, p.factor, p.disk_bytes) == ("host", "host", 0) and p.host_bytes < 40 * 2**30
    with pytest.raises(MemoryError, match=r"60000 rows need 31.5 GiB of host; there are 20 GiB"):
        plan_with(20)
    with pytest.raises(MemoryError, match=r"GiB of file; there are 20 GiB of host, 18.6 GiB of f"):
        plan_with(20, disk=20, folder=tmp_path)


def test_little_memory_gives_the_same_bits(tmp_path):
    m = normal(60, 80)
    plain = certify_gram(MatrixSource(m), tile=16, panel=32)
    work = 8 * (3 * 60 * 32 + 60 * 16 + 4 * 256)
    c = certify_gram(
        MatrixSource(m), tile=16, panel=32, folder=tmp_path, key="m", memory=work + 5 * 8 * 256
    )
    assert c.storage == {"gram": "file", "factor": "file"} and c.passes in (2, 3)
    assert (c.ell, c.e_C, c.logdet_lower) == (plain.ell, plain.e_C, plain.logdet_lower)
