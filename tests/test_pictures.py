"""The picture of culprits: a valid PNG with the right samples under the right numbers."""

import struct
import zlib

import pytest
import torch

from twophase.pictures import DOT, GROUPS, MARGIN, SAMPLES, SMALLEST, culprit_picture, write_png


def read_png(path):
    """uint8 [h, w, 3] of a PNG as pictures.py writes them, every check of the format done."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        (check,) = struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        assert check == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + size
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    raw = torch.frombuffer(bytearray(zlib.decompress(chunks[1][1])), dtype=torch.uint8)
    rows = raw.view(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def image_at(page, r, c, h, w, label=0):
    """The r, c-th image of a page of images magnified to h x w."""
    top = r * (h + 5 * DOT + 2 * MARGIN) + MARGIN + 5 * DOT + MARGIN // 2
    left = c * (max(w, label) + MARGIN) + MARGIN
    return page[top : top + h, left : left + w]


def test_png_of_any_pixels(tmp_path):
    pixels = torch.randint(256, (7, 5, 3)).byte()
    write_png(pixels, tmp_path / "a.png")
    assert torch.equal(read_png(tmp_path / "a.png"), pixels)


def test_each_image_stands_in_its_place(tmp_path):
    images = torch.randint(256, (30, 3, 16, 16)).byte()
    groups = [[3, 17], [29, 0, 4], []]
    culprit_picture(images, groups, tmp_path / "a.png")
    page = read_png(tmp_path / "a.png")
    for r, group in enumerate(groups):
        for c, i in enumerate(group):
            shown = image_at(page, r, c, 64, 64)[::4, ::4]  # 16 pixels magnified to SMALLEST = 64
            assert torch.equal(shown, images[i].permute(1, 2, 0))
    assert (image_at(page, 0, 2, 64, 64) == 255).all()  # nothing there
    assert SMALLEST == 64


def test_numbers_above_the_images(tmp_path):
    culprit_picture(torch.zeros(1235, 1, 8, 8), [[1234, 1230]], tmp_path / "a.png")
    page = read_png(tmp_path / "a.png")
    dots = page[MARGIN : MARGIN + 5 * DOT : DOT, MARGIN : MARGIN + 16 * DOT : DOT, 0] == 0
    drawn = ["".join(".#"[int(dot)] for dot in row) for row in dots]
    assert drawn == [
        ".#..###.###.#.#.",
        "##....#...#.#.#.",
        ".#..###.###.###.",
        ".#..#.....#...#.",
        "###.###.###...#.",
    ]


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_grey_where_channels_are_no_colours(tmp_path, channels):
    images = torch.full((3, channels, 64, 64), 0.2)
    images[:, 0] = 0.6
    culprit_picture(images, [[1]], tmp_path / "a.png")
    shown = image_at(read_png(tmp_path / "a.png"), 0, 0, 64, 64)
    grey = 255 * (0.6 + 0.2 * (channels - 1)) / channels
    assert (shown == round(grey)).all()


def test_normalised_images_are_stretched(tmp_path):
    images = torch.randn(4, 1, 64, 64) * 3
    images[2, 0, 0, 0], images[2, 0, 0, 1], images[0] = -20.0, 30.0, 1e6  # 0 is not shown
    culprit_picture(images, [[1, 2]], tmp_path / "a.png")
    page = read_png(tmp_path / "a.png")
    shown = image_at(page, 0, 1, 64, 64)[..., 0]
    assert shown[0, 0] == 0 and shown[0, 1] == 255 and 60 < shown.double().mean() < 140
    assert torch.equal(
        image_at(page, 0, 0, 64, 64)[..., 0],
        ((images[1, 0].double() + 20) * 255 / 50).round().byte(),
    )


def test_only_the_first_groups_and_samples(tmp_path):
    images = torch.rand(400, 1, 64, 64)
    culprit_picture(images, [list(range(20)) for _ in range(20)], tmp_path / "a.png")
    height, width, _ = read_png(tmp_path / "a.png").shape
    assert height == GROUPS * (64 + 5 * DOT + 2 * MARGIN) + MARGIN
    assert width == SAMPLES * (64 + MARGIN) + MARGIN


def test_narrow_images_leave_room_for_their_numbers(tmp_path):
    images = torch.rand(60000, 1, 70, 2)
    culprit_picture(images, [[59999, 11111]], tmp_path / "a.png")
    page = read_png(tmp_path / "a.png")
    shown = image_at(page, 0, 1, 70, 2, label=5 * 4 * DOT)[..., 0]
    assert torch.equal(shown, (images[11111, 0].double() * 255).round().byte())


def test_errors(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"images: expected 4 dimensions \[n, c, h, w\], got 3"):
        culprit_picture(torch.zeros(3, 8, 8), [[0]], path)
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="groups: expected at least one group of samples, got"):
            culprit_picture(torch.zeros(3, 1, 8, 8), nothing, path)
    for i in (3, -1):
        with pytest.raises(ValueError, match=f"groups: expected indices below 3, got {i}"):
            culprit_picture(torch.zeros(3, 1, 8, 8), [[0, i]], path)
    assert not path.exists()
