"""`certify_gram`: a proved lower bound of lambda_min(M M^T), by tiles or in place."""

import math
from collections.abc import Callable
from pathlib import Path

from . import in_place
from .gram_run import GramCertificate, GramRun
from .gram_tiles import PANEL, PanelSource
from .plan import plan
from .progress import Stages


def certify_gram(
    source: PanelSource,
    *,
    folder: Path | None = None,
    key: str = "",
    resume: bool | str = True,
    shift: float | None = None,
    scale_rows: bool | None = None,
    memory: int | None = None,
    tile: int | None = None,
    panel: int = PANEL,
    passes: int | None = None,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
    stages: Stages | None = None,
) -> GramCertificate:
    """Prove lambda_min(M M^T) >= ell for the float64 columns that `source` makes.

    folder: an existing one; the tiles then go to the file tiles.bin in it (they stay there) and a
    run that was killed goes on where it stopped. key identifies M: a folder of another key, size or
    setting is refused. resume=False starts anew, resume="own" only in a folder of another key.
    shift: s, tried alone; by default from subsamples, lowered after a failure (shift.py).
    scale_rows: rows by powers of two; None looks at their sizes in one more pass over the columns,
    False leaves that away. memory, tile, panel: `plan`; passes: `gram_tiles.accumulate`.
    On CUDA without folder, tile and passes the matrix is factored in place where CuPy is installed
    and it fits (in_place.py).
    progress: a bar on a terminal. say: gets lines of text. stages: a caller's own instead of both.
    Raises ValueError for a wrong argument, MemoryError where the tiles fit nowhere, RuntimeError
    where another process uses the folder. Whatever the matrix, its failure is a result.
    """
    if folder is not None and not key:
        raise ValueError("key: expected what identifies the matrix, as a folder is given, got ''")
    if shift is not None and not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift: expected a positive number, got {shift}")
    if passes is not None and passes < 1:
        raise ValueError(f"passes: expected 1 or more, got {passes}")
    folder = None if folder is None else Path(folder)
    own_way = folder is not None or tile is not None or passes is not None
    if source.device.type == "cuda" and not own_way and in_place.usable(source, panel, memory):
        return in_place.certify_in_place(
            source,
            shift=shift,
            scale_rows=scale_rows,
            panel=panel,
            memory=memory,
            stages=Stages(progress, say) if stages is None else stages,
        )
    sizes = plan(
        source.n,
        source.columns,
        tile=tile,
        panel=panel,
        folder=folder,
        memory=memory,
        device=source.device,
    )
    result = GramCertificate(source.n, source.columns, tile=sizes.tile, panel=panel)
    if source.n > source.columns:
        result.reason = f"{source.n} rows of {source.columns} columns are dependent"
        return result
    stages = Stages(progress, say) if stages is None else stages
    run = GramRun(source, sizes, folder, key, resume, scale_rows, shift, stages, result)
    try:
        run.stages.announce(str(sizes))
        run.certify(shift, passes)
    finally:
        run.close()
    return result
