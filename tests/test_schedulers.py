"""torch.optim.lr_scheduler in the Trainer: rates, tau, checkpoints, branches."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_data, toy_mlp
from interrupts import End, Killed
from twophase_ext.core.seeds import epoch_order

DATA = toy_data(20)  # 3 steps an epoch
SETTINGS = {"epochs": 6, "tau": 3}
SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda e: 1 / (1 + e)),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [1, 4]),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.05, total_steps=7),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.05, step_size_up=2),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=2), lrs.ExponentialLR(o, 0.7)], [2]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.5, 2), lrs.ExponentialLR(o, 0.7)]
    ),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, threshold=0.2),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def rates(result) -> list[float]:
    return [row["learning_rate"] for row in result.history]


def run(scheduler, folder=False, stop=None, seed=0, **settings):
    model = toy_mlp(seed=seed)
    settings = {"optimizer": sgd, **SETTINGS, **settings}
    callbacks = [] if stop is None else [stop]
    trainer = quiet(model, folder, scheduler=scheduler, callbacks=callbacks, **settings)
    return model, trainer.fit(DATA, resume=folder if seed else None)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("error")
def test_the_rates_are_torchs_and_survive_a_kill(tmp_path, name):
    factory = SCHEDULERS[name]
    model, result = run(factory)
    optimizer = sgd([nn.Parameter(torch.zeros(1))])
    scheduler = factory(optimizer)
    expected = []
    for row in result.history:
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plateau = name == "ReduceLROnPlateau"
        scheduler.step(*([row["train_loss"]] if plateau else []))
    assert rates(result) == expected and len(set(expected)) > 1
    with pytest.raises(Killed):
        run(factory, tmp_path, End(1, by=Killed))
    again, continued = run(factory, tmp_path, seed=4)
    assert same_bits(bits(model), bits(again)) and rates(continued) == expected


@pytest.mark.parametrize("name", ["OneCycleLR", "LambdaLR"])
@pytest.mark.parametrize("epoch", [1, 4])
@pytest.mark.filterwarnings("error")
def test_after_every_step(tmp_path, name, epoch):
    """The fused second phase against plain steps; Ctrl-C within an epoch of each phase."""
    factories = {
        "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=18),  # momentum moves, too
        # from its step 11 on, in the middle of an epoch, the last layer's weight and bias differ
        "LambdaLR": lambda o: lrs.LambdaLR(
            o, [lambda t: 1 / (1 + t), lambda t: 1 / (1 + t) if t < 11 else 0.01]
        ),
    }
    groups = {
        "OneCycleLR": sgd,
        "LambdaLR": lambda ps: sgd([{"params": ps[::2]}, {"params": ps[1::2]}]),
    }
    settings = {
        "optimizer": groups[name],
        "scheduler_interval": "step",
        "precision": "float64",
        "noise_std": 1e-30,
    }
    model, result = run(factories[name], **settings)
    by_hand = toy_mlp(dtype=torch.float64)
    parameters = list(by_hand.parameters())
    optimizer = groups[name](parameters)
    scheduler, seen = factories[name](optimizer), []
    for e in range(6):
        for index in epoch_order(1, e, 20).split(8):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(by_hand(DATA[0][index].double()), DATA[1][index])
            loss.backward()
            if e >= 3:
                for p in parameters[:-2]:
                    p.grad = None
            optimizer.step()
            scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    assert rates(result) == seen
    for a, b in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    stopped = run(factories[name], tmp_path / "a", End(epoch, 2, after_step=True), **settings)[1]
    assert stopped.status == "interrupted" and len(stopped.history) == epoch
    settings["checkpoint_every"] = "1 step"
    with pytest.raises(Killed):
        run(factories[name], tmp_path / "b", End(epoch, 2, after_step=True, by=Killed), **settings)
    for folder in ("a", "b"):
        again, _ = run(factories[name], tmp_path / folder, seed=4, **settings)
        assert same_bits(bits(model), bits(again))


@pytest.mark.parametrize("second_phase", ["gd", "sgd", "lazy", "base", "none"])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_at_tau(second_phase, interval):
    """Rates that come from a theorem do not depend on the schedule, which stops."""
    kept = []

    class Watch:
        def on_epoch_end(self, run, record) -> None:
            kept.append(run._run.context.schedule.count)

    factory = SCHEDULERS["ExponentialLR"]
    settings = {"verify": "auto"} if second_phase == "lazy" else {}
    model = toy_mlp()
    result = quiet(
        model,
        optimizer=sgd,
        scheduler=factory,
        scheduler_interval=interval,
        second_phase=second_phase,
        callbacks=[Watch()],
        **SETTINGS,
        **settings,
    ).fit(DATA)
    steps = 1 if interval == "epoch" else 3
    goes_on = second_phase in ("base", "none")
    ends = [1, 2, 3, *([4, 5, 6] if goes_on else [3, 3, 3])]
    assert kept == [steps * e for e in ends]
    expected = [0.02 * 0.8**count for count in [0, *kept[:-1]]]
    # an epoch's row tells the rate at its end
    rows = [0.02 * 0.8**count for count in kept] if interval == "step" else expected
    assert rates(result) == pytest.approx(rows)
    if second_phase == "lazy":  # without L its step is the base algorithm's rate at tau
        assert result.status == "completed"


@pytest.mark.parametrize(
    ("name", "interval"),
    [("OneCycleLR", "epoch"), ("OneCycleLR", "step"), ("ReduceLROnPlateau", "epoch")],
)
@pytest.mark.filterwarnings("error")
def test_branches_go_on_with_the_schedule(name, interval):
    factory = {**SCHEDULERS, "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.05, total_steps=20)}[name]
    settings = {"scheduler": factory, "scheduler_interval": interval, "optimizer": sgd, **SETTINGS}
    own = lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9)  # noqa: E731
    changes = {"base": {}, "none": {"second_phase": "none"}, "own": {"optimizer": own}}
    results = quiet(toy_mlp(), **settings).branch(changes, DATA)
    for branch in ("base", "none"):
        model = toy_mlp()
        alone = quiet(model, **{**settings, **changes[branch]}).fit(DATA)
        assert rates(results[branch]) == rates(alone) and len(set(rates(alone))) > 1
        assert same_bits(bits(model), bits(results[branch].model))
    if name == "ReduceLROnPlateau":
        assert rates(results["own"])[3] == pytest.approx(rates(results["base"])[3] / 2)


def test_refusals(tmp_path):
    other = sgd([nn.Parameter(torch.zeros(1))])
    for factory, error, message in (
        (7, TypeError, "scheduler: expected a callable optimizer -> LRScheduler"),
        (lambda o: o, TypeError, "scheduler: expected an LRScheduler, got SGD"),
        (lambda o: lrs.StepLR(other, 1), ValueError, "scheduler: expected one of the optimizer"),
        (Unsaved, ValueError, "scheduler: Unsaved keeps what a checkpoint cannot hold"),
    ):
        with pytest.raises(error, match=message):
            run(factory)
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs an epoch's training loss"):
        run(lrs.ReduceLROnPlateau, scheduler_interval="step")
    with pytest.raises(ValueError, match=r"scheduler_interval: expected one of \['epoch', 'step'"):
        run(None, scheduler_interval="batch")
    run(SCHEDULERS["StepLR"], tmp_path)
    with pytest.raises(ValueError, match="scheduler='StepLR', this Trainer has 'ExponentialLR'"):
        run(SCHEDULERS["ExponentialLR"], tmp_path, seed=1)
    with pytest.raises(ValueError, match="scheduler_interval='epoch', this Trainer has 'step'"):
        run(SCHEDULERS["StepLR"], tmp_path, seed=1, scheduler_interval="step")
    run(SCHEDULERS["ChainedScheduler"], tmp_path / "two")
    parts = lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 1), lrs.ConstantLR(o)])  # noqa: E731
    with pytest.raises(ValueError, match=r"ChainedScheduler\(StepLR, ConstantLR\)"):
        run(parts, tmp_path / "two", seed=1)


class Unsaved(lrs.StepLR):
    """Its state holds an object."""

    def __init__(self, optimizer) -> None:
        self.extra = tp.Trainer
        super().__init__(optimizer, 1)
