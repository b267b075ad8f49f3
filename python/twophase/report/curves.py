"""Line charts as SVG that stands inside the page and takes its colours from there."""

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..figures import STYLE

COLOURS = 6  # --line-0 .. --line-5 in the template
DASHES = ("", "6 3", "2 2", "8 2 2 2")  # SVG's stroke-dasharray, in points
SIZE = (4.4, 2.6)  # inches: as wide as a phone's screen, so that no text gets small
LOG_FROM = 10.0  # largest over smallest value from which the axis is logarithmic
# Colours in matplotlib's output that become those of the page, in light and dark.
TEXT, GRID, TAU = "#010101", "#020202", "#030303"
PAGE = {TEXT: "currentColor", GRID: "var(--rule)", TAU: "var(--muted)"}
PAGE |= {f"#0400{i:02x}": f"var(--line-{i})" for i in range(COLOURS)}


@dataclass(frozen=True)
class Line:
    """One curve: label, its points (finite ones are drawn), colour and dash by their numbers."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dash: int = 0

    @staticmethod
    def numbered(i: int, label: str, points: Sequence[tuple[float, float]]) -> "Line":
        """The i-th of many: 24 lines differ in colour or dash, neighbours in both."""
        return Line(label, points, i % COLOURS, (i + i // COLOURS) % len(DASHES))

    @property
    def dasharray(self) -> str:
        """SVG's stroke-dasharray of this line, "" for a solid one."""
        return DASHES[self.dash]


@dataclass(frozen=True)
class Chart:
    """A figure of the page: SVG, every text in it escaped; its title; the lines of its legend."""

    svg: str
    title: str
    lines: Sequence[Line]


def chart(
    name: str,
    title: str,
    lines: Sequence[Line],
    *,
    xlabel: str,
    ylabel: str,
    taus: Sequence[float] = (),
    percent: bool = False,
) -> Chart | None:
    """Draw lines; None where no point is finite.

    name: prefix of every id in the SVG, unique on the page. taus: where to mark tau. percent: the
    values are shares, from 0 to 1. Otherwise the axis is logarithmic where the values ask for it.
    """
    finite = [
        Line(
            line.label,
            [p for p in line.points if all(map(math.isfinite, p))],
            line.colour,
            line.dash,
        )
        for line in lines
    ]
    values = [y for line in finite for _, y in line.points]
    if not values:
        return None
    style: Any = STYLE | {
        "font.size": 10,
        "svg.fonttype": "none",
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        axes.grid(axis="y", color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        for line in finite:
            dash = [float(part) for part in line.dasharray.split()]
            axes.plot(
                [x for x, _ in line.points],
                [y for _, y in line.points],
                color=f"#0400{line.colour:02x}",
                lw=1.6,
                ls=(0, dash) if dash else "-",
                marker="o" if len(line.points) == 1 else "",
                dash_capstyle="butt",
            )
        for tau in taus:
            axes.axvline(tau, color=TAU, lw=1, ls=(0, (1, 2)))
            axes.annotate(
                "tau",
                (tau, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                color=TAU,
            )
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g} %"))
        elif min(values) > 0 and max(values) >= LOG_FROM * min(values):
            axes.set_yscale("log")
            dense = max(values) < 1e3 * min(values)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if dense else (1,)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    described = _describe(lines, xlabel, taus)
    return Chart(_inline(file.getvalue(), name, title, described), title, lines)


def _describe(lines: Sequence[Line], xlabel: str, taus: Sequence[float]) -> str:
    """The figure in words: where each line begins and ends."""
    said = []
    for line in lines:
        if not line.points:
            said.append(f"{line.label}: no values.")
            continue
        (x0, y0), (x1, y1) = line.points[0], line.points[-1]
        said.append(f"{line.label}: {y0:.4g} at {xlabel} {x0:g}, {y1:.4g} at {xlabel} {x1:g}.")
        left_out = sum(not math.isfinite(y) for _, y in line.points)
        if left_out:
            said.append(f"{left_out} of its values are not finite and not drawn.")
    said += [f"tau before {xlabel} {math.ceil(tau)}." for tau in taus]
    return " ".join(said)


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """matplotlib's SVG as part of a page: own ids, the page's colours and font, a text for it."""
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):  # RDF with addresses; style rules that would reach the page
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            key = key.rpartition("}")[2]
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = f"#{name}-{value[1:]}"
            value = value.replace("url(#", f"url(#{name}-")
            if key == "style":
                value = re.sub("#[0-9a-f]{6}", lambda m: PAGE.get(m[0], m[0]), value)
                value = re.sub(r"font:[^;]*?([\d.]+px)[^;]*", r"font-size: \1", value)
                value = re.sub(r"font-family:[^;]*;?", "", value)
            element.set(key, value)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "class": "chart",
        "role": "img",
        "aria-labelledby": f"{name}-title",
        "aria-describedby": f"{name}-text",
    }
    for position, (tag, key, text) in enumerate(
        (("title", "title", title), ("desc", "text", description))
    ):
        element = ET.Element(tag, {"id": f"{name}-{key}"})
        element.text = text
        root.insert(position, element)
    return ET.tostring(root, encoding="unicode")
