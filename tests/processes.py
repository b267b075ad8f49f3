"""Forked processes that form a group, for the tests of several ranks."""

import multiprocessing
import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from helpers import quiet, toy_data

F64 = {"precision": "float64", "epochs": 4, "tau": 2, "batch_size": 16}
N = 61  # a prime: no number of ranks divides it


def _child(rank, size, folder, timeout, function):
    torch.set_num_threads(1)
    store, limit = dist.FileStore(str(folder / "store"), size), timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    try:
        found = function()
    except BaseException as error:
        found = error if isinstance(error, Exception) else RuntimeError(repr(error))
        traceback.print_exc()
    torch.save(found, folder / f"rank{rank}.pt")
    os._exit(0)  # no destructor waits for another rank


def start(size, folder, function, timeout=300):
    """Processes that call the function as ranks of a group."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    return [
        context.Process(target=_child, args=(r, size, folder, timeout, function))
        for r in range(size)
    ]


def results(size, folder, function):
    """What each rank's function returned, or raised."""
    processes = start(size, folder, function)
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(size)]


def fit(build, data, folder=False, resume=None, **settings):
    """One fit, as plain data."""
    model = build()
    result = quiet(model, folder, **{**F64, **settings}).fit(*data, resume=resume)
    return {
        "weights": torch.cat([t.double().flatten() for t in model.state_dict().values()]),
        "history": result.history,
        "final": result.final,
        "status": result.status,
        "hash": result.hidden_hash,
        "curve": getattr(result.guarantee, "curve", []),
        "audit": [tuple(premise[:2]) for premise in result.guarantee.premises],
        "verdict": None if result.verdict is None else result.verdict.status,
        "run_dir": result.run_dir,
        "timings": result.timings,
    }


def data(n=N, one_hot=False):
    given = toy_data(n), toy_data(23, seed=1)
    return [(x, F.one_hot(y, 3).double()) for x, y in given] if one_hot else given


def assert_same(one, many, tolerance=1e-12):
    """All that a Result says, to the tolerance; the ranks' among them exactly."""
    for other in many[1:]:
        assert torch.equal(many[0]["weights"], other["weights"])
        for key in ("history", "final", "status", "hash", "curve", "audit", "verdict", "run_dir"):
            assert many[0][key] == other[key], key
        assert many[0]["timings"] == other["timings"]
    found = many[0]
    torch.testing.assert_close(found["weights"], one["weights"], rtol=tolerance, atol=tolerance)
    assert [found[k] for k in ("status", "audit", "verdict")] == [
        one[k] for k in ("status", "audit", "verdict")
    ]
    for a, b in zip(
        [*found["history"], *found["curve"], found["final"]],
        [*one["history"], *one["curve"], one["final"]],
        strict=True,
    ):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "comparator"}:
            close = (
                pytest.approx(b[key], rel=tolerance, abs=tolerance) if b[key] is not None else None
            )
            assert a[key] == close, key
