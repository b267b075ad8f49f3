"""Models that give an output for every token or pixel: rows are what is trained and proved."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import quiet

N, T, K = 12, 5, 3
QUIET = {"run_dir": False, "progress": False}


class Encoder(nn.Module):
    """Token ids [b, T] to logits, [b, T, K] or [b, K, T], alone or in a dict."""

    def __init__(self, form="last"):
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.place = nn.Parameter(torch.randn(T, 8))
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(8, K)
        self.form = form

    def forward(self, ids):
        logits = self.head(self.layer(self.embed(ids) + self.place))
        if self.form == "dict":
            return {"loss": None, "logits": logits}
        return logits if self.form == "last" else logits.movedim(-1, 1)


class Pixels(nn.Module):
    """Images [b, 1, 4, 4] to logits [b, K, 4, 4] by a 1 x 1 convolution."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh()
        )
        self.head = nn.Conv2d(6, K, 1)

    def forward(self, x):
        return self.head(self.body(x))


def encoder(form="last", n=N * T):
    torch.manual_seed(1)
    ids = torch.randint(0, 30, (N, T))
    labels = torch.randint(0, K, (N, T))
    labels[:, -1] = -100
    labels[3] = -100
    model = Encoder(form)
    tp.nn.widen(model, n, example_input=ids)
    return model, ids, labels


def rows_of(output, form):
    logits = output["logits"] if form == "dict" else output
    return (logits if form != "second" else logits.movedim(1, -1)).flatten(0, 1)


@pytest.mark.parametrize("form", ["last", "second", "dict"])
def test_proved_over_rows(form):
    model, ids, labels = encoder(form)
    counts = labels != -100
    every = tp.verify_expressivity(model, ids, w="witness", method="certificate")
    some = tp.verify_expressivity(model, ids, w="witness", method="certificate", rows=counts)
    assert (every.status, every.n) == ("proved", N * T)
    assert (some.status, some.n) == ("proved", int(counts.sum()))
    assert some.recheck(model, ids, rows=counts, say=str)
    assert not some.recheck(model, ids, say=str)  # another number of rows
    for verdict, kept in ((every, slice(None)), (some, counts.flatten())):
        twin = tp.nn.widen(Encoder(form), N * T, example_input=ids).double().eval()
        state = {k: v.double() for k, v in (model.state_dict() | verdict.witness).items()}
        twin.load_state_dict(state)
        seen = []
        hook = twin.head.last_layer.register_forward_pre_hook(lambda _, a, to=seen: to.append(a[0]))
        twin(ids)
        hook.remove()
        h = seen[0].flatten(0, 1)[kept].detach()
        sigma = torch.linalg.svdvals(torch.cat([h, torch.ones(len(h), 1)], 1))[-1]
        assert 0.2 * sigma < verdict.sigma_min_lower <= sigma * (1 + 1e-9)


def test_a_head_that_is_tied_to_the_embedding():
    """A language model of equal weights at both ends: widened, the embedding keeps them."""
    torch.manual_seed(0)

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.place = nn.Parameter(torch.randn(T, 8))
            self.inner = nn.GRU(8, 8, batch_first=True)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.inner(self.embed(ids) + self.place)[0])

    ids = torch.stack([torch.randperm(20)[:T] for _ in range(N)])
    ids[:, 0] = torch.arange(N)  # no two prefixes are equal
    model = Language()
    with pytest.raises(ValueError, match=r"shares its weights with .embed\.weight"):
        tp.Trainer(model, epochs=2, tau=1, **QUIET).fit((ids, ids))
    kept = model.embed.weight.detach().clone()
    tp.nn.widen(model, ids)
    assert model.head.last_layer.in_features == 66 and torch.equal(model.embed.weight, kept)
    result = tp.Trainer(model, epochs=4, tau=2, **QUIET).fit((ids, ids.roll(-1, 1)))
    assert (result.verdict.status, result.verdict.n) == ("proved", N * T)


