"""The augmentations against loops over images and pixels in NumPy, with the same draws."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset, default_collate

from helpers import bits, quiet, same_bits, toy_convnet, toy_images
from twophase.augment import (
    Compose,
    RandomAffine,
    RandomCrop,
    RandomHorizontalFlip,
    for_dataset,
)
from twophase.data import NAMES

SIZES = [(1, 28, 28), (3, 32, 32), (2, 7, 12), (3, 9, 5), (1, 1, 3)]
BLACK = [-0.4, 0.25, -1.5]
AFFINE = {"degrees": (-40, 25), "translate": (0.2, 0.3), "scale": (0.6, 1.7), "shear": (-10, 30)}
ALL = [
    RandomCrop(2, fill=-0.5),
    RandomHorizontalFlip(0.4),
    RandomAffine(**AFFINE, fill=0.3),
    Compose(RandomCrop(1), RandomHorizontalFlip(), RandomAffine(15)),
]


def generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def noise(c: int, h: int, w: int, b: int = 6, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(b, c, h, w, generator=generator(7), dtype=dtype)


def padded(image: np.ndarray, pad: int, fill: list[float]) -> np.ndarray:
    channels = [np.pad(part, pad, constant_values=f) for part, f in zip(image, fill, strict=True)]
    return np.stack(channels)


def pixel(image: np.ndarray, fill: list[float], c: int, row: int, column: int) -> float:
    """The image's value, `fill` outside of it."""
    inside = 0 <= row < image.shape[1] and 0 <= column < image.shape[2]
    return float(image[c, row, column]) if inside else fill[c]


def moved(image: np.ndarray, fill: list[float], angle, dx, dy, scale, shear) -> np.ndarray:
    """The affine map by its definition: solve for where each pixel comes from, then mix four."""
    c, h, w = image.shape
    a, t = math.radians(angle), math.tan(math.radians(shear))
    rotation = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    forward = scale * rotation @ np.array([[1.0, t], [0.0, 1.0]])
    centre = np.array([(w - 1) / 2, (h - 1) / 2])
    out = np.empty((c, h, w))
    for row in range(h):
        for column in range(w):
            target = np.array([column, row]) - centre - np.array([dx, dy])
            x, y = np.linalg.solve(forward, target) + centre
            left, top = math.floor(x), math.floor(y)
            u, v = x - left, y - top
            for k in range(c):
                corner = [pixel(image, fill, k, top + i, left + j) for i in (0, 1) for j in (0, 1)]
                out[k, row, column] = (1 - v) * ((1 - u) * corner[0] + u * corner[1]) + v * (
                    (1 - u) * corner[2] + u * corner[3]
                )
    return out


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("pad", [1, 4])
def test_crop_is_a_slice_of_the_padded_image(shape, pad, device):
    images, fill = noise(*shape), BLACK[: shape[0]]
    crop = RandomCrop(pad, fill)
    rows, columns = crop.draw(images, generator())
    result = crop(images.to(device), generator()).cpu()
    _, h, w = shape
    for image, r, c, cut in zip(images, rows.tolist(), columns.tolist(), result, strict=True):
        expected = padded(image.numpy(), pad, fill)[:, r : r + h, c : c + w]
        np.testing.assert_array_equal(cut.numpy(), expected)


