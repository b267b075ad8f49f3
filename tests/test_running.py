"""Bounds through the operators of a model as it runs: against more digits, and what is refused."""

import copy
import gc
import math
import threading
import time

import pytest
import torch
from torch import nn

import twophase_ext as tp
from running_models import Attention, Does, Stop, drawn
from twophase_ext.expressivity.bounded import Unbounded
from twophase_ext.expressivity.running.call import Call
from twophase_ext.expressivity.running.engine import Running
from twophase_ext.expressivity.running.features import bounded_features
from twophase_ext.expressivity.running.notes import sample_dim
from twophase_ext.expressivity.running.operand import _overlaps


def bounded(model, x, batch=None):
    parts = list(x.split(batch or len(x)))
    return bounded_features(model, model.stop, parts, n=len(x))


@torch.no_grad()
def truth(model, x):
    """The same in twice the digits."""
    return copy.deepcopy(model).double().backbone(x.double())


def within(model, x):
    """Whether the bounds hold in float32, whose errors float64 shows; None where there are none."""
    with torch.backends.mkldnn.flags(enabled=False):  # recurrent layers as their products
        try:
            found = bounded(model, x)
        except Unbounded:
            return None
    if not bool(found.error.isfinite().all()):
        return None
    exact = truth(model, x)
    apart = (found.z - exact).norm(dim=1)
    return bool((apart <= found.error + 1e-13 * exact.norm(dim=1)).all())


@pytest.mark.slow
def test_random_networks_are_within_their_bounds():
    found = [within(*drawn(seed)) for seed in range(90)]
    assert found.count(False) == 0
    assert found.count(True) >= 68


def test_the_rounding_is_needed(monkeypatch):
    """Without it the bounds are wrong: the test above can fail."""
    start = Call.__init__

    def without(call, *arguments):
        start(call, *arguments)
        call.u = 0.0

    monkeypatch.setattr(Call, "__init__", without)
    assert [within(*drawn(seed)) for seed in range(30)].count(False) > 3


def layer(width=6):
    return nn.Linear(width, 5)


def net(function, width=6):
    return Stop(Does(function), width).double().eval()


X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)).double()
CALLS = [0]