def test_equal_sequences_have_equal_rows():
    model, ids, labels = encoder()
    ids[7] = ids[2]
    whole = tp.verify_expressivity(model, ids, w="witness")
    assert (whole.status, whole.n, whole.distinct) == ("proved", N * T, (N - 1) * T)
    assert whole.repeated == [[2, 7]]
    counts = labels != -100
    counts[2] = torch.tensor([True, False, False, True, False])
    counts[7] = torch.tensor([True, True, False, False, False])
    some = tp.verify_expressivity(model, ids, w="witness", rows=counts)
    assert (some.status, some.n) == ("proved", int(counts.sum()))
    assert some.distinct == some.n - 1  # of both, the first output counts
    trainer = tp.Trainer(model, epochs=4, tau=2, second_phase="gd", **QUIET)
    result = trainer.fit((ids, torch.where(counts, labels.clamp(min=0), -100)))
    assert (result.verdict.n, result.verdict.distinct) == (some.n, some.distinct)
    assert result.minimum.floor.distinct == some.distinct
    assert all(point["loss"] <= point["bound"] for point in result.guarantee.curve)


@pytest.mark.parametrize("form", ["last", "second", "dict"])
def test_trained_as_in_a_plain_loop(form):
    """The first phase is a plain loop over sequences, torch's mean over the labels that count."""
    model, ids, labels = encoder(form)
    twin, _, _ = encoder(form)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    trainer = tp.Trainer(
        model, epochs=3, tau=2, batch_size=4, second_phase="none", seed=5, **QUIET,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    result = trainer.fit((ids, labels))
    twin.train()
    for epoch in range(3):
        order = tp.core.seeds.epoch_order(5, epoch, N)
        for part in order.split(4):
            optimizer.zero_grad()
            y = labels[part].flatten()
            F.cross_entropy(rows_of(twin(ids[part]), form), y).backward()
            optimizer.step()
    for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7), name
    assert (type(model(ids)) is dict) == (form == "dict")
    twin.eval()
    logits, y = rows_of(twin(ids), form).detach(), labels.flatten()
    assert result.final["train_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    right = (logits.argmax(1) == y).sum() / (y != -100).sum()
    assert result.final["train_accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize("second", ["base", "gd", "sgd"])
def test_second_phase_over_rows_that_count(second):
    model, ids, labels = encoder()
    n = int((labels != -100).sum())
    trainer = tp.Trainer(model, epochs=8, tau=2, batch_size=4, second_phase=second, **QUIET)
    result = trainer.fit((ids, labels), val=(ids, labels))
    assert (result.verdict.status, result.verdict.n) == ("proved", n)
    assert result.feature_cache == "hidden"
    y = labels.flatten()
    loss = float(F.cross_entropy(model(ids).detach().flatten(0, 1), y))
    assert result.final["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert result.final["val_loss"] == pytest.approx(loss, rel=1e-5)
    if second == "gd":
        curve = result.guarantee.curve
        assert len(curve) > 1 and all(point["loss"] <= point["bound"] for point in curve)


@pytest.mark.parametrize("cache", ["backbone", "disk", "none"])
def test_every_cache_has_the_same_rows(cache):
    results = []
    for mode in ("hidden", cache):
        model, ids, labels = encoder()
        trainer = tp.Trainer(
            model, epochs=4, tau=2, batch_size=4, feature_cache=mode, verify=False, **QUIET
        )
        results.append(trainer.fit((ids, labels)).final["train_loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_accumulated_parts_are_weighted_by_what_counts():
    losses = []
    for parts in (1, 3):
        model, ids, labels = encoder()
        model.layer.eval()
        trainer = tp.Trainer(
            model, epochs=2, tau=1, batch_size=N, accumulate=parts, second_phase="none", **QUIET
        )
        losses.append(trainer.fit((ids, labels)).final["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_pixels():
    torch.manual_seed(0)
    images, labels = torch.rand(5, 1, 4, 4), torch.randint(0, K, (5, 4, 4))
    model = Pixels()
    before = model.head
    tp.nn.widen(model, 80, example_input=images)
    assert model(images).shape == (5, K, 4, 4)
    assert before.weight.shape == (K, 6, 1, 1)
    verdict = tp.verify_expressivity(model, images, w="witness")
    assert (verdict.status, verdict.n) == ("proved", 80)
    result = tp.Trainer(model, epochs=4, tau=2, batch_size=2, **QUIET).fit((images, labels))
    loss = float(F.cross_entropy(model(images), labels))
    assert result.final["train_loss"] == pytest.approx(loss, rel=1e-5)
    plain = tp.nn.plain(model)
    assert torch.allclose(plain(images), model(images), atol=1e-6)
    assert not any(type(m).__module__.startswith("twophase") for m in plain.head.modules())


def test_targets_shaped_as_the_outputs():
    torch.manual_seed(0)
    images, targets = torch.rand(5, 1, 4, 4), torch.rand(5, K, 4, 4)
    model = tp.nn.widen(Pixels(), 80, example_input=images)
    trainer = tp.Trainer(
        model, epochs=4, tau=2, batch_size=2, loss="squared_error", second_phase="gd", **QUIET
    )
    result = trainer.fit((images, targets))
    expected = float((model(images) - targets).square().sum(1).mean())
    assert result.final["train_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("shape", "outputs"), [((3, 2), 6), ((), 1)])
def test_outputs_reshaped_after_the_last_layer(shape, outputs):
    torch.manual_seed(0)
    x, y = torch.randn(20, 5), torch.rand(20, *shape)
    last = nn.Unflatten(1, shape) if shape else nn.Flatten(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs), last)
    tp.nn.widen(model, 20, example_input=x)
    trainer = tp.Trainer(model, epochs=4, tau=2, loss="squared_error", **QUIET)
    result = trainer.fit((x, y))
    expected = float((model(x) - y).square().sum() / 20)
    assert result.final["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert result.verdict.n == 20


def test_cached_features_of_ones_own_loop():
    model, ids, labels = encoder("dict")
    with tp.freeze(model, train=(ids, labels)):
        cache = tp.FeatureCache(model, (ids, labels))
        assert cache.n == int((labels != -100).sum())
        first, *_, last = tp.fit_last_layer(model, cache, epochs=20, lr=0.1)
        assert last < first
        assert type(model(ids)) is dict


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(N, dtype=torch.long), r"a target for each of the 5 outputs of a sample"),
        (torch.full((N, T), -100), r"a label that counts, all are -100"),
        (torch.full((N, T), K), r"labels in 0\.\.2 .* at sample 0"),
    ],
)
def test_bad_targets(labels, message):
    model, ids, _ = encoder()
    with pytest.raises(ValueError, match=message):
        tp.Trainer(model, epochs=2, tau=1, **QUIET).fit((ids, labels))


def test_bad_rows():
    model, ids, labels = encoder()
    for rows in (labels, labels[:, 1:] > 0, torch.zeros(N, T, dtype=torch.bool)):
        with pytest.raises(ValueError, match="rows: expected"):
            tp.verify_expressivity(model, ids, rows=rows)


class Padded(nn.Module):
    """nn.TransformerEncoder over a padding mask: nested tensors in evaluation mode."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked, self.table = masked, nn.Embedding(20, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.encoder, self.out = nn.TransformerEncoder(layer, 1), nn.Linear(8, 2)

    def forward(self, ids):
        keep = (ids != 0).unsqueeze(-1)
        h = self.encoder(self.table(ids), src_key_padding_mask=ids == 0)
        if self.masked:
            h = h * keep
        return self.out(h.sum(1) / keep.sum(1))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("masked", [True, False])
def test_padding_masks_of_torchs_own_encoder(masked):
    """Its evaluation mode has zeros at padded tokens, its training mode numbers."""
    torch.manual_seed(0)
    ids = torch.randint(1, 20, (16, 6))
    ids[::2, 3:] = 0
    model = tp.nn.widen(Padded(masked), ids)
    trainer = quiet(model, epochs=2, tau=1, second_phase="agd", verify="auto")
    if masked:
        result = trainer.fit((ids, torch.arange(16) % 2))
        assert result.verdict.status == "proved" and result.minimum.condition == "proved"
        assert {status for _, status, _ in result.guarantee.premises} == {"held"}
    else:  # two functions: nothing is claimed of either
        with pytest.warns(UserWarning, match="nothing is cached and nothing claimed"):
            result = trainer.fit((ids, torch.arange(16) % 2))
        rows = {name: status for name, status, _ in result.guarantee.premises}
        assert rows["fixed features"] == "failed" and not result.guarantee.curve
        assert result.minimum.condition == "if the expressivity condition holds"
    assert model.encoder.use_nested_tensor
