"""PNG pictures of samples, without a plotting library."""

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from twophase_ext.core.files import write_atomically

GROUPS, SAMPLES = 8, 8  # shown at most
SMALLEST = 64  # pixels: smaller images are magnified by a whole number
MARGIN = 6
DOT = 2  # pixels a side of one dot of a digit

# 3 x 5 dots: a digit for each row of dots, its bits from left to right
_FONT = ["75557", "26227", "71747", "71717", "55711", "74717", "74757", "71111", "75757", "75717"]


def culprit_picture(images: Tensor, groups: list[list[int]], path: Path) -> None:
    """Write a PNG: a row for each of the first groups, a column for each of its first samples.

    images [n, c, h, w]: uint8, or floating point, in [0, 1] or else stretched over what is shown;
    one channel is grey, three are RGB, any other number is averaged. groups: indices of samples,
    written above each image. Raises ValueError for images of other dimensions, for no group, and
    for an index out of range.
    """
    if images.dim() != 4:
        raise ValueError(f"images: expected 4 dimensions [n, c, h, w], got {images.dim()}")
    shown = [group[:SAMPLES] for group in groups[:GROUPS] if group]
    if not shown:
        raise ValueError("groups: expected at least one group of samples, got none")
    for i in (i for group in shown for i in group):
        if not 0 <= i < len(images):
            raise ValueError(f"groups: expected indices below {len(images)}, got {i}")
    pixels = _as_rgb(images[[i for group in shown for i in group]])
    factor = max(1, -(-SMALLEST // max(pixels.shape[1:3])))
    pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    label = 4 * DOT * max(len(str(i)) for group in shown for i in group)
    height = pixels.shape[1] + 5 * DOT + 2 * MARGIN
    width = max(pixels.shape[2], label) + MARGIN
    columns = max(map(len, shown))
    page = torch.full((len(shown) * height + MARGIN, columns * width + MARGIN, 3), 255).byte()
    image = iter(pixels)
    for r, group in enumerate(shown):
        for c, i in enumerate(group):
            top, left = r * height + MARGIN, c * width + MARGIN
            _write_number(page, i, top, left)
            top += 5 * DOT + MARGIN // 2
            page[top : top + pixels.shape[1], left : left + pixels.shape[2]] = next(image)
    write_png(page, path)


def write_png(pixels: Tensor, path: Path) -> None:
    """Write uint8 pixels [height, width, 3] (RGB) as a PNG file."""
    height, width, _ = pixels.shape
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.flatten(1)], 1)  # filter 0

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(rows.numpy().tobytes())) + chunk(b"IEND", b"")
    write_atomically(Path(path), lambda file: file.write(data))


def _as_rgb(images: Tensor) -> Tensor:
    """uint8 [n, h, w, 3]."""
    images = images.detach().cpu()
    if images.dtype != torch.uint8:
        images = images.double().nan_to_num()
        low, high = float(images.min()), float(images.max())
        if low < 0 or high > 1:
            images = (images - low) / max(high - low, torch.finfo(torch.float64).tiny)
        images = images * 255
    images = images.double()
    if images.shape[1] not in (1, 3):
        images = images.mean(1, keepdim=True)
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).round().byte()


def _write_number(page: Tensor, number: int, top: int, left: int) -> None:
    """Black digits, 4 * DOT pixels each."""
    for digit in str(number):
        for y, bits in enumerate(_FONT[int(digit)]):
            for x in range(3):
                if int(bits) & (4 >> x):
                    page[top + y * DOT :, left + x * DOT :][:DOT, :DOT] = 0
        left += 4 * DOT