def from_another_thread(x):
    found = []

    def work():
        with torch.no_grad():
            found.append(x - x[:1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return x + found[0]


def _by_numpy(x):
    y = (x * 1e-3).tanh()
    y.numpy()[:] *= 1e12
    return y + 0


def _into_a_constant(x):
    kept = torch.zeros(12, 6, dtype=x.dtype)
    kept.numpy()[:] = x.numpy()
    return (kept * 2).tanh() + x


def _by_thread(x):
    y = (x * 1e-3).tanh()
    thread = threading.Thread(target=lambda: y.mul_(1e12))
    thread.start()
    thread.join()
    return y * 1


def _caught(x):
    try:
        return x + torch.rand_like(x)
    except ValueError:
        return x * 1


def counted(x):
    CALLS[0] += 1
    return x * CALLS[0]


REFUSED = {
    "mean over the batch": (lambda x: x - x.mean(0), "mean: it adds up the samples"),
    "sorted batch": (lambda x: x.sort(0).values, "sort: it brings different samples together"),
    "a number of the batch": (lambda x: x * x.sum().item(), "sum: it adds up the samples"),
    "a sample's number": (lambda x: x * x[0, 0].item(), "it decides by what the samples are"),
    "one sample for all": (lambda x: x - x[:1], "it takes one sample of a batch"),
    "a product of samples": (lambda x: (x @ x.T) @ x, "it brings different samples together"),
    "another order": (lambda x: x.flip(0), "does not have the rows of each sample"),
    "shifted samples": (lambda x: x + x.roll(1, 0), "it brings different samples together"),
    "NumPy": (lambda x: x + torch.from_numpy(x.numpy() * 2), "something else for other samples"),
    "NumPy, in place": (_by_numpy, "an operand was written by what is no operator"),
    "NumPy, into a constant": (_into_a_constant, "an operand was written by what is no operator"),
    "another thread, in place": (_by_thread, "an operand was written by what is no operator"),
    "a list": (lambda x: x + torch.tensor(x.tolist()).to(x), "something else for other samples"),
    "another thread": (from_another_thread, "something else for other samples"),
    "a counter": (counted, "something else for other samples"),
    "a clock": (lambda x: x * time.perf_counter(), "something else for other samples"),
    "random numbers": (lambda x: x + torch.rand_like(x), "it draws random numbers"),
    "dropout": (lambda x: nn.functional.dropout(x, 0.5, True), "it draws random numbers"),
    "a comparison": (
        lambda x: x * ((x * 3).tanh() >= (3 * x).tanh()),  # equal, but for rounding
        "it decides by numbers that are rounded",
    ),
    "the largest's place": (
        lambda x: x + (x * 3).tanh().argmax(1, keepdim=True),
        "it decides by numbers that are rounded",
    ),
    "a path": (lambda x: x * 2 if bool((x > 0).any()) else x, "any: it adds up the samples"),
    "places": (lambda x: x + (x * 3).sort(1).indices, "it decides by numbers that are rounded"),
    "a rounded constant's number": (
        lambda x: x * x.new_ones(3).div(3).sum().item(),
        "it makes a plain number of one that is rounded",
    ),
    "bits": (lambda x: (x * 3).tanh().view(torch.int64).to(x.dtype), "as of another type"),
    "caught": (_caught, "it draws random numbers"),
    "half precision": (lambda x: x.half().to(x.dtype), "no rule for numbers of torch.float16"),
    "complex numbers": (lambda x: torch.fft.fft(x).real, "_fft_r2c: no rule"),
    "nothing of x": (lambda x: torch.ones(len(x), 6, dtype=x.dtype), "does not depend on the data"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind):
    function, message = REFUSED[kind]
    with pytest.raises(Unbounded, match=message):
        bounded(net(function), X)


def test_batch_statistics_and_writes_into_the_model_are_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(6))

        def forward(self, x):
            self.seen += 1
            return x + self.seen

    with pytest.raises(Unbounded, match=r"backbone: add_: it writes into a parameter or buffer"):
        bounded(Stop(Counts(), 6).double().eval(), X)
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    with pytest.raises(Unbounded, match="it uses the statistics of the batch"):
        bounded(Stop(norm, 6).double().eval(), X)


def test_what_runs_is_bounded_whatever_python_makes_of_it():
    class Twisted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layer(6) for _ in range(3))
            self.back = nn.Linear(5, 6)

        def forward(self, x):
            parts = {"x": x, "out": []}
            for k, one in enumerate(self.layers):
                y = torch.func.functional_call(one, dict(one.named_parameters()), (parts["x"],))
                parts["out"].append(y if k % 2 else y.tanh())
            out = torch.zeros(len(x), 3, 5, dtype=x.dtype)
            for k, y in enumerate(parts["out"]):
                out[:, k] = y
            return self.back(out.sum(1) if out.shape[1] > 2 else out[:, 0])

    torch.manual_seed(0)
    model = Stop(Twisted(), 6).eval()
    model.backbone.back.register_forward_hook(lambda m, a, y: 2 * y)
    assert within(model, X.float()) is True
    found = bounded(model.double(), X, batch=5)
    assert float((found.error / found.z.norm(dim=1)).max()) < 1e-13


def test_operands_in_the_storage_that_is_written_are_read_as_they_were():
    """y[:, :3] *= y[:, 3:] in two views of one storage, and y *= y."""

    def written(x):
        y = 300 * (x + 1)
        y[:, :3].mul_(y[:, 3:6])
        return y.mul_(y)

    assert within(Stop(Does(written), 6).eval(), X.float()) is True

    def overlapping(x):  # torch leaves open what comes of it
        y = x + 1
        return y[:, 1:4].mul_(y[:, :3])

    with pytest.raises(Unbounded, match="writes over numbers that it reads in another place"):
        bounded(net(overlapping, 3), X)


@pytest.mark.parametrize("mask", [None, "filled", "added", "times"])
def test_attention_behind_masks(mask):
    torch.manual_seed(2)
    model = Stop(nn.Sequential(Attention(8, 2, mask), nn.Flatten()), 40).eval()
    assert within(model, torch.randn(6, 5, 8)) is True


def test_a_row_that_is_masked_throughout_is_refused():
    def hidden(x):
        scores = x + torch.finfo(x.dtype).min
        return scores.softmax(1)

    with pytest.raises(Unbounded, match="masked throughout"):
        bounded(net(hidden), X)


def test_repeated_numbers_count_as_often():
    """Errors that a view or a copy shows k times are sqrt(k) times as large."""
    start = net(lambda x: x.tanh())
    error = bounded(start, X).error
    for copies in (
        lambda x: x.tanh()[:, None].expand(-1, 9, -1).reshape(len(x), 54),
        lambda x: x.tanh().repeat(1, 9),
        lambda x: x.tanh()[:, torch.arange(54) % 6],
        lambda x: torch.cat([x.tanh()] * 9, 1),
    ):
        found = bounded(net(copies, 54), X).error
        assert bool((found >= 2.99 * error).all())
    windows = bounded(net(lambda x: x.tanh().unfold(1, 3, 1).reshape(len(x), 12), 12), X)
    assert bool((windows.error >= 1.4 * error).all())
    assert _overlaps(torch.arange(6.0).unfold(0, 3, 1)) == 3
    assert _overlaps(torch.rand(3, 4).T) == 1


def test_whose_the_numbers_of_a_view_are():
    ids = torch.arange(3)
    storage = torch.arange(3 * 4 * 5)
    whole = storage.view(3, 4, 5)
    for view, dim, expected in (
        (whole, 0, [0, 1, 2]),
        (whole.permute(2, 0, 1), 1, [0, 1, 2]),
        (whole.view(12, 5), 0, [0] * 4 + [1] * 4 + [2] * 4),
        (whole[:, 1:3, ::2].transpose(0, 2), 2, [0, 1, 2]),
        (whole[1], None, [1]),
        (whole.flip(0)[:, 0], 0, None),
    ):
        if expected is None:
            continue
        found, own = sample_dim(view, ids, 20)
        assert (found, own.tolist()) == (dim, expected)
    # [4, 3, 5]: samples in the middle
    found, own = sample_dim(storage.view(4, 3, 5), ids, 5)
    assert (found, own.tolist()) == (1, [0, 1, 2])
    found, own = sample_dim(storage.view(12, 5), ids, 5)
    assert (found, own.tolist()) == (0, [0, 1, 2] * 4)
    for mixed in (storage.view(4, 15), storage.view(2, 6, 5), storage.view(60)[::7]):
        if mixed.shape == (2, 6, 5):
            assert sample_dim(mixed, ids, 5)[0] == 1
            continue
        with pytest.raises(Unbounded, match="it mixes the samples"):
            part = mixed.reshape(4, 15)[:, 3:12] if mixed.dim() == 2 else whole.view(2, 30)
            sample_dim(part, ids, 20)


def test_an_empty_mode_changes_no_bit():
    torch.manual_seed(0)
    model = Stop(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 8).double().eval()
    x = torch.randn(4, 3, 8).double()
    mode = Running(model, {})
    mode.enter(x)
    with torch.no_grad(), mode:
        seen = model.backbone.linear1(x)
    with torch.no_grad():
        assert torch.equal(seen, model.backbone.linear1(x))


# --- proofs behind networks that have no graph


class Tokens(nn.Module):
    def __init__(self, width=66):
        super().__init__()
        self.table, self.cells = nn.Embedding(30, 8), nn.GRU(8, 12, batch_first=True)
        self.wide, self.act, self.out = nn.Linear(12, width), tp.nn.Softplus(10.0), None
        self.out = nn.Linear(width, 4)

    def forward(self, ids):
        return self.out(self.act(self.wide(self.cells(self.table(ids))[0][:, -1])))


def tokens(n=40):
    return torch.randint(0, 30, (n, 6), generator=torch.Generator().manual_seed(0))


def test_a_recurrent_network_over_tokens_is_proved():
    torch.manual_seed(0)
    model, x = Tokens(), tokens()
    for w in ("current", "witness"):
        verdict = tp.verify_expressivity(model, x, w=w)
        assert verdict.status == "proved", str(verdict)
        assert verdict.recheck(model, x, say=lambda _: None)
    with torch.no_grad():
        h = copy.deepcopy(model).double()
        own = h.act(h.wide(h.cells(h.table(x))[0][:, -1]))
        matrix = torch.cat([own, own.new_ones(len(x), 1)], 1)
    given = tp.verify_expressivity(model, x, method="certificate")
    sigma = float(torch.linalg.svdvals(matrix)[-1])
    assert given.status == "proved" and 0 < given.sigma_min_lower <= sigma * (1 + 1e-9)


@pytest.mark.parametrize(
    "function", [lambda x: torch.exp(-x * x), torch.sin, lambda x: x / (1 + x * x)]
)
def test_bounds_at_given_weights_are_below_the_singular_value(function):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), Does(function), nn.Linear(40, 3)).double()
    verdict = tp.verify_expressivity(model, X, method="certificate")
    with torch.no_grad():
        h = model[1](model[0](X))
    sigma = torch.linalg.svdvals(torch.cat([h, h.new_ones(len(h), 1)], 1))[-1]
    assert verdict.status == "proved" and 0 < verdict.sigma_min_lower <= float(sigma) * (1 + 1e-9)


def test_sequences_that_the_network_cannot_tell_apart_are_not_proved():
    class Shorter(Tokens):
        def forward(self, ids):
            return super().forward(ids[:, :-1])

    torch.manual_seed(0)
    x = tokens()
    x[1, :-1] = x[0, :-1]
    x[1, -1] = (x[0, -1] + 1) % 30
    for settings in ({}, {"w": "witness"}, {"method": "separation"}, {"method": "certificate"}):
        assert tp.verify_expressivity(Shorter(), x, **settings).status in ("undecided", "full rank")
    assert math.isfinite(float(tokens().double().sum()))


def test_a_pass_is_gone_when_it_is_over():
    """Without the garbage collector: what it holds is as large as the model's activations."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    batches = list(torch.randn(40, 3).double().split(8))
    bounded_features(model, model[2], batches, n=40)
    gc.collect()
    gc.disable()
    try:
        bounded_features(model, model[2], batches, n=40)
        assert not [o for o in gc.get_objects() if type(o) is Running]
    finally:
        gc.enable()
