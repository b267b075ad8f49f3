"""lambda_min(M M^T) from a black-box Cholesky factor in one n x n float64 matrix on one device.

G = fl(M M^T) is summed in the lower triangle (gram_tiles.py: each product of tiles formed apart,
then added) and copied to the upper one, which keeps it; its diagonal is kept apart. A library
factors the lower triangle of G - s I in place, and residual.py measures what it left there:
    lambda_min(M M^T) >= ell = s - e_G - || L L^T - (G - s I) ||_2,
for any lower triangular L. M M^T - L L^T >= ell I, so ell > 0 gives log det(M M^T) >=
2 sum log |l_ii| as well. Nothing is assumed of the library, except that what it writes above the
diagonal changes a checksum; an `info` that lies costs the proof, never its truth.

Memory, for panels of b columns and tiles of t rows:
    8 (n^2 + max(3 n b, 5 k^2, n t) + 4 t^2) <= memory,
a panel with what its source and its scaling need beside it; subsamples of k rows (shift.py); n t
doubles for the library's workspace. n = 60,000, b = 2,000: 29.7 GiB.
"""

import ctypes
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.memory import available_memory
from .bounds import power_of_two, shifted_down
from .gram_run import GramCertificate, GramRun
from .gram_tiles import PANEL, PanelSource, lower_product, new_tile
from .plan import LARGE_TILE, SHARE, TILE, Plan, _measured_rate
from .progress import Stages
from .residual import residual_bound
from .shift import LARGEST
from .tiles import DenseTiles, Grid, Tiles

SMALLEST_PANEL = 250  # columns; narrower products waste most of a GPU
FILL_UPPER, R_64F = 1, 1  # CUBLAS_FILL_MODE_UPPER, CUDA_R_64F
Potrf = Callable[[Tensor], int]


def xpotrf_library() -> ctypes.CDLL | None:
    """The cuSOLVER that CuPy loads; None without CuPy or where it lacks cusolverDnXpotrf.

    CuPy has no binding of Xpotrf (cupy issue 9393), so the loaded library is called itself.
    """
    try:
        from cupy.cuda import device

        device.get_cusolver_handle()
        with open("/proc/self/maps", encoding="utf-8") as lines:
            loaded = [line.split(maxsplit=5)[5] for line in lines if "/libcusolver.so" in line]
        library = ctypes.CDLL(loaded[0].strip())
        library.cusolverDnXpotrf  # noqa: B018  AttributeError before CUDA 11.1
    except (ImportError, OSError, IndexError, AttributeError):
        return None
    return library


def potrf_in_place(matrix: Tensor) -> int:
    """Factor the lower triangle of a float64 [n, n] row-major matrix in place; LAPACK's info.

    0, or k where the leading minor of order k is not positive. What lies above the diagonal stays.
    CUDA: cuSOLVER's 64-bit Xpotrf on the current stream; CPU: dpotrf. Raises RuntimeError where
    the library is missing or refuses the call, ValueError for another layout.
    """
    n = len(matrix)
    if matrix.dtype != torch.float64 or matrix.shape != (n, n) or not matrix.is_contiguous():
        raise ValueError(
            f"matrix: expected a contiguous float64 [n, n], got {matrix.dtype} "
            f"{list(matrix.shape)}, strides {matrix.stride()}"
        )
    if matrix.is_cuda:
        library = xpotrf_library()
        if library is None:
            raise RuntimeError("matrix: on CUDA expected CuPy with cuSOLVER's Xpotrf, found none")
        return _xpotrf(library, matrix)
    from scipy.linalg import lapack

    # row-major lower is column-major upper
    factor, info = lapack.dpotrf(matrix.T.numpy(), lower=0, clean=0, overwrite_a=1)
    if info < 0 or factor.ctypes.data != matrix.data_ptr():
        raise RuntimeError(f"dpotrf: expected a factor in place, got a copy or info = {info}")
    return int(info)


