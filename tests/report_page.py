"""An HTML report, read strictly."""

import re
from html.parser import HTMLParser
from pathlib import Path

from twophase.report import write_report

VOID = {"meta", "link", "img", "br", "hr", "wbr", "input"}


class Page(HTMLParser):
    """A strict reader: every element closed in its order; what the tests ask for is kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.headings: list[tuple[int, str]] = []
        self.tables: list[list[list[str]]] = []
        self.pairs: list[tuple[str, str]] = []
        self.text = ""
        self.svg_text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.ids = [a["id"] for _, a in self.elements if "id" in a]

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "dt":
            self.pairs.append(("", ""))

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open, tag  # elsewhere HTML ignores the slash
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        if "style" in self.open:
            return
        if "svg" in self.open:
            self.svg_text += data
            return
        self.text += data
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if "dt" in self.open or "dd" in self.open:
            name, value = self.pairs[-1]
            self.pairs[-1] = (name + data, value) if "dt" in self.open else (name, value + data)

    def table(self, first: str) -> list[list[str]]:
        """The rows of the only table whose head begins with `first`."""
        (found,) = [t for t in self.tables if t[0][0] == first]
        return [[cell.strip() for cell in row] for row in found[1:]]


def report(*folders: Path, out: Path | None = None) -> Page:
    """The report about run folders, written beside the first one unless said otherwise."""
    out = out or folders[0].parent / "report.html"
    assert write_report(folders, out) == out
    found = Page(out.read_text(encoding="utf-8"))
    found.text = re.sub(r"\s+", " ", found.text)
    return found
