"""TwoPhaseCallback under Lightning itself: the Trainer's weights, exact resumption, refusals."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import twophase_ext as tp
from helpers import bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp

L = pytest.importorskip("lightning.pytorch")

from twophase_ext.integrations.lightning import TwoPhaseCallback  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice on workers and loggers
]

EPOCHS, TAU, SEED, BATCH = 5, 3, 4, 8
SETTINGS = {"epochs": EPOCHS, "tau": TAU, "seed": SEED, "batch_size": BATCH}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


class Module(L.LightningModule):
    """A user's own: one optimizer of everything, the network in an attribute."""

    def __init__(self, net: nn.Module, optimizer=sgd) -> None:
        super().__init__()
        self.net, self.make = net, optimizer
        self.before_step = lambda module: None

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        self.before_step(self)
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.make(self.parameters())


class Resumable(DataLoader):
    """A loader with the state that Lightning saves, for resumption within an epoch."""

    def __init__(self, data, seed=SEED, batch_size=BATCH) -> None:
        sampler = tp.EpochSampler(len(data[0]), seed=seed)
        super().__init__(TensorDataset(*data), batch_size=batch_size, sampler=sampler)
        self.__dict__["done"], self.__dict__["skip"] = 0, 0

    def __iter__(self):
        self.done, skip, self.skip = self.skip, self.skip, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                self.done += 1
                yield batch

    def state_dict(self):
        return {"done": self.done % len(self)}

    def load_state_dict(self, state):
        self.skip = state["done"]


def fit(module, data, *callbacks, epochs=EPOCHS, ckpt_path=None, val=None, **settings):
    quiet_ = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        **{**dict.fromkeys(quiet_, False), **settings},
    )
    loader = data if isinstance(data, DataLoader) else Resumable(data)
    trainer.fit(module, loader, val, ckpt_path=ckpt_path)
    return trainer


def callback(**settings):
    return TwoPhaseCallback(TAU, **{"seed": SEED, "model": "net", "verify": False, **settings})


def convnet():
    return toy_convnet(dropout=0.0)  # dropout's draws are the framework's own


def other():
    return toy_convnet(seed=9, dropout=0.0)  # a checkpoint's weights take the place of these


OPTIMIZERS = {
    "sgd": sgd,
    "ours": lambda p: tp.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, lr=1e-3),
}


@pytest.fixture(autouse=True)
def no_group_left():
    """Lightning leaves the process group that it makes; forks of later tests would inherit it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_trainers_bits_with_the_cache(optimizer):
    data, model, module = toy_images(40), convnet(), Module(convnet(), OPTIMIZERS[optimizer])
    result = quiet(model, optimizer=OPTIMIZERS[optimizer], **SETTINGS).fit(data)
    plugin = callback(cache=True, data=data)
    trainer = fit(module, data, plugin)
    assert plugin.hidden_hash == result.hidden_hash
    assert same_bits(bits(module.net), bits(model))
    assert plugin.losses == [row["train_loss"] for row in result.history[TAU:]]
    assert trainer.global_step == 5 * EPOCHS and trainer.current_epoch == TAU
    assert module.training and all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_trainers_weights_without_the_cache(optimizer):
    """The module's own steps: features of a batch, autograd; equal in exact arithmetic."""
    x, y = toy_images(40)
    data, build = (x.double(), y), lambda: convnet().double()
    model, module = build(), Module(build(), OPTIMIZERS[optimizer])
    settings = {**SETTINGS, "optimizer": OPTIMIZERS[optimizer], "precision": "float64"}
    result = quiet(model, **settings).fit(data)
    plugin = callback()  # statistics over the loader's own dataset
    fit(module, data, plugin)
    assert plugin.hidden_hash == result.hidden_hash  # bits: the first phase, noise, statistics
    for name, value in bits(model).items():
        torch.testing.assert_close(module.net.state_dict()[name], value, rtol=0, atol=1e-12)


