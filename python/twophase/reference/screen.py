"""Products of rows and columns: the largest of each row, and those above a threshold."""

import torch
from torch import Tensor


def screen_products(rows: Tensor, columns: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
    """(largest [m], where [m], pairs [k, 2]) of rows [m, d] and columns [c, d], threshold [c].

    where: the first column with the row's largest product; pairs: (row, column) of every product
    that is not <= threshold of its column, row by row.
    """
    products = rows @ columns.T
    if len(columns) == 0:
        largest, where = products.new_full((len(rows),), -torch.inf), torch.zeros(len(rows))
    else:
        largest = products.amax(1)
        where = (products == largest[:, None]).int().argmax(1)
    return largest, where.long(), (~(products <= threshold)).nonzero()
