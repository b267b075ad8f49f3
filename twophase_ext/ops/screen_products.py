"""Products of rows with columns in float32: the largest of a row, and those above thresholds."""

import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase

_ops = torch.ops.twophase
PANEL = 32  # kScreenPanel of csrc/screen_products.h: columns that are packed together


def packed_columns(columns: Tensor) -> Tensor:
    """[n, d] float32 as `screen_products` takes it: [ceil(n / 32), d, 32], padded with zeros."""
    n, d = columns.shape
    panels = columns.new_zeros(-(-n // PANEL), d, PANEL)
    whole = n // PANEL * PANEL
    panels[: n // PANEL] = columns[:whole].reshape(-1, PANEL, d).transpose(1, 2)
    if whole < n:
        panels[-1, :, : n - whole] = columns[whole:].T
    return panels


@torch.no_grad()
def screen_products(
    rows: Tensor, panels: Tensor, threshold: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What p_ij = rows_i . column_j exceeds, without a matrix of them: 2 m c d operations.

    rows [m, d], panels [>= c / 32, d, 32] (`packed_columns`), threshold [c], c a multiple of 32:
    float32 on the CPU. Returns (largest [m] float32, where [m] int64, pairs [k, 2] int64): the
    largest product of each row and the first column that has it (-inf and 0 where c = 0), and all
    (i, j) with a product that is not <= threshold_j, NaN included; where these are more than
    `most`, more than `most` of them.

    Each product is a sum in the order of the index, with or without fused multiply-adds, whatever
    torch's settings of precision: |p_ij - exact| <= gamma_d sum_k |rows_ik column_jk|, u = 2^-24,
    but for underflow (Higham 2002, section 3.1). Raises ValueError for other shapes or dtypes.
    """
    return _ops.screen_products(rows, panels, threshold, most)


@torch.library.register_fake("twophase::screen_products")
def _(rows: Tensor, panels: Tensor, threshold: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    m = rows.shape[0]
    found = torch.library.get_ctx().new_dynamic_size()
    where = rows.new_empty(m, dtype=torch.int64)
    return rows.new_empty(m), where, where.new_empty(found, 2)
