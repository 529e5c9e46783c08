"""matplotlib's figures as SVG: files of their own, or parts of a page whose colours and fonts are the page's.

A page's policy forbids style attributes, and several figures share its ids. So declarations become attributes, which the
policy allows, known colours become the page's variables (dark mode is then the page's matter), and ids get a prefix.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
# colour in a figure -> variable of the page (page.css gives it a value in each colour scheme)
COLOURS = {
    "#1b1f24": "--ink", "#66707c": "--muted", "#dde2e8": "--line", "#ffffff": "--paper",
    "#2563c9": "--accent", "#b45309": "--warm", "#8b95a1": "--quiet", "#9cb8e8": "--accent-soft",
}  # fmt: skip
INK, MUTED, LINE, PAPER, ACCENT, WARM, QUIET, ACCENT_SOFT = COLOURS
KEPT = {"fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linecap",
        "stroke-linejoin", "opacity", "font-size", "font-weight", "text-anchor"}  # fmt: skip
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "quantplan",
    "text.parse_math": False,  # names of a checkpoint are no formulas
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 1,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Chart:
    """A figure; `text`: what it shows, in words; `titles`: id of a mark -> what is shown when it is pointed at."""

    figure: Any
    text: str
    titles: Mapping[str, str] = field(default_factory=dict)


def standalone(chart: Chart) -> str:
    """The chart as a file: on white, with its colours and fonts in it."""
    import matplotlib

    chart.figure.patch.set_facecolor("white")
    with matplotlib.rc_context(SETTINGS):
        return _written(chart.figure)


def inline(chart: Chart, prefix: str, shape: str = "wide") -> str:
    """The chart as an element of a page. `prefix` keeps its ids apart; `shape` is a class: a page has the same chart `wide`
    and `narrow`, and shows one."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        root = ElementTree.fromstring(_written(chart.figure))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    for element in root.iter():
        _plain(element, prefix)
    for element in list(root.iter()):
        title = chart.titles.get(element.get("id", "").removeprefix(prefix))
        if title is not None:
            first = ElementTree.Element(f"{SVG}title")
            first.text = title
            element.insert(0, first)
    width, height = root.attrib.pop("width"), root.attrib.pop("height")
    assert width and height and root.get("viewBox")
    root.attrib |= {"class": f"chart {shape}", "role": "img", "aria-label": chart.text, "stroke-linejoin": "round"}
    ElementTree.register_namespace("", SVG[1:-1])
    return ElementTree.tostring(root, encoding="unicode")


def _written(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _plain(element: ElementTree.Element, prefix: str) -> None:
    """An element without style attributes, with ids that no other chart has."""
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name in KEPT:
            element.set(name, value)
    for name, value in list(element.attrib.items()):
        if name == "id":
            element.set(name, prefix + value)
        elif name == f"{XLINK}href":
            del element.attrib[name]
            element.set("href", f"#{prefix}{value.removeprefix('#')}")
        elif "url(#" in value:
            element.set(name, value.replace("url(#", f"url(#{prefix}"))
        elif value.lower() in COLOURS:
            element.set(name, f"var({COLOURS[value.lower()]})")
    if element.tag == f"{SVG}text":
        element.attrib.pop("font-family", None)
        if not re.match("var|#", element.get("fill", "")):
            element.set("fill", f"var({COLOURS[INK]})")
