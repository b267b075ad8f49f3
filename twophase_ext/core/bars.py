"""The bar of a long computation, where standard output is a terminal."""

import sys

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def bar(*texts: str) -> Progress | None:
    """rich's: description, bar, these templates of text, time left. None off a terminal."""
    if not sys.stdout.isatty():
        return None
    columns = (TextColumn(text) for text in texts)
    return Progress(TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