def _xpotrf(library: ctypes.CDLL, matrix: Tensor) -> int:
    """cusolverDnXpotrf with a handle of this very library: CuPy's may be another's."""

    def call(name: str, *arguments: object) -> None:
        status = getattr(library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: expected status 0, got {status} (n = {len(matrix)})")

    n, pointer = ctypes.c_int64(len(matrix)), ctypes.c_void_p(matrix.data_ptr())
    handle, params = ctypes.c_void_p(), ctypes.c_void_p()
    on_device, on_host = ctypes.c_size_t(), ctypes.c_size_t()
    with torch.cuda.device(matrix.device):
        call("cusolverDnCreate", ctypes.byref(handle))
        try:
            stream = torch.cuda.current_stream().cuda_stream
            call("cusolverDnSetStream", handle, ctypes.c_void_p(stream))
            call("cusolverDnCreateParams", ctypes.byref(params))
            problem = (handle, params, FILL_UPPER, n, R_64F, pointer, n, R_64F)
            sizes = ctypes.byref(on_device), ctypes.byref(on_host)
            call("cusolverDnXpotrf_bufferSize", *problem, *sizes)
            work = torch.empty(on_device.value, dtype=torch.uint8, device=matrix.device)
            host_work = ctypes.create_string_buffer(on_host.value + 1)
            info = torch.zeros(1, dtype=torch.int32, device=matrix.device)
            call(
                "cusolverDnXpotrf",
                *problem,
                ctypes.c_void_p(work.data_ptr()),
                on_device,
                host_work,
                on_host,
                ctypes.c_void_p(info.data_ptr()),
            )
            result = int(info)  # waits: the workspaces are in use until then
        finally:
            if params:
                library.cusolverDnDestroyParams(params)
            library.cusolverDnDestroy(handle)
    if result < 0:
        raise RuntimeError(f"cusolverDnXpotrf: expected info >= 0, got {result}")
    return result


def plan_in_place(source: PanelSource, panel: int = PANEL, memory: int | None = None) -> Plan:
    """Sizes by the inequality above; the panel is halved until it fits.

    memory: bytes (default: SHARE of what is free on the device). Raises ValueError for sizes below
    1 (columns: 0), MemoryError with the numbers.
    """
    n, columns, device = source.n, source.columns, source.device
    for name, value, least in (("n", n, 1), ("columns", columns, 0), ("panel", panel, 1)):
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    tile = min(TILE if n <= 20_000 else LARGE_TILE, n)
    have = int(SHARE * available_memory(device)) if memory is None else memory
    while True:
        rest = max(3 * n * min(panel, max(columns, 1)), 5 * min(n, LARGEST) ** 2, n * tile)
        need = 8 * (n * n + rest + 4 * tile**2)
        if need <= have or panel // 2 < SMALLEST_PANEL:
            break
        panel //= 2
    if need > have:
        raise MemoryError(
            f"n = {n} rows in place need {need / 2**30:.3g} GiB with panels of {panel} columns; "
            f"there are {have / 2**30:.3g} GiB"
        )
    flops = float(n) * (n + tile) * columns + 2 * n**3 / 3 + float(n) ** 2 * tile
    on_cuda = device.type == "cuda"
    return Plan(
        n=n,
        columns=columns,
        tile=tile,
        panel=panel,
        gram="upper triangle",
        factor="lower triangle",
        device_bytes=need if on_cuda else 0,
        host_bytes=0 if on_cuda else need,
        disk_bytes=0,
        group_bytes=8 * n * n,
        passes=1,
        flops=flops,
        seconds=flops / _measured_rate(device, min(n, 1024)),
    )


def usable(source: PanelSource, panel: int, memory: int | None) -> bool:
    """Whether cuSOLVER's Xpotrf is there and the matrix fits: `certify_gram` then works here."""
    if xpotrf_library() is None:
        return False
    try:
        plan_in_place(source, panel, memory)
    except MemoryError:
        return False
    return True


def certify_in_place(
    source: PanelSource,
    *,
    shift: float | None = None,
    scale_rows: bool | None = None,
    potrf: Potrf | None = None,
    panel: int = PANEL,
    memory: int | None = None,
    stages: Stages | None = None,
) -> GramCertificate:
    """Prove lambda_min(M M^T) >= ell as the top of the file says; arguments as of `certify_gram`.

    potrf: as `potrf_in_place`, the default. e_C of the result is the bound of the residual. panel:
    at most so many columns. Raises ValueError for a wrong argument, MemoryError where the matrix
    does not fit, RuntimeError where the library refuses the call.
    """
    if shift is not None and not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift: expected a positive number, got {shift}")
    sizes = plan_in_place(source, panel, memory)
    result = GramCertificate(source.n, source.columns, tile=sizes.tile, panel=sizes.panel)
    if source.n > source.columns:
        result.reason = f"{source.n} rows of {source.columns} columns are dependent"
        return result
    stages = Stages(False, None) if stages is None else stages
    run = _InPlace(source, sizes, scale_rows, shift, stages, result, potrf or potrf_in_place)
    try:
        stages.announce(str(sizes))
        run.certify(shift, None)
    finally:
        run.close()
    return result


class UpperTiles(DenseTiles):
    """The lower tiles of a symmetric matrix, read from its upper triangle and a diagonal apart."""

    def __init__(self, matrix: Tensor, diagonal: Tensor, tile: int) -> None:
        """matrix: float64 [n, n]; diagonal: float64 [n]."""
        super().__init__(matrix.T, tile)
        self._diagonal = diagonal

    def read(self, i: int, j: int) -> Tensor:
        """A view of the tile; of the diagonal's a copy of the lower half."""
        tile = super().read(i, j)
        if i == j:
            tile.diagonal().copy_(self._diagonal[self.grid.rows(i)])
        return tile


class _InPlace(GramRun):
    """One call of certify_in_place."""

    def __init__(
        self,
        source: PanelSource,
        sizes: Plan,
        scale_rows: bool | None,
        shift: float | None,
        stages: Stages,
        result: GramCertificate,
        potrf: Potrf,
    ) -> None:
        super().__init__(source, sizes, None, "", False, scale_rows, shift, stages, result)
        self.potrf = potrf
        self.matrix = torch.zeros(sizes.n, sizes.n, dtype=torch.float64, device=source.device)
        self.diagonal = self.matrix.diagonal()

    def _gram(self, exponents: Tensor, passes: int | None) -> UpperTiles:
        """One pass over the columns; passes: not looked at."""
        source, grid, matrix = self.source, self.grid, self.matrix
        scale = power_of_two(-exponents)[:, None] if bool(exponents.any()) else None
        buffer = new_tile((grid.tile**2,), source.device)
        n, p = float(source.n), source.columns
        with self.stages.stage("Gram", n * (n + grid.tile) * p) as stage:
            for start in range(0, p, self.sizes.panel):
                columns = source.panel(start, min(start + self.sizes.panel, p))
                if scale is not None:
                    columns = columns * scale
                for i, j in grid.lower():
                    rows, others = grid.rows(i), grid.rows(j)
                    block = matrix[rows, others]
                    product = buffer[: block.numel()].view(block.shape)
                    flops = lower_product(columns[rows], columns[others], i == j, product)
                    block += product
                    stage.advance(flops)
            _mirror(matrix, grid)
            self.diagonal = matrix.diagonal().clone()
            stage.advance(0, len(list(grid.lower())))
        self.result.passes = 1
        return UpperTiles(matrix, self.diagonal, grid.tile)

    def _attempt(self, gram: Tiles, attempt: int, s: float, exponents: Tensor) -> bool:
        """Factor G - s I and measure the residual; whether that settles the matter."""
        result, matrix, grid, n = self.result, self.matrix, self.grid, float(self.source.n)
        result.attempts, result.shift = attempt, s
        before = _checksums(matrix, grid)
        _mirror(matrix.T, grid)
        matrix.diagonal().copy_(shifted_down(self.diagonal, s))
        with self.stages.stage(f"Cholesky, s = {s:.3g}", n**3 / 3) as stage:
            info = self.potrf(matrix)
            stage.advance(n**3 / 3)
        if not torch.equal(before, _checksums(matrix, grid)):
            result.reason = "the library wrote above the diagonal: G is lost"
            return True
        if info:
            result.failed_pivot = info - 1
            result.reason = f"no positive pivot in row {result.failed_pivot}, s = {s:.3g}"
            self.stages.say(result.reason)
            return False
        lower = DenseTiles(matrix, grid.tile)
        work = n**3 / 3 + n**2 * grid.tile
        with self.stages.stage("residual", work) as stage:
            # squares below 2^-1022 are lost
            error = residual_bound(gram, lower, s) + n * 2.0**-510
            stage.advance(work)
        self._settle(error, lower, s, exponents)
        return True


def _mirror(matrix: Tensor, grid: Grid) -> None:
    """Copy the lower triangle onto the upper one."""
    for i, j in grid.lower():
        rows, others = grid.rows(i), grid.rows(j)
        block = matrix[rows, others]
        matrix[others, rows] = block.T if i > j else block.tril() + block.tril(-1).T


def _checksums(matrix: Tensor, grid: Grid) -> Tensor:
    """int64 [n]: sums of the bits above the diagonal, row by row, each with an odd weight.

    Modulo 2^64: one changed entry of a row always shows.
    """
    bits = matrix.view(torch.int64)
    weights = 2 * torch.arange(len(matrix), device=matrix.device).square_() + 1
    sums = torch.zeros_like(weights)
    for i, j in grid.lower():
        block = bits[grid.rows(j), grid.rows(i)]
        block = block if i > j else block.triu(1)
        sums[grid.rows(j)] += (block * weights[grid.rows(i)]).sum(1)
    return sums