def test_the_modules_own_forward_and_the_verdict():
    x, y = toy_data(60)
    module = Module(toy_mlp(width=66))
    plugin = TwoPhaseCallback(0.6, verify="separation")
    fit(module, (x, y), plugin)
    assert plugin.tau_epoch == 3
    assert (plugin.verdict.status, plugin.verdict.claim) == ("proved", "exists")
    assert plugin.verdict.last_layer == "net.4"


def test_distributed_data_parallel_goes_on_after_tau(monkeypatch):
    """Its reducer would wait for the frozen layers' gradients; one process is enough to see it."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    data = toy_data(40)
    plain, parallel = Module(toy_mlp()), Module(toy_mlp())
    fit(plain, data, callback())
    distributed = {"strategy": "ddp_find_unused_parameters_true", "devices": 1}
    fit(parallel, data, callback(), use_distributed_sampler=False, **distributed)
    assert same_bits(bits(plain.net), bits(parallel.net))


class Watch(L.Callback):
    """The states at the end of each epoch."""

    def __init__(self):
        self.states = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append(bits(pl_module.net))


def test_nothing_but_the_last_layer_moves_after_tau():
    data = toy_images(40)
    module, watch = Module(toy_convnet()), Watch()  # with dropout
    val = DataLoader(TensorDataset(*data), batch_size=20)  # validation puts modes back by itself
    seen = []
    module.before_step = lambda m: seen.append((m.training, any(c.training for c in m.modules())))
    fit(module, data, watch, callback(), val=val)
    moved = {
        name for name, value in watch.states[-1].items()
        if not torch.equal(value, watch.states[TAU][name])
    }  # fmt: skip
    assert moved == {"head.out.weight", "head.out.bias"}
    assert seen[: 5 * TAU] == [(True, True)] * 5 * TAU
    assert [m.training for m in module.net.modules()] == [False] * 10  # BatchNorm's statistics stay
    assert module.net.train().training and module.net.bn.weight.requires_grad  # unfrozen


def test_what_moves_all_the_same_ends_the_fit():
    module = Module(toy_convnet())

    def write(module):
        if module.trainer.current_epoch == EPOCHS - 1:
            module.net.bn.running_mean.add_(1e-6)

    module.before_step = write
    with pytest.raises(RuntimeError, match="hidden layers changed since they were frozen"):
        fit(module, toy_images(40), callback())
    assert module.net.bn.training


class SaveAt(L.Callback):
    """A checkpoint after so many steps, in the middle of an epoch or at its end."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("step", [5 * TAU - 2, 5 * TAU, 5 * TAU + 2])
def test_resumed_within_an_epoch(tmp_path, step, cache):
    """No sample twice or never, no second noise: the bits of the uninterrupted run."""
    data, path = toy_images(40), tmp_path / "run.ckpt"
    whole = Module(convnet())
    fit(whole, data, SaveAt(step, path), callback(cache=cache))
    if not path.exists():
        assert cache and step > 5 * TAU  # cached epochs are not Lightning's steps
        return
    again, plugin = Module(other()), callback(cache=cache)
    fit(again, data, plugin, ckpt_path=path)
    assert same_bits(bits(again.net), bits(whole.net))


@pytest.mark.parametrize("cache", [False, True])
def test_resumed_at_the_end_of_any_epoch(tmp_path, cache):
    data = toy_images(40)
    whole = Module(convnet())
    keep = {"dirpath": tmp_path, "filename": "{step}", "save_top_k": -1, "every_n_epochs": 1}
    checkpoints = L.callbacks.ModelCheckpoint(**keep)
    fit(whole, data, checkpoints, callback(cache=cache), enable_checkpointing=True)
    files = sorted(tmp_path.glob("*.ckpt"))
    steps = [5 * e for e in range(1, EPOCHS + 1)]
    expected = [s for s in steps if not cache or s < 5 * TAU or s == 5 * EPOCHS]
    assert [int(file.stem.split("=")[1]) for file in files] == sorted(expected, key=str)
    for file in files:
        again, plugin = Module(other()), callback(cache=cache)
        fit(again, data, plugin, ckpt_path=file)
        assert same_bits(bits(again.net), bits(whole.net)), file
        assert len(plugin.losses) == (EPOCHS - TAU if cache else 0)
    # a run that is lengthened goes on in the second phase
    more, longer = Module(convnet()), callback(cache=cache)
    fit(more, data, longer, ckpt_path=tmp_path / f"step={5 * EPOCHS}.ckpt", epochs=EPOCHS + 2)
    straight = Module(convnet())
    fit(straight, data, callback(cache=cache), epochs=EPOCHS + 2)
    assert same_bits(bits(more.net), bits(straight.net))


