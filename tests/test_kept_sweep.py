"""A sweep that is killed goes on from its folder, to the same bits; a file that lies is refused."""

import pytest
import torch

from test_triangular import SOFTPLUS, samples
from twophase_ext.expressivity import kept, kinks
from twophase_ext.expressivity.witness import whiten
from twophase_ext.linalg import progress

N = 700


class Killed(BaseException):
    """As a signal would."""


def sweep(folder=None, blocks=None, z=None):
    z = samples(N, 6) if z is None else z  # few directions: many neurons are on at other samples
    errors = torch.full((len(z),), 1e-14, dtype=torch.float64)
    seen = []

    def advance(count):
        seen.append(count)
        if len(seen) == blocks:
            raise Killed

    found = kinks.local_kinks(
        z, whiten(z, errors, torch.float64), torch.float64, SOFTPLUS, advance, folder=folder
    )
    return found, seen


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A folder with three of seven blocks in it."""
    monkeypatch.setattr(kept, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(kinks, "SMALL_BLOCK", 96)
    with pytest.raises(Killed):
        sweep(tmp_path, 4)
    return tmp_path


def same(one, two):
    for name in ("weight", "bias", "gaps", "order"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert torch.equal(one.near.rows, two.near.rows) and one.near.offending == two.near.offending
    assert torch.equal(one.near.columns, two.near.columns) and len(one.near.rows) > N


def test_a_sweep_goes_on_where_it_was_killed(stopped):
    with open(next(stopped.glob("*-weight.bin")), "ab") as file:
        file.write(b"torn")  # killed while rows were written: what is done stays as it is
    whole, _ = sweep()
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    found, seen = sweep(stopped)
    same(found, whole)
    assert torch.equal(torch.get_rng_state(), drawn)  # nothing of the caller's generator is used
    assert seen[0] == 3 * 96 and sum(seen) == N
    again, seen = sweep(stopped)
    same(again, whole)
    assert seen == [N]


def test_another_sweep_has_files_of_its_own(stopped):
    z = samples(N, 6, seed=1)
    found, seen = sweep(stopped, z=z)
    assert len(seen) == 8 and len(list(stopped.glob("sweep-*.pt"))) == 2
    same(found, sweep(z=z)[0])


@pytest.mark.parametrize("what", ["rows", "state", "pairs"])
def test_files_that_lie_are_refused(stopped, what):
    path = next(stopped.glob("*-weight.bin" if what == "rows" else "sweep-*.pt"))
    if what == "pairs":  # a whole file that forgets where neurons are on
        state = torch.load(path, weights_only=True)
        key = state.pop("key")
        del state["checksum"]
        kept.write_state(path, key, {**state, "pairs": state["pairs"][:0]})
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    message = {"rows": "checksum", "state": "folder: ", "pairs": "another one"}[what]
    with pytest.raises(ValueError, match=message):
        sweep(stopped)


def test_a_long_stage_says_what_is_left(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "EVERY", -1.0)
    with progress.Stages(False, said.append).stage("sweep", 8, "samples") as stage:
        stage.advance(2)
        stage.advance(6)  # all of it: nothing is left to say
    assert said[0].startswith("sweep: 25%, about 0 min left") and len(said) == 1


def test_a_plan_is_said_once():
    said = []
    stages = progress.Stages(False, said.append)
    for plan, when in (("1 GiB", "after the features: "), ("1 GiB", ""), ("2 GiB", "")):
        stages.announce(plan, when)
    assert said == ["after the features: 1 GiB", "2 GiB"]