@pytest.mark.parametrize("shape", SIZES)
def test_flip_reverses_the_columns_of_the_drawn_samples(shape, device):
    images, flip = noise(*shape), RandomHorizontalFlip(0.5)
    (mirrored,) = flip.draw(images, generator())
    assert 0 < mirrored.sum() < len(images)
    result = flip(images.to(device), generator()).cpu()
    for image, yes, found in zip(images, mirrored.tolist(), result, strict=True):
        expected = image.numpy()[:, :, ::-1] if yes else image.numpy()
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SIZES)
def test_affine_samples_bilinearly(shape, dtype, device):
    images, fill = noise(*shape, b=3, dtype=dtype), BLACK[: shape[0]]
    affine = RandomAffine(**AFFINE, fill=fill)
    parameters = affine.draw(images, generator())
    result = affine(images.to(device), generator()).cpu()
    assert result.dtype == dtype
    filling = torch.tensor(fill, dtype=dtype).tolist()
    # coordinates are sums of 3 terms below 4 halves of a side, values change by `span` a pixel
    span = float(images.max() - images.min())
    atol = 32 * torch.finfo(dtype).eps / 2 * max(shape[1:]) * span
    for i, image in enumerate(images):
        expected = moved(image.numpy(), filling, *(float(p[i]) for p in parameters))
        np.testing.assert_allclose(result[i].double().numpy(), expected, rtol=0, atol=atol)


def test_affine_goes_where_it_says():
    image = torch.zeros(1, 1, 5, 7)
    image[0, 0, 2, 5] = 1  # two pixels right of the centre

    def brightest(**at) -> tuple[int, int]:
        drawn = {"angle": 0, "dx": 0, "dy": 0, "scale": 1, "shear": 0, **at}
        parameters = [torch.tensor([float(v)], dtype=torch.float64) for v in drawn.values()]
        found = RandomAffine(0).apply(image, *parameters)[0, 0]
        row, column = divmod(int(found.argmax()), 7)
        assert found[row, column] == pytest.approx(1, abs=1e-5)
        return row, column

    assert brightest() == (2, 5)
    assert brightest(angle=90) == (4, 3)  # clockwise: right becomes down
    assert brightest(dx=-1, dy=2) == (4, 4)
    assert brightest(scale=0.5) == (2, 4)
    assert brightest(shear=45) == (2, 5)
    image = image.roll((-1, -2), (2, 3))  # a pixel above the centre
    assert brightest(shear=45) == (1, 2)  # x + tan(45) y


