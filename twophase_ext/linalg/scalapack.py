"""MPI ranks by ctypes: BLACS moves numbers, ScaLAPACK factors; there is nothing to compile."""

import ctypes
import ctypes.util
import math

from torch import Tensor

NAMES = ("scalapack-openmpi", "scalapack-mpich", "scalapack")
PART = 1 << 21  # numbers a message: BLACS buffers it
LARGEST = 2**31 - 1  # numbers a rank: so are ScaLAPACK's offsets


def library() -> ctypes.CDLL:
    """ScaLAPACK as the system's linker finds it. Raises RuntimeError where there is none."""
    for name in NAMES:
        found = ctypes.util.find_library(name)
        if found is not None:
            # MPI loads plug-ins that look for its symbols among the global ones
            return ctypes.CDLL(found, mode=ctypes.RTLD_GLOBAL)
    raise RuntimeError(
        f"ScaLAPACK: expected one of {', '.join(NAMES)} among the system's libraries, found none "
        "(Debian: libscalapack-openmpi-dev)"
    )


def squarest(ranks: int) -> tuple[int, int]:
    """(P, Q), P Q = ranks, P <= Q, as square as can be: a panel travels along rows and columns."""
    rows = next(p for p in range(math.isqrt(ranks), 0, -1) if ranks % p == 0)
    return rows, ranks // rows


class Scalapack:
    """The ranks of one mpirun (`block_cyclic.Ranks`)."""

    def __init__(self, grid: tuple[int, int] | None = None) -> None:
        """grid: (P, Q) (default: `squarest`). Starts MPI unless it runs already.

        Raises ValueError where P Q is not the number of ranks, RuntimeError without a library.
        """
        self._library = library()
        started = ctypes.c_int()
        self._library.MPI_Initialized(ctypes.byref(started))
        self._ours = not started.value
        rank, count, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._library.Cblacs_pinfo(ctypes.byref(rank), ctypes.byref(count))
        self.rank, self.count = rank.value, count.value
        self.grid = squarest(self.count) if grid is None else grid
        rows, columns = self.grid
        if min(self.grid) < 1 or rows * columns != self.count:
            raise ValueError(f"grid: expected P x Q = {self.count} ranks, got {rows} x {columns}")
        self._library.Cblacs_get(-1, 0, ctypes.byref(context))
        self._library.Cblacs_gridinit(ctypes.byref(context), b"Row", rows, columns)
        self._context = context.value
        self.place = divmod(self.rank, columns)

    def close(self) -> None:
        """Leave the grid; MPI ends where this object started it."""
        self._library.Cblacs_exit(0 if self._ours else 1)

    def abort(self) -> None:
        """End every rank of this mpirun, at once."""
        self._library.Cblacs_abort(self._context, 1)

    def broadcast(self, scope: str, values: Tensor, root: int) -> None:
        """As `Ranks` says."""
        own = self.place[1] if scope == "Row" else self.place[0]
        source = (self.place[0], root) if scope == "Row" else (root, self.place[1])
        for part in values.view(-1).split(PART):
            size, at = part.numel(), ctypes.c_void_p(part.data_ptr())
            message = (self._context, scope.encode(), b" ", size, 1, at, size)
            if own == root:
                self._library.Cdgebs2d(*message)
            else:
                self._library.Cdgebr2d(*message, *source)

    def total(self, values: Tensor) -> Tensor:
        """As `Ranks` says."""
        for part in values.view(-1).split(PART):
            size, at = part.numel(), ctypes.c_void_p(part.data_ptr())
            self._library.Cdgsum2d(self._context, b"All", b" ", size, 1, at, size, -1, -1)
        return values

    def mirror(self, local: Tensor, n: int, block: int) -> None:
        """As `Ranks` says: pdtran, a row of blocks at a time."""
        at, descriptor = ctypes.c_void_p(local.data_ptr()), self._descriptor(local, n, block)
        one, zero = ctypes.c_double(1), ctypes.c_double(0)
        for start in range(0, n - block, block):
            first, after = ctypes.c_int(start + 1), ctypes.c_int(start + block + 1)
            upper, lower = (at, first, after, descriptor), (at, after, first, descriptor)
            arguments = (ctypes.c_int(n - start - block), ctypes.c_int(block), one, *upper)
            self._library.pdtran_(*map(_reference, (*arguments, zero, *lower)))

    def potrf(self, local: Tensor, n: int, block: int) -> int:
        """As `Ranks` says: pdpotrf. Raises RuntimeError where it refuses the call."""
        info, one, descriptor = ctypes.c_int(), ctypes.c_int(1), self._descriptor(local, n, block)
        matrix = (ctypes.c_void_p(local.data_ptr()), one, one, descriptor)
        arguments = (ctypes.c_char(b"L"), ctypes.c_int(n), *matrix, info)
        self._library.pdpotrf_(*map(_reference, arguments), ctypes.c_size_t(1))
        if info.value < 0:
            raise RuntimeError(f"pdpotrf: expected info >= 0, got {info.value} (n = {n})")
        return info.value

    def _descriptor(self, local: Tensor, n: int, block: int) -> ctypes.Array[ctypes.c_int]:
        """Of the dense n x n matrix from whose local part this is: the nine integers of DESC_."""
        leading = max(1, local.shape[1])
        return (ctypes.c_int * 9)(1, self._context, n, n, block, block, 0, 0, leading)


def _reference(argument: object) -> object:
    """Fortran takes everything by reference; an array or a pointer is one already."""
    by_value = isinstance(argument, ctypes.c_int | ctypes.c_double | ctypes.c_char)
    return ctypes.byref(argument) if by_value else argument  # type: ignore[arg-type]
