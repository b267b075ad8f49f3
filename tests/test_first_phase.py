"""What the first phase costs: memory kept for the backward pass, copies to the device, syncs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import twophase_ext as tp
from helpers import bits, quiet, same_bits, saved_bytes, toy_convnet, toy_images
from twophase.models import PreActResNet18
from twophase_ext.model.losses import CROSS_ENTROPY
from twophase_ext.training.data import samples as data
from twophase_ext.training.phases import FirstPhase

BATCH = 4


@pytest.mark.parametrize("in_place", [False, True])
def test_softplus_keeps_a_quarter_less_than_torchs(in_place, device):
    """4 tensors of a block's 6 remain: BatchNorm's output is overwritten or freed, not kept."""
    x = torch.rand(BATCH, 1, 28, 28, device=device)
    y = torch.arange(BATCH, device=device)

    def kept(activation) -> int:
        model = PreActResNet18(1, 10, width=16, activation=activation).to(device)
        return saved_bytes(model, lambda: F.cross_entropy(model(x), y))

    ours = kept(lambda: tp.nn.Softplus(100.0, inplace=in_place))
    theirs = kept(lambda: torch.nn.Softplus(100.0))
    assert ours <= 0.75 * theirs
    assert ours == kept(torch.nn.ReLU)  # which keeps its output alone, too
    # by hand: each activation's input, of width c and side s, is what torch keeps besides
    inputs = 5 * 16 * 28**2 + 4 * 32 * 14**2 + 4 * 64 * 7**2 + 3 * 128 * 4**2
    assert theirs - ours == 4 * BATCH * inputs


@pytest.mark.parametrize(("free", "moved"), [(4 * 33 * 36, True), (4 * 33 * 36 - 1, False)])
def test_images_move_to_the_device_once_where_they_fit(monkeypatch, free, moved):
    """The device is a fake: "meta" has shapes and dtypes only."""
    monkeypatch.setattr(data, "available_memory", lambda _: free)
    x, y = torch.zeros(33, 1, 6, 6, dtype=torch.uint8), torch.zeros(33, dtype=torch.int64)
    samples = data.Samples.of(
        (x, y), name="train", device=torch.device("meta"), dtype=torch.float32
    )
    assert samples.fetch(torch.arange(2))[0].device.type == "meta"  # as before `prepare`
    samples.prepare(CROSS_ENTROPY, 3)
    assert samples.x.dtype == torch.uint8 and samples.y.device.type == "meta"
    assert samples.x.device.type == ("meta" if moved else "cpu")
    with Operations() as seen:
        batch, labels = samples.fetch(torch.tensor([5, 2]))
    assert seen.mixed == []
    assert batch.device.type == labels.device.type == "meta"
    assert batch.shape == (2, 1, 6, 6) and batch.dtype == torch.float32


def test_images_on_the_device_stay_one_tensor():
    x, y = toy_images()
    samples = data.Samples.of((x, y), name="train", device=torch.device("cpu"), dtype=x.dtype)
    samples.prepare(CROSS_ENTROPY, 3)
    assert samples.x.data_ptr() == x.data_ptr()


class Operations(TorchDispatchMode):
    """The names of the operations that run, and of the gathers across devices among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.mixed: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        if "index" in function.name() and len({t.device for t in args if hasattr(t, "device")}) > 1:
            self.mixed.append(function.name())
        return function(*args, **(kwargs or {}))


def test_steps_do_not_wait_for_the_device(monkeypatch):
    """No value of a tensor is read and no shape depends on one, in two epochs of 4 steps."""
    seen = Operations()
    first = FirstPhase.epoch

    def watched(self, interrupt):
        with seen:
            return first(self, interrupt)

    monkeypatch.setattr(FirstPhase, "epoch", watched)
    x, y = toy_images()
    images = (255 * x).to(torch.uint8)
    quiet(toy_convnet(), epochs=2, tau=1, second_phase="none").fit((images, y))
    assert seen.names.count("aten::convolution_backward") == 2 * 2 * 4
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
    assert not waits.intersection(seen.names)
    assert seen.names.count("aten::index_select") == 2 * 2 * 4  # images and labels of each step


def test_a_model_in_channels_last_trains_to_the_same_up_to_rounding(tmp_path):
    """Noise, updates, the hash at tau and checkpoints go by element, not by place in memory."""
    images = toy_images()
    first, second = toy_convnet(dropout=0.0), toy_convnet(dropout=0.0)
    second.to(memory_format=torch.channels_last)
    assert second.conv.weight.stride() != first.conv.weight.stride()
    a = quiet(first, noise_std=0.1).fit(images)
    b = quiet(second, tmp_path, noise_std=0.1).fit(images)
    assert second.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in bits(first).items():
        torch.testing.assert_close(bits(second)[name], value, rtol=1e-5, atol=1e-6)
    assert b.final["train_loss"] == pytest.approx(a.final["train_loss"], rel=1e-5)
    again = toy_convnet(seed=4, dropout=0.0)  # its weights are contiguous
    quiet(again, tmp_path, noise_std=0.1).fit(images, resume=True)
    assert same_bits(bits(again), bits(second))