def test_every_offset_is_drawn_equally_often():
    n, images = 81 * 200, torch.empty(81 * 200, 1, 2, 2)
    rows, columns = RandomCrop(4).draw(images, generator())
    assert rows.min() == columns.min() == 0 and rows.max() == columns.max() == 8
    counts = torch.bincount(9 * rows + columns, minlength=81)
    assert len(counts) == 81
    deviation = math.sqrt(n / 81 * 80 / 81)
    assert (counts - n / 81).abs().max() < 5 * deviation


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_flip_comes_with_probability_p(p):
    n = 20_000
    (mirrored,) = RandomHorizontalFlip(p).draw(torch.empty(n, 1, 1, 1), generator())
    assert abs(int(mirrored.sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_affine_draws_fill_their_ranges_independently():
    n, affine = 20_000, RandomAffine(**AFFINE)
    drawn = affine.draw(torch.empty(n, 1, 10, 20), generator())
    ranges = [(-40, 25), (-4, 4), (-3, 3), (0.6, 1.7), (-10, 30)]  # 0.2 x 20 and 0.3 x 10 pixels
    for values, (low, high) in zip(drawn, ranges, strict=True):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        deviation = (high - low) / math.sqrt(12 * n)
        assert abs(values.mean() - (low + high) / 2) < 5 * deviation
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(5)
    assert correlation.abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_the_generator_alone_decides(transform, device):
    images = noise(3, 8, 11, b=32).to(device)
    kept, state = images.clone(), torch.get_rng_state()
    drawing = generator(1)
    first, second = (transform(images, drawing) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, kept) and first.data_ptr() != images.data_ptr()
    assert first.shape == images.shape and first.dtype == images.dtype
    assert first.device == images.device
    again = generator(1)
    assert torch.equal(transform(images, again), first)
    assert torch.equal(transform(images, again), second)
    assert not torch.equal(first, second) and not torch.equal(first, images)
    assert torch.equal(again.get_state(), drawing.get_state())
    with torch.random.fork_rng():  # without one, torch's own
        torch.manual_seed(3)
        default = transform(images)
        torch.manual_seed(3)
        assert torch.equal(transform(images), default)
    own = generator(2, device)
    assert torch.equal(transform(images, own), transform(images, generator(2, device)))


@pytest.mark.parametrize(
    "transform",
    [RandomCrop(0, 5.0), RandomHorizontalFlip(0), RandomAffine(0, fill=[0.1, 2.0, -3.0])],
    ids=repr,
)
@pytest.mark.parametrize("size", [(7, 12), (1, 1), (28, 28)])
def test_nothing_to_do_keeps_the_bits(transform, size, device):
    images = noise(3, *size).to(device)
    images[0, 0, 0, 0] = -0.0
    result = transform(images, generator())
    assert torch.equal(result.view(torch.int32), images.view(torch.int32))


def test_flip_always_and_never(monkeypatch):
    images = noise(2, 3, 4)
    assert torch.equal(RandomHorizontalFlip(1)(images, generator()), images.flip(3))
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.zeros(size))  # the smallest draw
    assert torch.equal(RandomHorizontalFlip(0)(images, generator()), images)
    assert torch.equal(RandomHorizontalFlip(0.01)(images, generator()), images.flip(3))


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_an_empty_batch_stays_empty(transform):
    assert transform(torch.empty(0, 3, 8, 8), generator()).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("transform", [*ALL, RandomCrop(1, BLACK)], ids=repr)
def test_nothing_reads_a_value_back_from_the_device(transform):
    with FakeTensorMode():  # refuses .item() and operands on two devices
        images = torch.empty(4, 3, 8, 9, device="meta")
        result = transform(images, torch.Generator())
    assert result.device.type == "meta" and result.shape == images.shape


@pytest.mark.parametrize("transform", ALL[:3], ids=repr)
def test_draws_are_made_on_the_generators_device(transform):
    images = torch.empty(4, 3, 8, 9, device="meta")
    assert {p.device.type for p in transform.draw(images, generator())} == {"cpu"}
    assert {p.device.type for p in transform.draw(images)} == {"meta"}


def test_compose_draws_in_order_from_one_generator():
    images, drawing = noise(3, 8, 8), generator(4)
    crop, flip = RandomCrop(2), RandomHorizontalFlip()
    expected = flip(crop(images, drawing), drawing)
    assert torch.equal(Compose(crop, flip)(images, generator(4)), expected)
    assert torch.equal(Compose()(images, generator(4)), images)


@pytest.mark.parametrize("transform", [*ALL, RandomCrop(1, BLACK)], ids=repr)
def test_the_repr_makes_it_again(transform):
    assert repr(eval(repr(transform))) == repr(transform)
    assert repr(RandomCrop(4)) == "RandomCrop(padding=4, fill=0.0)"
    assert repr(RandomAffine(15, scale=(0.5, 2))) == (
        "RandomAffine(degrees=(-15.0, 15.0), translate=(0.0, 0.0), scale=(0.5, 2.0), "
        "shear=(0.0, 0.0), fill=0.0)"
    )


def test_each_data_set_has_its_augmentation():
    crop, small, flip = RandomCrop(4, 0.5), RandomCrop(2, 0.5), RandomHorizontalFlip(0.5)
    affine = RandomAffine(15, scale=(0.85, 1.15), fill=0.5)
    shifted = RandomAffine(15, (2 / 28, 2 / 28), (0.85, 1.15), fill=0.5)
    expected = {
        "mnist": Compose(small, affine),
        "kmnist": Compose(small),
        "fashion-mnist": Compose(small, flip),
        "cifar10": Compose(crop, flip),
        "cifar100": Compose(crop, flip),
        "svhn": Compose(crop, flip),
        "digits": Compose(shifted),
    }
    assert set(expected) == set(NAMES)
    for name, transform in expected.items():
        assert repr(for_dataset(name, fill=0.5)) == repr(transform)
        assert "fill=0.0" in repr(for_dataset(name))
    with pytest.raises(ValueError, match=r"name: expected one of .*, got 'imagenet'"):
        for_dataset("imagenet")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RandomCrop(-1), ValueError, "padding: expected at least 0, got -1"),
        (lambda: RandomCrop(1.5), TypeError, "padding: expected an integer, got 1.5"),
        (lambda: RandomCrop(1, float("nan")), ValueError, "fill: expected a finite .*got nan"),
        (lambda: RandomCrop(1, "0"), TypeError, "fill: expected a finite .*got '0'"),
        (lambda: RandomCrop(1, ()), ValueError, r"fill: expected a finite .*got \(\)"),
        (lambda: RandomHorizontalFlip(1.1), ValueError, r"p: expected .*\[0, 1\], got 1.1"),
        (lambda: RandomHorizontalFlip(-0.1), ValueError, r"p: expected .*\[0, 1\], got -0.1"),
        (lambda: RandomHorizontalFlip(True), TypeError, "p: expected .*got True"),
        (lambda: RandomHorizontalFlip([0.5, 0.5]), ValueError, r"p: expected .*got \[0.5"),
        (lambda: RandomAffine(-5), ValueError, "degrees: expected .*got -5"),
        (lambda: RandomAffine((5, -5)), ValueError, r"degrees: expected .*got \(5, -5\)"),
        (lambda: RandomAffine(math.inf), ValueError, "degrees: expected .*got inf"),
        (lambda: RandomAffine("5"), TypeError, "degrees: expected .*got '5'"),
        (lambda: RandomAffine(0, 0.1), ValueError, "translate: expected two .*got 0.1"),
        (lambda: RandomAffine(0, (0.1, 1.5)), ValueError, "translate: expected two .*1.5"),
        (lambda: RandomAffine(0, scale=2), ValueError, "scale: expected .*got 2"),
        (lambda: RandomAffine(0, scale=(0, 1)), ValueError, "scale: expected .*both > 0"),
        (lambda: RandomAffine(0, scale=(1, math.inf)), ValueError, r"scale: .*got \(1, inf\)"),
        (lambda: RandomAffine(0, scale=(2, 1)), ValueError, r"scale: .*got \(2, 1\)"),
        (lambda: RandomAffine(0, shear=90), ValueError, "shear: expected .*got 90"),
        (lambda: Compose(RandomCrop(1), 3), TypeError, "transforms: expected callables, got 3"),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_wrong_images_are_named():
    for transform in ALL:
        with pytest.raises(TypeError, match=r"images: expected a float32 .*torch.uint8"):
            transform(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), generator())
        with pytest.raises(TypeError, match=r"images: expected a float32 .*torch.bfloat16"):
            transform(torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16), generator())
        with pytest.raises(TypeError, match=r"images: expected a float32 .*ndarray"):
            transform(np.zeros((2, 3, 8, 8)), generator())
        with pytest.raises(ValueError, match=r"images: expected \[b, c, h, w\].*\[3, 8, 8\]"):
            transform(torch.zeros(3, 8, 8), generator())
    for transform in (RandomCrop(1, [0.0, 1.0]), RandomAffine(1, fill=(0.0, 1.0))):
        with pytest.raises(ValueError, match=r"fill: expected 3 numbers.*\(0.0, 1.0\)"):
            transform(torch.zeros(2, 3, 8, 8), generator())


def test_a_run_on_augmented_images_repeats_and_knows_that_they_change():
    transform = Compose(RandomCrop(1), RandomAffine(10))
    visits = []

    def collate(samples):
        images, labels = default_collate(samples)
        visits.append(transform(images))
        return visits[-1], labels

    states = []
    for _ in range(2):
        visits.clear()
        model = toy_convnet()
        loader = DataLoader(TensorDataset(*toy_images()), batch_size=8, collate_fn=collate)
        result = quiet(model, epochs=2).fit(loader)
        assert result.feature_cache == "none"
        states.append((bits(model), list(visits)))
    (first, seen), (second, seen_again) = states
    assert same_bits(first, second)
    assert all(torch.equal(a, b) for a, b in zip(seen, seen_again, strict=True))
