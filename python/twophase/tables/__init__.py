"""Tables of results: what one is and how it is rendered, and the paper's two."""

from .comparison import Comparison, compare, grid
from .table import MISSING, Cell, Column, ResultTable

__all__ = ["MISSING", "Cell", "Column", "Comparison", "ResultTable", "compare", "grid"]
