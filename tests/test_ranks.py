"""Several processes: the result of one process, in float64 to 1e-12."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import twophase_ext as tp
from helpers import quiet, toy_convnet, toy_data, toy_images, toy_mlp
from twophase import runs
from twophase_ext.training import batchnorm, engine
from twophase_ext.training.ranks import joined

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


def start(size, folder, function, timeout=60):
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
        process.join(60)
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


CASES = {
    "base": (2, {}),
    "four ranks": (4, {}),
    "batches of one": (4, {"n": 7, "batch_size": 1}),
    "backbone": (2, {"feature_cache": "backbone"}),
    "disk": (2, {"feature_cache": "disk"}),
    "gd": (2, {"second_phase": "gd", "gd": {"steps": 3}}),
    "gd, backbone": (4, {"second_phase": "gd", "feature_cache": "backbone"}),
    "sgd": (2, {"second_phase": "sgd"}),
    "none": (2, {"second_phase": "none"}),
    "verified": (2, {"verify": "auto"}),
    "squared error": (2, {"loss": "squared_error"}),
    "Adam": (2, {"optimizer": lambda p: torch.optim.Adam(p, 1e-3)}),
    "no momentum": (2, {"optimizer": lambda p: torch.optim.SGD(p, 0.05)}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_result_of_one_process(tmp_path, case):
    size, settings = CASES[case]
    given = data(settings.get("n", N), one_hot="loss" in settings)
    settings = {name: value for name, value in settings.items() if name != "n"}
    one = fit(toy_mlp, given, **settings)

    def by_rank():  # rank 0's weights are everybody's
        return fit(partial(toy_mlp, seed=dist.get_rank()), given, **settings)

    assert_same(one, results(size, tmp_path, by_rank))


def test_the_command_line_writes_once(tmp_path, capfd):
    def train():
        return runs.train(
            "digits", n=60, width=4, epochs=2, verify="off", run_dir=str(tmp_path / "run")
        )

    assert results(2, tmp_path, train) == [0, 0]
    said = capfd.readouterr().out
    assert said.count("report: ") == said.count("run completed after 2 epochs") == 1
    assert (tmp_path / "run" / "report.html").exists()


def test_a_network_without_a_wide_layer_and_a_custom_loss(tmp_path):
    """Columns of h are cut from whole rows; the step of the last layer goes by its gradient."""

    def build():
        torch.manual_seed(3)
        return torch.nn.Sequential(
            torch.nn.Linear(5, 16), tp.nn.Softplus(), torch.nn.Linear(16, 70), torch.nn.Tanh(),
            torch.nn.Linear(70, 3),
        )  # fmt: skip

    loss = tp.ConvexLoss(torch.nn.functional.cross_entropy, 0.5, "own")
    one = fit(build, data(), loss=loss)
    assert_same(one, results(2, tmp_path, lambda: fit(build, data(), loss=loss)))


def test_rounded_features(tmp_path):
    """bfloat16 needs float32, whose own rounding is then the tolerance."""
    settings = {"precision": "float32", "feature_cache": "hidden-bfloat16"}
    one = fit(toy_mlp, data(), **settings)
    assert_same(one, results(2, tmp_path, lambda: fit(toy_mlp, data(), **settings)), 1e-5)


def test_batch_norm_is_recalibrated_over_all_ranks(tmp_path, monkeypatch):
    """Five batches on four ranks; statistics of one process, and of update_bn itself."""
    monkeypatch.setattr(engine, "BATCH", 13)
    model = toy_convnet().double()
    batches = [(x.double(), None) for x in toy_images(N)[0].split(13)]

    def recalibrated():
        ranks, own = joined(), toy_convnet().double()
        batchnorm.recalibrate(own, own, batches[ranks.rank :: ranks.size], ranks)
        return own.state_dict()

    torch.optim.swa_utils.update_bn([x for x, _ in batches], model)
    found = results(4, tmp_path, recalibrated)
    for state in [recalibrated(), *found]:
        for name, value in model.bn.state_dict().items():
            torch.testing.assert_close(state[f"bn.{name}"], value, rtol=1e-12, atol=1e-12)


def test_a_network_with_batch_norm_and_dropout(tmp_path):
    """The first phase is another one (statistics by rank); the rest of the run is exact for it."""
    given = toy_images(N), toy_images(23, seed=1)
    first, second = results(2, tmp_path, lambda: fit(toy_convnet, given, tmp_path / "run"))
    assert_same(first, [first, second])
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    model = toy_convnet().double()
    model.load_state_dict(state["model"])
    model.eval()
    for name, (x, y) in zip(("train", "val"), given, strict=True):
        exact = torch.nn.functional.cross_entropy(model(x.double()), y)
        assert first["final"][f"{name}_loss"] == pytest.approx(float(exact.detach()), rel=1e-12)


def test_the_run_folder_is_written_once_and_printed_once(tmp_path, capfd):
    def noisy():
        trainer = tp.Trainer(toy_mlp(), run_dir=tmp_path / "run", verify=False, epochs=2, tau=1)
        return str(trainer.fit(*data()).run_dir)

    assert results(2, tmp_path, noisy) == [str(tmp_path / "run")] * 2
    assert capfd.readouterr().out.count("noise added") == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint.pt", "checkpoint.previous.pt", "metrics.csv", "result.json"} <= names
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3


class Signal:
    """A signal to one rank, as it fetches the batch of a step or begins a block of the cache."""

    def __init__(self, rank, epoch, batch, number):
        self.rank, self.at, self.number = rank, (epoch, batch), number

    def on_fit_start(self, run):
        steps = run.ranks.sum_

        def sum_(tensor):
            if run.ranks.rank == self.rank and (run.epoch, run.batch) == self.at:
                os.kill(os.getpid(), self.number)
                self.at = None
            return steps(tensor)

        run.ranks.sum_ = sum_


class StopAfter:
    """Ctrl-C at the end of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_end(self, run, record):
        if record["epoch"] == self.epoch:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("at", "reached", "number"),
    [((0, 3), (0, 3), signal.SIGINT), ((2, 0), (2, 8), signal.SIGTERM)],
)
def test_one_rank_told_to_stop_stops_all_and_other_numbers_go_on(tmp_path, at, reached, number):
    given, folder, settings = data(), tmp_path / "run", {"batch_size": 4}
    one = fit(toy_mlp, given, **settings)
    stop = [Signal(1, *at, number)]
    cut = results(
        2, tmp_path / "2", lambda: fit(toy_mlp, given, folder, callbacks=stop, **settings)
    )
    assert [found["status"] for found in cut] == ["interrupted"] * 2
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["batch"]) == reached

    def go_on(callbacks=()):
        model = partial(toy_mlp, seed=5)
        return fit(model, given, folder, resume=True, callbacks=callbacks, **settings)

    assert go_on([StopAfter(2)])["status"] == "interrupted"  # in this process alone
    assert_same(one | {"run_dir": folder}, results(4, tmp_path / "4", go_on))


