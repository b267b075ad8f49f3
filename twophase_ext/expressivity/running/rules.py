"""How an error passes through an operator, by sample, in the 2-norm: every rule by name.

An operator f of Lipschitz constant K, whose computed result on the computed input is off by r,
turns an error e into K e + r; r is bounded as in Higham (2002), section 3: a sum of k products in
any order is off by gamma_k times the sum of the absolute values. u: of the type that the operator
computes in.
"""

from collections.abc import Callable

from .call import Call, Result
from .choices import CHOICES
from .elementwise import ELEMENTWISE
from .moves import MOVES
from .normalization import NORMALIZATION
from .places import PLACES
from .products import PRODUCTS
from .reductions import REDUCTIONS

__all__ = ["MOVES", "RULES", "Call", "Result"]

RULES: dict[str, Callable[[Call], list[Result]]] = {
    **ELEMENTWISE,
    **CHOICES,
    **MOVES,
    **NORMALIZATION,
    **PLACES,
    **PRODUCTS,
    **REDUCTIONS,
}
