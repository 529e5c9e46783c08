"""The charts: horizontal bars, layers as a grid, and one figure against another. Each at any width, in points."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quantplan.errors import fail, printable
from quantplan.report.svg import ACCENT, ACCENT_SOFT, INK, LINE, MUTED, PAPER, QUIET, SETTINGS, WARM, Chart

POINTS = 72  # an inch
WIDE, NARROW = 680, 330
ADVICE = "pip install 'quantplan[report]'"
COLOUR = {"accent": ACCENT, "soft": ACCENT_SOFT, "quiet": QUIET, "warm": WARM}
_NUMBER = re.compile(r"\d+")


def require_report() -> None:
    """Raises QP405 where jinja2 or matplotlib are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise fail("QP405", f"reports need {' and '.join(missing)}", ADVICE)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """An empty figure of so many points, drawn without any display."""
    require_report()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        yield Figure(figsize=(width / POINTS, height / POINTS))


@dataclass(frozen=True)
class Bar:
    """One bar from `start` to `end`; `label` stands above it, `value` (words) at its end. `low` and `high`: a range around the
    end. `colour`: accent, soft, quiet or warm."""

    label: str
    end: float
    value: str
    start: float = 0.0
    colour: str = "accent"
    low: float | None = None
    high: float | None = None


def bar_chart(bars: Sequence[Bar], text: str, width: int = WIDE) -> Chart:
    """Horizontal bars, one below the other, each with its name above it and its value beside it: no axis to read from."""
    row, right = 40, (max(len(b.value) for b in bars) * 6.6 + 12) / width
    with _figure(width, row * len(bars) + 6) as figure:
        axes = figure.add_axes((0.003, 0, 1 - right, 1))
        axes.set_axis_off()
        top = max([b.end for b in bars] + [b.start for b in bars] + [b.high or 0 for b in bars]) or 1.0
        axes.set_xlim(0, top)
        axes.set_ylim(len(bars), 0)
        for place, bar in enumerate(bars):
            low, high = sorted((bar.start, bar.end))
            axes.barh(place + 0.68, high - low, 0.36, left=low, color=COLOUR[bar.colour], clip_on=False)
            axes.text(0, place + 0.36, _short(bar.label, width / 6.4), va="baseline", color=INK, clip_on=False)
            reach = max(high, bar.high or 0)
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [place + 0.68] * 2, color=INK, linewidth=1.5, clip_on=False)
            axes.annotate(
                bar.value,
                (reach, place + 0.68),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
                annotation_clip=False,
            )
            if bar.start:  # a step down: joined to where the last one ended
                axes.plot([bar.start] * 2, [place - 0.14, place + 0.5], color=LINE, linewidth=1, clip_on=False, zorder=0)
    return Chart(figure, text)


def _short(label: str, limit: float) -> str:
    """A label that fits: its middle is left out where it is too long, since names differ at their ends."""
    label, limit = printable(label), int(limit)
    if len(label) <= limit:
        return label
    return f"{label[: limit // 2 - 1]}…{label[-(limit // 2) :]}"


@dataclass(frozen=True)
class Cell:
    """One matrix: `value` decides its shade, `shown` says it."""

    name: str
    value: float
    shown: str