@pytest.mark.parametrize(("at", "number"), [((1, 2), signal.SIGKILL), ((3, 0), signal.SIGSTOP)])
def test_a_lost_rank_ends_the_run_and_it_resumes(tmp_path, at, number):
    given, folder = data(), tmp_path / "run"
    lost = Signal(1, *at, number)
    timeout = 2 if number == signal.SIGSTOP else 60
    processes = start(
        2, tmp_path / "2", lambda: fit(toy_mlp, given, folder, callbacks=[lost]), timeout=timeout
    )
    for process in processes:
        process.start()
    began = time.monotonic()
    processes[0].join(40)
    assert time.monotonic() - began < 40
    processes[1].kill()
    processes[1].join()
    error = torch.load(tmp_path / "2" / "rank0.pt", weights_only=False)
    assert isinstance(error, RuntimeError)
    assert re.match(
        rf"epoch {at[0]}, step {at[1]}: another process ended or hung \(seen by rank 0 of 2: .+\)\."
        " Start again with resume=True, with any number of processes",
        str(error),
    )
    one = fit(toy_mlp, given)
    assert_same(one, [fit(toy_mlp, given, folder, resume=True)])


def test_torchrun(tmp_path):
    """The Trainer joins by itself; a killed process ends all with the cause told."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    killed = subprocess.run(
        [*command, "2", str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert killed.returncode != 0
    assert "epoch 2, step 0: another process ended or hung (seen by rank 0 of 2" in killed.stderr
    given = data()
    assert_same(fit(toy_mlp, given), [fit(toy_mlp, given, tmp_path / "run", resume=True)])


TRAIN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from helpers import toy_mlp
from test_ranks import Signal, data, fit

fit(toy_mlp, data(), "run", callbacks=[Signal(1, 2, 0, signal.SIGKILL)])
"""

