"""Several processes: the result of one process, in float64 to 1e-12; what is refused."""

import re
from functools import partial

import pytest
import torch
import torch.distributed as dist

import twophase_ext as tp
from helpers import quiet, toy_convnet, toy_data, toy_images, toy_mlp
from processes import N, assert_same, data, fit, results
from twophase import runs
from twophase_ext.model.network import Network
from twophase_ext.training import batchnorm
from twophase_ext.training.data.samples import Samples
from twophase_ext.training.distributed.ranks import joined

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
    "accumulated, a rate for each step": (
        2,
        {
            "accumulate": 3,
            "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.7),
            "scheduler_interval": "step",
        },
    ),
    "no momentum": (2, {"optimizer": lambda p: torch.optim.SGD(p, 0.05)}),
    "weights, metrics": (
        2,
        {
            "weights": torch.linspace(0.5, 2, N),
            "second_phase": "gd",
            "metrics": {"middle": lambda q, y: q.max(1)[0].median()},  # no mean over parts
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_result_of_one_process(tmp_path, case):
    size, settings = CASES[case]
    given = data(settings.get("n", N), one_hot="loss" in settings)
    if "weights" in settings:
        given = ((*given[0], settings["weights"]), *given[1:])
    settings = {name: value for name, value in settings.items() if name not in ("n", "weights")}
    one = fit(toy_mlp, given, **settings)

    def by_rank():  # rank 0's weights are everybody's
        return fit(partial(toy_mlp, seed=dist.get_rank()), given, **settings)

    assert_same(one, results(size, tmp_path, by_rank))


def test_the_command_line_writes_once(tmp_path, capfd):
    def train():
        return runs.train(
            "digits", n=60, width=4, epochs=2, verify=False, run_dir=str(tmp_path / "run")
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


def test_mixed_precision(tmp_path):
    """A part's gradient is rounded to bfloat16, whose rounding is then the tolerance."""
    settings = {"precision": "bf16-mixed"}
    one = fit(toy_mlp, data(), **settings)
    assert_same(one, results(2, tmp_path, lambda: fit(toy_mlp, data(), **settings)), 4e-3)


def test_batch_norm_is_recalibrated_over_all_ranks(tmp_path, monkeypatch):
    """Five batches on four ranks; statistics of one process, and of update_bn itself."""
    monkeypatch.setattr(batchnorm, "BATCH", 13)
    x, y = toy_images(N)
    model = toy_convnet().double()

    def recalibrated():
        own = toy_convnet().double()
        samples = Samples.of((x, y), name="train", device=x.device, dtype=torch.float64)
        batchnorm.recalibrate_over(Network(own, x[:2].double()), samples, joined())
        return own.state_dict()

    torch.optim.swa_utils.update_bn(x.double().split(13), model)
    for state in [recalibrated(), *results(4, tmp_path, recalibrated)]:
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


REFUSED = {
    "resume: no checkpoint in nowhere": {"resume": "nowhere"},
    "model: expected no SyncBatchNorm": {"model": "SyncBatchNorm"},
    "model: expected the module itself, got it in Distributed": {"model": "DDP"},
    "compile: expected False": {"compile": True},
    "second_phase: 'lazy' runs in one process, got 2": {"second_phase": "lazy", "verify": "auto"},
    "second_phase: 'agd' runs in one process, got 2": {"second_phase": "agd"},
    "second_phase: 'exact' runs in one process, got 2": {"second_phase": "exact"},
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
        resume = settings.pop("resume", None)
        before = [p.clone() for p in model.parameters()]
        try:
            quiet(model, **settings).fit(given, resume=resume)
        except (ValueError, RuntimeError, FileNotFoundError) as error:
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
