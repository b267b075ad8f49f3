"""One self-contained HTML file about run folders: what ran, was guaranteed, was measured."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from twophase_ext.core.files import write_atomically

from .gather import read_folder
from .page import describe

__all__ = ["write_report"]


TEMPLATES = Environment(
    loader=PackageLoader(__name__, "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write an HTML report about one run folder or several to `out`; returns `out`.

    The file needs no network, script or other file. Several runs are compared first, then
    described one by one. What a folder lacks, or holds and cannot be read, is said in the report.

    Raises ValueError for no runs and for a config.json that cannot be read, FileNotFoundError for
    a folder that holds no run (naming what is missing), OSError where `out` cannot be written.
    """
    if not runs:
        raise ValueError("runs: expected at least one run folder, got none")
    records = [read_folder(Path(run)) for run in runs]
    text = TEMPLATES.get_template("page.html.jinja").render(describe(records))
    write_atomically(Path(out), lambda file: file.write(text.encode()))
    return Path(out)
