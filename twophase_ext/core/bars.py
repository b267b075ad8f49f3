"""The bar of a long computation, where standard output is a terminal."""

import sys
from typing import Any


def bar(*texts: str) -> Any:
    """A rich.progress.Progress: description, bar, these templates of text, time left.

    None off a terminal.
    """
    if not sys.stdout.isatty():
        return None
    # here, so that `import twophase_ext` needs torch and numpy alone
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(text) for text in texts)
    return Progress(TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
