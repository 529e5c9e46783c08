"""A page: sections of text, charts, tables and facts, as one HTML file that loads nothing.

Names in checkpoints and plans are hostile until shown otherwise: everything is escaped by the template engine, control
characters are shown as such, and the page's own policy forbids whatever style or script is not in it by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from quantplan.checkpoint.durable import named_errors, write_durably
from quantplan.errors import printable
from quantplan.report.charts import NARROW, WIDE, require_report
from quantplan.report.svg import Chart, inline

BREAKS = re.compile(r"(?<=[._/])(?=[^._/])")


@dataclass(frozen=True)
class Figure:
    """A number to see first."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; a `note` is one to heed."""

    text: str
    note: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Drawing:
    """A chart as `draw(width)` makes it, and what it says."""

    draw: Callable[[int], Chart | None]
    caption: str
    kind: ClassVar[str] = "chart"


@dataclass(frozen=True)
class Listing:
    """A file, line by line, numbered."""

    label: str
    lines: Sequence[str]
    kind: ClassVar[str] = "source"


@dataclass(frozen=True)
class Facts:
    """Names and values; `names`: the values are names, hashes or versions."""

    rows: Sequence[tuple[str, str]]
    names: bool = False
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Column:
    """A heading; `sorted`: none, ascending or descending, as the rows come; `hint`: what it means."""

    label: str
    number: bool = True
    sorted: str = "none"
    hint: str = ""


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number rows are sorted by; None goes last."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each its name. A click on a heading sorts by it."""

    label: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Section:
    """A heading and what is below it; parts that are None are left out."""

    title: str
    parts: Sequence[Text | Heading | Drawing | Listing | Facts | Table | None]


def signed(value: float) -> str:
    """A whole number with its sign, which is a minus and no hyphen."""
    return f"{value:+.0f}".replace("-", "−")


def rounded(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def number(value: float | None, form: str = ".2f", unit: str = "") -> Cell:
    """A cell of a number, which may be missing or infinite."""
    if value is None or not math.isfinite(value):
        return Cell("" if value is None else "exact" if value > 0 else "−∞", None)
    return Cell(f"{value:{form}}{unit}".replace("-", "−"), value)


def render_page(title: str, subtitle: str, figures: Sequence[Figure], sections: Sequence[Section], footer: str) -> str:
    """The HTML file. Raises QP405 where jinja2 or matplotlib are missing."""
    require_report()
    import jinja2
    from markupsafe import Markup, escape

    def breakable(text: object) -> Markup:
        """Escaped, with places where a long name may be broken."""
        return Markup("<wbr>").join(escape(part) for part in BREAKS.split(str(text)))

    def shown(value: object) -> object:
        """What a template prints: strings without control characters."""
        return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value, 10_000)

    loader = jinja2.PackageLoader("quantplan.report", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=shown
    )
    environment.filters["breakable"] = breakable
    style, script = (_asset(environment, name) for name in ("page.css", "sort.js"))
    return environment.get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        figures=figures,
        sections=list(_drawn(sections, Markup)),
        footer=footer,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def write_page(path: Path, page: str) -> None:
    """Writes a page to `path`, whole or not at all. Raises QP401 to QP403 where it cannot be written."""
    with named_errors(path):
        write_durably(path, page.encode())


def _asset(environment: Any, name: str) -> str:
    """A file of ours beside the templates, as it is."""
    source: str = environment.loader.get_source(environment, name)[0]
    return source


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _drawn(sections: Sequence[Section], markup: Any) -> Any:
    """Sections with their charts drawn, each for a wide and for a narrow page; what could not be drawn is left out."""
    count = 0
    for section in sections:
        parts: list[Any] = []
        for part in section.parts:
            if not isinstance(part, Drawing):
                parts += [] if part is None else [part]
                continue
            count += 1
            wide, narrow = part.draw(WIDE), part.draw(NARROW)
            if wide is not None and narrow is not None:
                svg = (markup(inline(wide, f"c{count}w-")), markup(inline(narrow, f"c{count}n-", "narrow")))
                parts.append({"kind": "chart", "wide": svg[0], "narrow": svg[1], "caption": part.caption})
        if parts:
            yield {"title": section.title, "parts": parts}
