"""What a notebook shows of an object: a few elements of HTML, every text escaped."""

from collections.abc import Iterable, Sequence
from html import escape


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{escape(text)}</p>"


def folded(summary: str, text: str) -> str:
    """Lines of plain text behind their summary; nothing where there are none."""
    if not text:
        return ""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, aligned left."""

    def row(cells: Sequence[str], tag: str) -> str:
        shown = (f'<{tag} style="text-align: left">{escape(cell)}</{tag}>' for cell in cells)
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"