def test_foreign_hidden_layers_are_refused():
    data, plugin = toy_images(40), callback()
    fit(Module(convnet()), data, plugin)
    with pytest.raises(ValueError, match="not those that were frozen at tau"):
        fit(Module(other()), data, plugin)


def test_ctrl_c_in_the_cached_epochs_reaches_lightning_and_resumes(tmp_path):
    """Lightning ends the process; a swallowed signal would train on to the end."""
    data = toy_images(40)

    def loss(outputs, y):
        if plugin.losses and not stopped:
            stopped.append(len(plugin.losses))
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(outputs, y)

    def fresh(**settings):
        return callback(cache=True, loss=tp.ConvexLoss(loss, 0.5), **settings)

    stopped, plugin = [0], fresh()
    whole = Module(convnet())
    fit(whole, data, plugin)
    stopped, plugin, cut = [], fresh(), Module(convnet())
    save = L.callbacks.ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=100)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(cut, data, save, plugin, enable_checkpointing=True, epochs=7)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert stopped == [1] and len(plugin.losses) == 2  # of 4: the epoch in progress has ended
    assert all(m.training for m in cut.train().modules())  # unfrozen
    (saved,) = tmp_path.glob("*.ckpt")
    again, plugin = Module(other()), fresh()
    fit(again, data, plugin, ckpt_path=saved)
    assert same_bits(bits(again.net), bits(whole.net))
    assert len(plugin.losses) == EPOCHS - TAU


class Odd(Dataset):
    """Neither (x, y) nor (x, y, weight)."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.zeros(1, 6, 6), 0, 1, 1


def test_refusals(monkeypatch):
    data = toy_images(40)

    def refused(message, plugin, error=ValueError, module=None, loader=data, **settings):
        module = module or Module(convnet())
        before = bits(module.net)
        with pytest.raises(error, match=message):
            fit(module, loader, plugin, **settings)
        assert same_bits(bits(module.net), before) and module.training
        assert all(p.requires_grad for p in module.parameters())

    for settings, message in [
        ({"gradient_clip_val": 1.0}, "cache: expected False with gradient clipping"),
        ({"accumulate_grad_batches": 2, "min_epochs": 4}, "accumulation, min_epochs > 3"),
        ({"max_steps": 9}, "max_steps"),
    ]:
        refused(message, callback(cache=True), **settings)
    refused("max_epochs: expected a number", TwoPhaseCallback(0.5), epochs=-1, max_steps=3)
    refused(r"tau: expected an epoch in 1\.\.1", callback(), epochs=2)
    two = Module(convnet(), lambda p: None)
    two.configure_optimizers = lambda: [
        sgd(two.net.stem.parameters()),
        sgd(two.net.conv.parameters()),
    ]
    two.automatic_optimization = False
    refused("expected one optimizer, got 2", callback(), module=two)
    refused("outside of it", callback(model="net.conv"))
    with pytest.raises(ValueError, match="verify: expected False or one of"):
        callback(verify="yes")
    with pytest.raises(ValueError, match="noise_std"):
        callback(noise_std=0.0)
    with pytest.raises(ValueError, match="tau"):
        TwoPhaseCallback(1.5)
    module = Module(convnet())
    with pytest.raises(ValueError, match=r"data: expected samples \(x, y\)"):
        fit(module, data, callback(data=Odd()))
    assert module.training and module.net.bn.training
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    refused("ddp_find_unused_parameters_true", callback(), strategy="ddp", devices=1)
