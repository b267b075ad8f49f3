"""TwoPhaseCallback under transformers.Trainer itself."""

import json
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import Given, bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from twophase_ext.integrations.huggingface import TwoPhaseCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """accelerate joins what it takes for a launcher: libraries of other tests leave such names."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


EPOCHS, TAU, SEED, BATCH = 5, 3, 4, 8


class Model(nn.Module):
    """As transformers' models: labels make a loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"logits": logits} | (
            {"loss": F.cross_entropy(logits, labels)} if labels is not None else {}
        )


class Trainer(transformers.Trainer):
    """The order of tp.Trainer."""

    def _get_train_sampler(self, train_dataset=None):
        return tp.EpochSampler(len(self.train_dataset), seed=SEED)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def fit(model, data, folder, *callbacks, resume=None, optimizer=sgd, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        **{"num_train_epochs": EPOCHS, "save_strategy": "no", **settings},
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=(rows := [{"x": x, "labels": y} for x, y in zip(*data, strict=True)]),
        eval_dataset=rows,
        optimizers=(optimizer(model.parameters()), None),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def callback(**settings):
    return TwoPhaseCallback(TAU, **{"seed": SEED, "verify": False, **settings})


def convnet(seed=0):
    return Model(toy_convnet(seed=seed, dropout=0.0))


@pytest.mark.parametrize("optimizer", [sgd, lambda p: torch.optim.AdamW(p, lr=1e-3)])
def test_the_trainers_weights(tmp_path, optimizer):
    """The first phase and the noise in bits; then autograd's arithmetic against the kernel's."""
    x, y = toy_images(40)
    model, net = convnet().double(), convnet().double()
    plugin = callback(data=(x.double(), y))
    fit(model, (x.double(), y), tmp_path, plugin, optimizer=optimizer)

    twin = Given(lambda m, x: m.net(x), net=net.net)  # parameters of the same names
    result = quiet(
        twin,
        optimizer=optimizer,
        epochs=EPOCHS,
        tau=TAU,
        seed=SEED,
        batch_size=BATCH,
        precision="float64",
    ).fit((x.double(), y))
    assert plugin.hidden_hash == result.hidden_hash
    for name, value in bits(net).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-12)
    assert all(p.requires_grad for p in model.parameters())
    model.train()
    assert all(m.training for m in model.modules())


def test_the_verdict_and_a_last_layer_by_name(tmp_path):
    x, y = toy_data(60)
    plugin = TwoPhaseCallback(0.6, data=(x, y), verify="separation")
    fit(Model(toy_mlp(width=66)), (x, y), tmp_path, plugin)
    assert (plugin.tau_epoch, plugin.verdict.status, plugin.verdict.claim) == (
        3,
        "proved",
        "exists",
    )
    model, plugin = Model(toy_mlp()), TwoPhaseCallback(0.6, last_layer="net.4")
    fit(model, (x, y), tmp_path, plugin)
    assert plugin.verdict is None and len(plugin.hidden_hash) == 64


@pytest.mark.parametrize("every", [5, 7])
def test_resumed_at_any_checkpoint(tmp_path, every):
    """At the end of an epoch and within it: no second noise, no sample twice or never."""
    data = toy_images(40)
    whole = convnet()
    keep = {"save_strategy": "steps", "save_steps": every}
    fit(whole, data, tmp_path / "whole", callback(data=data), **keep)
    for step in range(every, 5 * EPOCHS, every):
        saved, model = tmp_path / "whole" / f"checkpoint-{step}", convnet(seed=9)
        state = json.loads((saved / "trainer_state.json").read_text(encoding="utf-8"))
        hash_ = state["stateful_callbacks"]["TwoPhaseCallback"]["attributes"]["hash"]
        assert (hash_ is None) == (step <= 5 * TAU)
        fit(model, data, tmp_path / "again", callback(data=data), resume=str(saved))
        assert same_bits(bits(model), bits(whole)), step


def test_nothing_but_the_last_layer_moves_after_tau(tmp_path):
    model, states = Model(toy_convnet()), []  # with dropout

    class Watch(transformers.TrainerCallback):
        def on_epoch_end(self, args, state, control, **objects):
            states.append(bits(model))

    fit(model, toy_images(40), tmp_path, callback(last_layer="net.head.out"), Watch())
    moved = {name for name, v in states[-1].items() if not torch.equal(v, states[TAU][name])}
    assert moved == {"net.head.out.weight", "net.head.out.bias"}


def test_ctrl_c_is_not_swallowed(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of a shell script
    model, plugin = convnet(), callback(last_layer="net.head.out")

    class Stop(transformers.TrainerCallback):
        def on_epoch_end(self, args, state, control, **objects):
            if state.epoch == TAU + 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(model, toy_images(40), tmp_path, plugin, Stop())
    assert not any(m.training for m in model.train().modules())
    plugin.release()
    assert all(m.training for m in model.train().modules())


def test_refusals(tmp_path):
    data, model = toy_images(40), convnet()
    before = bits(model)
    for message, plugin, settings in [
        ("last_layer: expected a module or a name", TwoPhaseCallback(1), {}),
        ("restore_callback_states", callback(), {"restore_callback_states_from_checkpoint": True}),
        (r"tau: expected an epoch in 1\.\.1", callback(), {"num_train_epochs": 2}),
        (
            "load_best_model_at_end: expected False",
            callback(),
            {
                "load_best_model_at_end": True,
                "eval_strategy": "epoch",
                "save_strategy": "epoch",
            },
        ),
        ("bf16, fp16: expected neither with data", callback(data=data), {"bf16": True}),
        ("outside of it", callback(), {"optimizer": lambda _: sgd(toy_mlp().parameters())}),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(model, data, tmp_path, plugin, **settings)
        assert plugin.hidden_hash is None and all(p.requires_grad for p in model.parameters())
    assert before.keys() == bits(model).keys()