REFUSED = {
    "model: expected no SyncBatchNorm": {"model": "SyncBatchNorm"},
    "model: expected the module itself, got it in Distributed": {"model": "DDP"},
    "second_phase: 'lazy' runs in one process, got 2": {"second_phase": "lazy", "verify": "auto"},
    "feature_cache: expected cached features": {"feature_cache": "none"},
    "optimizer: expected one of .* got Muon": {"optimizer": lambda p: Muon(p)},
    "optimizer: expected no hooks on gradients": {"optimizer": lambda p: hooked(p)},
    "optimizer: expected no hooks on steps": {"optimizer": lambda p: stepping(p)},
    "seed: expected the same in every process, got 0 on rank 0 and 1": {"seed": "rank"},
    "first samples: expected the same": {"data": "rank"},
}


class Muon(torch.optim.SGD):
    pass


def hooked(parameters):
    parameters[0].register_hook(lambda gradient: gradient.clamp(-1, 1))
    return torch.optim.SGD(parameters, 0.1)


def stepping(parameters):
    optimizer = torch.optim.SGD(parameters, 0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize("message", REFUSED)
def test_what_several_processes_do_not_do_is_refused_before_training(tmp_path, message):
    settings = dict(REFUSED[message])

    def refused():
        rank = dist.get_rank()
        if settings.get("seed") == "rank":
            settings["seed"] = rank
        given = toy_data(N, seed=rank if settings.pop("data", None) else 0)
        model = toy_mlp()
        wrapped = settings.pop("model", None)
        if wrapped == "DDP":
            model = torch.nn.parallel.DistributedDataParallel(model)
        elif wrapped:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(toy_convnet())
            given = toy_images(N)
        before = [p.clone() for p in model.parameters()]
        try:
            quiet(model, **settings).fit(given)
        except (ValueError, RuntimeError) as error:
            same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            return str(error), same

    for text, same in results(2, tmp_path, refused):
        assert re.search(message, text) and same


def test_branches_are_refused(tmp_path):
    def refused():
        try:
            quiet(toy_mlp()).branch({"a": {}}, toy_data())
        except ValueError as error:
            return str(error)

    assert "branches: expected one process" in results(2, tmp_path, refused)[0]


def test_hidden_layers_that_differ_after_the_noise_end_the_run(tmp_path):
    class Meddler:
        def on_epoch_end(self, run, record):
            if run.ranks.rank == 1 and record["epoch"] == 1:
                with torch.no_grad():
                    run.network.model[0].bias[0] += 1e-12

    def meddled():
        try:
            fit(toy_mlp, data(), callbacks=[Meddler()])
        except RuntimeError as error:
            return str(error)

    for text in results(2, tmp_path, meddled):
        assert text.startswith("hidden layers after the noise: expected the same in every process")