def place_of(name: str) -> tuple[str, int, str] | None:
    """(stack, block, layer within it) of a module, by the first number in its name; further numbers, of experts, are left
    out. None for a module outside of blocks."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if _NUMBER.fullmatch(part)), None)
    if at is None:
        return None
    rest = ("*" if _NUMBER.fullmatch(part) else part for part in parts[at + 1 :])
    return ".".join(parts[:at]), int(parts[at]), ".".join(rest)


def grid_chart(
    cells: Sequence[Cell], text: str, ends: tuple[str, str], dark_is_low: bool = True, width: int = WIDE
) -> Chart | None:
    """Layers as a grid: a row for each kind of layer, a column for each block, darker where the value is lower (or higher).
    `ends`: what the palest and the darkest shade mean. Of several experts the darkest is shown. None where there are no
    blocks, or more kinds of layers than rows can be read."""
    found: dict[tuple[str, int], Cell] = {}
    for cell in cells:
        place = place_of(cell.name)
        if place is None or not math.isfinite(cell.value):
            continue
        key = (f"{place[0]}|{place[2]}", place[1])
        worse = key not in found or (cell.value < found[key].value) == dark_is_low
        if worse:
            found[key] = cell
    rows = list(dict.fromkeys(row for row, _ in found))
    blocks = sorted({block for _, block in found})
    if not rows or len(rows) > 40:
        return None
    stacks = {row.partition("|")[0] for row in rows}
    names = [row.partition("|")[2] if len(stacks) == 1 else row.replace("|", " ") for row in rows]
    low, high = min(c.value for c in found.values()), max(c.value for c in found.values())
    span, narrow = (high - low) or 1.0, width < 500
    names = [_short(name.replace("self_attn.", "attn."), 24 if narrow else 40) for name in names]
    step, left = 24, (max(max(map(len, names)), 5) * 6.4 + 12) / width
    height = step * len(rows) + 62
    titles: dict[str, str] = {}
    with _figure(width, height) as figure:
        axes = figure.add_axes((left, 24 / height, 0.985 - left, step * len(rows) / height))
        axes.set_xlim(0, len(blocks))
        axes.set_ylim(len(rows), 0)
        for side in axes.spines.values():
            side.set_visible(False)
        _cells(axes, found, rows, blocks, titles, lambda v: ((high - v) if dark_is_low else (v - low)) / span)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], names)
        every = max(1, math.ceil(len(blocks) / (10 if narrow else 16) / 5) * 5) if len(blocks) > 16 or narrow else 1
        shown = [i for i, block in enumerate(blocks) if block % every == 0]
        axes.set_xticks([i + 0.5 for i in shown], [str(blocks[i]) for i in shown])
        axes.tick_params(length=0, pad=4)
        figure.text(left - 0.008, 9 / height, "block", color=MUTED, ha="right")
        _legend(figure, 0.004 if narrow else left, 1 - 18 / height, width, height, ends)
    return Chart(figure, text, titles)


def _cells(
    axes: Any,
    found: Mapping[tuple[str, int], Cell],
    rows: Sequence[str],
    blocks: Sequence[int],
    titles: dict[str, str],
    shade: Any,
) -> None:
    from matplotlib.patches import Rectangle

    for number, ((row, block), cell) in enumerate(found.items()):
        corner = (blocks.index(block) + 0.04, rows.index(row) + 0.05)
        patch = Rectangle(corner, 0.92, 0.9, facecolor=ACCENT, alpha=0.1 + 0.9 * shade(cell.value), linewidth=0, clip_on=False)
        patch.set_gid(f"t{number}")
        titles[f"t{number}"] = printable(f"{cell.name}: {cell.shown}")
        axes.add_patch(patch)


def _legend(figure: Any, left: float, bottom: float, width: float, height: float, ends: tuple[str, str]) -> None:
    from matplotlib.patches import Rectangle

    at = left
    figure.text(at, bottom + 3 / height, ends[0], color=MUTED)
    at += (len(ends[0]) * 6.3 + 8) / width
    for shade in range(5):
        box = Rectangle((at, bottom), 14 / width, 13 / height, transform=figure.transFigure, linewidth=0)
        box.set(facecolor=ACCENT, alpha=0.1 + 0.9 * shade / 4)
        figure.add_artist(box)
        at += 15 / width
    figure.text(at + 6 / width, bottom + 3 / height, ends[1], color=MUTED)


@dataclass(frozen=True)
class Point:
    """One model: `x` and `y`, and whether it is on the front (nothing is better in both)."""

    label: str
    x: float
    y: float
    best: bool


def pareto(points: Sequence[tuple[str, float, float]]) -> list[Point]:
    """Points `(label, x, y)`, less being better in both, by `x`; those that no other beats in both are on the front."""
    made = []
    for label, x, y in sorted(points, key=lambda p: (p[1], p[2])):
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for _, a, b in points)
        made.append(Point(label, x, y, not beaten))
    return made


def pareto_chart(
    points: Sequence[Point],
    text: str,
    axes_text: tuple[str, str],
    reference: tuple[str, float] | None = None,
    width: int = WIDE,
) -> Chart:
    """Points with their names beside them, the front joined; `reference`: a name and its `x`, as a line across. `y` is
    logarithmic where it spans more than a factor of five."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    narrow = width < 500
    height = 330 if narrow else 360
    with _figure(width, height) as figure:
        axes = figure.add_axes((54 / width, 44 / height, 1 - 72 / width, 1 - 70 / height))
        low, high = min(p.y for p in points), max(p.y for p in points)
        if low > 0 and high / low > 5:
            axes.set_yscale("log")
            axes.set_ylim(low / 1.7, high * 1.7)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            room = (high - low) * 0.15 or abs(high) * 0.1 or 1
            axes.set_ylim(max(0, low - room) if low >= 0 else low - room, high + room)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        right = max([p.x for p in points] + ([reference[1]] if reference else []))
        axes.set_xlim(0, right * 1.06)
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5)
        axes.set_xlabel(axes_text[0], color=MUTED)
        figure.text(0.004, 1 - 14 / height, axes_text[1], color=MUTED)
        front = [p for p in points if p.best]
        axes.plot([p.x for p in front], [p.y for p in front], color=ACCENT_SOFT, linewidth=2, zorder=2)
        if reference is not None:
            axes.axvline(reference[1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            label = _short(reference[0], 24)
            axes.annotate(
                label,
                (reference[1], 1),
                (-5, -12),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right",
                color=MUTED,
            )
        for p in points:
            axes.plot(
                p.x,
                p.y,
                "o",
                markersize=9,
                color=ACCENT if p.best else QUIET,
                markeredgecolor=PAPER,
                markeredgewidth=1.5,
                zorder=3,
            )
        _labels(axes, points, right, width)
    return Chart(figure, text)


def _labels(axes: Any, points: Sequence[Point], right: float, width: int) -> None:
    """Names beside their points, on the side with room, moved up or down where two would lie on one another."""
    taken: list[tuple[float, float, float]] = []
    for p in sorted(points, key=lambda p: -p.y):
        x, y = axes.transData.transform((p.x, p.y))
        label = _short(p.label, 22 if width < 500 else 34)
        to_left = x + 10 + len(label) * 6.6 > width * 0.97
        first, last = (x - 10 - len(label) * 6.6, x - 10) if to_left else (x + 10, x + 10 + len(label) * 6.6)
        moved = next(
            (
                d
                for d in (0, -13, 13, -26, 26, -39, 39)
                if not any(a < last and first < b and abs(y + d - t) < 13 for a, b, t in taken)
            ),
            0,
        )
        taken.append((first, last, y + moved))
        axes.annotate(
            label,
            (p.x, p.y),
            (-9 if to_left else 9, moved),
            textcoords="offset points",
            va="center",
            ha="right" if to_left else "left",
            color=INK if p.best else MUTED,
            annotation_clip=False,
        )
