"""Mixed precision and accumulation in the first phase, against torch's own recipe written out."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import twophase_ext as tp
from helpers import Given, bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from interrupts import End, Killed
from twophase_ext.core.seeds import epoch_order
from twophase_ext.training.config import Config

DTYPES = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}
DATA = toy_data(20)


class Watch:
    """Weights after each epoch and at tau; the loss scale."""

    def __init__(self) -> None:
        self.states, self.scales, self.at_tau = [], [], None

    def on_perturb(self, run) -> None:
        self.at_tau = bits(run.network.model)

    def on_epoch_end(self, run, record) -> None:
        self.states.append(bits(run.network.model))
        self.scales.append(run._run.context.base_step.scaler.get_scale())


class Dtypes:
    """Of the last layer's input; None at tau. A hook, which no compiled model should have."""

    def __init__(self) -> None:
        self.seen: list[torch.dtype | None] = []

    def on_fit_start(self, run) -> None:
        keep = lambda _, args: self.seen.append(args[0].dtype)  # noqa: E731
        run.network.last.module.register_forward_pre_hook(keep)

    def on_perturb(self, run) -> None:
        self.seen.append(None)


def torchs_recipe(model, optimizer, data, dtype, epochs: int, parts: int = 1, scale=2.0**16):
    """autocast, GradScaler where float16, gradients added up; returns the last scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype is torch.float16)
    x, y = data
    for epoch in range(epochs):
        for index in epoch_order(1, epoch, len(x)).split(8):
            optimizer.zero_grad()
            for part in index.tensor_split(parts):
                with torch.autocast("cpu", dtype):
                    out = model(x[part])
                loss = nn.functional.cross_entropy(out.float(), y[part])
                loss = loss * (len(part) / len(index)) if parts > 1 else loss
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return scaler.get_scale()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", DTYPES)
def test_mixed_precision_is_torchs_recipe(precision, accumulate):
    model, by_hand, watch, dtypes = toy_mlp(), toy_mlp(), Watch(), Dtypes()
    settings = {"precision": precision, "accumulate": accumulate, "verify": "auto"}
    result = quiet(model, callbacks=[watch, dtypes], **settings).fit(DATA, DATA)
    optimizer = tp.optim.SGD(by_hand.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-5)
    torchs_recipe(by_hand, optimizer, DATA, DTYPES[precision], 2, accumulate)
    assert same_bits(watch.states[1], bits(by_hand))
    assert not same_bits(watch.states[1], first_phase("float32"))  # 16 bits were in use
    assert {t.dtype for t in bits(model).values()} == {torch.float32}
    # features and measured losses are in float32 after tau, proofs in float64
    tau = dtypes.seen.index(None)
    assert DTYPES[precision] in dtypes.seen[:tau]
    assert set(dtypes.seen[tau + 1 :]) == {torch.float32, torch.float64}
    assert result.verdict.status in ("proved", "full rank") and result.hidden_hash
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(DATA[0]), DATA[1])
    assert math.isclose(result.final["train_loss"], loss, rel_tol=1e-5)


def first_phase(precision: str) -> dict[str, torch.Tensor]:
    model, watch = toy_mlp(), Watch()
    quiet(model, precision=precision, callbacks=[watch]).fit(DATA)
    return watch.states[1]


@pytest.mark.parametrize("precision", DTYPES)
def test_mixed_precision_ends_near_float32(precision, device):
    losses = []
    for chosen in (precision, "float32"):
        model = toy_mlp().to(device)
        result = quiet(model, precision=chosen, accumulate=2).fit(DATA)
        assert result.status == "completed" and result.hidden_hash
        losses.append(result.final["train_loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-2)


def overflowing():
    """Squared errors of about 1e3: their gradients leave float16 at the first scales."""
    x, _ = toy_data(16)
    return x, 1e3 * x[:, :2]


def tiny_steps(parameters):
    return torch.optim.SGD(parameters, lr=1e-8)


def test_overflowing_steps_are_skipped_and_the_scale_halved():
    watch, model = Watch(), toy_mlp(classes=2)
    counts = []

    class Count:
        def on_epoch_end(self, run, record) -> None:
            counts.append(run._run.context.schedule.count)

    result = quiet(
        model,
        loss="squared_error",
        optimizer=tiny_steps,
        precision="fp16-mixed",
        second_phase="none",
        scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
        scheduler_interval="step",
        epochs=8,
        callbacks=[watch, Count()],
    ).fit(overflowing())
    assert result.status == "completed"
    start = toy_mlp(classes=2).state_dict()
    assert same_bits(watch.states[0], dict(start)) and watch.scales[0] == 2.0**14
    assert not torch.equal(watch.states[-1]["0.weight"], start["0.weight"])
    halvings = round(math.log2(2.0**16 / watch.scales[-1]))
    assert 2 < halvings < 16 and watch.scales[-1] == watch.scales[-2]
    assert counts[-1] == 16 - halvings  # a skipped step is no step of the schedule
    assert all(torch.isfinite(t).all() for t in bits(model).values())


def test_an_infinite_loss_is_divergence_and_no_overflow_of_the_scale(tmp_path):
    class Explode:
        def on_epoch_end(self, run, record) -> None:
            if record["epoch"] == 1:
                run.optimizer.param_groups[0]["lr"] = 1e30

    for precision in DTYPES:
        result = quiet(
            toy_mlp(),
            tmp_path / precision,
            precision=precision,
            epochs=8,
            tau=6,
            callbacks=[Explode()],
        ).fit(DATA)
        assert result.status == "diverged" and len(result.history) == 3
        state = torch.load(tmp_path / precision / "checkpoint.pt", weights_only=True)
        assert state["epoch"] == 2 and all(torch.isfinite(t).all() for t in state["model"].values())


class Stop(End):
    """From a scale that grows soon; a kill after an epoch, or Ctrl-C within it."""

    def __init__(self, epoch: int, batch: int | None = None) -> None:
        end = {"by": Killed} if batch is None else {}
        super().__init__(epoch + (batch is None), batch, **end)

    def on_fit_start(self, run) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=4)
        run._run.context.base_step.scaler = scaler
        super().on_fit_start(run)


@pytest.mark.parametrize("batch", [None, 0])
def test_the_scaler_is_saved(tmp_path, batch):
    settings = {
        "loss": "squared_error",
        "optimizer": tiny_steps,
        "precision": "fp16-mixed",
        "epochs": 8,
        "tau": 7,
    }
    whole = toy_mlp(classes=2)
    quiet(whole, callbacks=[Stop(99)], **settings).fit(overflowing())
    stopped = quiet(toy_mlp(classes=2), tmp_path, callbacks=[Stop(2, batch)], **settings)
    if batch is None:
        with pytest.raises(Killed):
            stopped.fit(overflowing())
    else:
        assert stopped.fit(overflowing()).status == "interrupted"
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["scaler"]["growth_interval"] == 4 and state["scaler"]["scale"] < 2.0**16
    model = toy_mlp(classes=2, seed=3)
    quiet(model, tmp_path, **settings).fit(overflowing(), resume=True)
    assert same_bits(bits(model), bits(whole))
    for name, value in (("precision", "bf16-mixed"), ("accumulate", 2)):
        with pytest.raises(ValueError, match=f"made with {name}="):
            quiet(toy_mlp(classes=2), tmp_path, **{**settings, name: value}).fit(
                overflowing(), resume=True
            )


def test_a_branch_goes_on_with_the_scale():
    settings = {
        "loss": "squared_error",
        "optimizer": tiny_steps,
        "precision": "fp16-mixed",
        "epochs": 8,
        "tau": 7,
    }
    base = {"second_phase": "none"}
    branch = quiet(toy_mlp(classes=2), **settings).branch({"none": base}, overflowing())["none"]
    model = toy_mlp(classes=2)
    quiet(model, **settings, **base).fit(overflowing())
    assert same_bits(bits(model), bits(branch.model))
    assert not same_bits(bits(model), bits(toy_mlp(classes=2)))


@pytest.mark.parametrize("compile_it", [False, {"backend": "aot_eager"}])
def test_frozen_batch_norm_does_not_move_after_mixed_precision(compile_it):
    torch.compiler.reset()
    x, y = toy_images(16)
    watch, model = Watch(), toy_convnet()
    settings = {"precision": "bf16-mixed", "compile": compile_it, "accumulate": 2}
    result = quiet(model, callbacks=[watch], **settings).fit((x, y))
    assert not torch.equal(watch.states[0]["bn.running_mean"], watch.states[1]["bn.running_mean"])
    hidden = {n: t for n, t in bits(model).items() if not n.startswith("head.out.")}
    assert same_bits(hidden, {n: watch.at_tau[n] for n in hidden}) and result.hidden_hash
    other = toy_convnet(dropout=0.0)
    other.load_state_dict(watch.at_tau)
    torch.optim.swa_utils.update_bn(x.split(256), other)  # in float32
    assert torch.equal(other.bn.running_mean, model.bn.running_mean)
    assert torch.equal(other.bn.running_var, model.bn.running_var)


def test_precisions_that_torch_lacks_are_refused(monkeypatch):
    model = toy_mlp().double()
    monkeypatch.setattr(
        Config, "autocast", lambda *_: nullcontext()
    )  # as torch does where it warns
    with pytest.raises(ValueError, match="precision: torch has no 'fp16-mixed' on cpu: autocast"):
        quiet(model, precision="fp16-mixed").fit(DATA)
    assert model[0].weight.dtype == torch.float64

    def unsupported(*_):
        raise RuntimeError("this device does not support bfloat16\nmore")

    monkeypatch.setattr(Config, "autocast", unsupported)
    with pytest.raises(ValueError, match=r"on cpu: this device does not support bfloat16$"):
        quiet(model, precision="bf16-mixed").fit(DATA)
    with pytest.raises(ValueError, match=r"precision: expected one of \['bf16-mixed', 'float32'"):
        quiet(model, precision="float16")


# --- accumulation


@pytest.mark.parametrize("factory", [None, lambda ps: torch.optim.Adam(ps, lr=1e-2)])
@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_micro_batches_train_as_the_whole_batch(accumulate, factory):
    """20 samples by 8: the last step has 4, whose parts are not those of a full one."""
    models = [toy_mlp(dtype=torch.float64) for _ in range(2)]
    seen: list[int] = []
    models[1][0].register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    settings = {"precision": "float64", "optimizer": factory, "second_phase": "none"}
    results = [
        quiet(model, accumulate=parts, **settings).fit(DATA)
        for model, parts in zip(models, (1, accumulate), strict=True)
    ]
    for name, value in bits(models[0]).items():
        torch.testing.assert_close(bits(models[1])[name], value, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(r.history for r in results), strict=True):
        assert math.isclose(a["train_loss"], b["train_loss"], rel_tol=1e-12)
        assert a["train_accuracy"] == b["train_accuracy"]
    steps = {2: [4, 4, 4, 4, 2, 2], 3: [3, 3, 2, 3, 3, 2, 2, 1, 1], 8: [1] * 20}[accumulate]
    start = next(i for i in range(len(seen)) if seen[i : i + len(steps)] == steps)
    assert start < 20  # what looks at the model before it trains


def test_augmented_batches_are_transformed_before_they_are_cut():
    def noisy(x, generator):
        return x + torch.randn(x.shape, generator=generator, dtype=x.dtype)

    states = []
    for parts in (1, 3):
        model = toy_mlp(dtype=torch.float64)
        settings = {"precision": "float64", "second_phase": "none", "augment": noisy}
        quiet(model, accumulate=parts, **settings).fit(DATA)
        states.append(bits(model))
    torch.testing.assert_close(states[1], states[0], rtol=1e-12, atol=1e-12)


def test_batch_norm_never_gets_a_single_sample():
    """Its statistics are those of a micro-batch: another function than on the whole batch."""
    seen, states = [], []
    for parts in (1, 8):
        model = Given(
            lambda m, x: m.rest(m.bn(m.stem(x))),
            **{"stem": nn.Linear(5, 5), "bn": nn.BatchNorm1d(5), "rest": toy_mlp()},
        )
        torch.manual_seed(0)
        model.stem.reset_parameters()

        def keep(m, args, p=parts) -> None:
            if m.training and torch.is_grad_enabled():
                seen.append((p, len(args[0])))

        model.bn.register_forward_pre_hook(keep)
        quiet(model, accumulate=parts, second_phase="none", epochs=2).fit(toy_data(17))
        states.append(bits(model))
    first, *sizes = [size for parts, size in seen if parts == 8]
    assert first == 2  # whether it trains at all is asked before the first step
    assert sizes == [2, 2, 2, 2, 3, 2, 2, 2] * 2  # of 8, and of 9: the last sample joined it
    assert not torch.equal(states[0]["stem.weight"], states[1]["stem.weight"])


def test_accumulation_that_makes_no_sense_is_refused():
    for value, error in ((0, ValueError), (9, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="accumulate: expected"):
            quiet(toy_mlp(), accumulate=value)
