"""What commands show: sizes, tables, progress."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

NUMBER = re.compile(r"[+−-]?[\d.,]*( ?(B|kB|MB|GB|TB|s|%))?")


class Advance(Protocol):
    """Called after each piece of work: how much is done, of how much, and what it was."""

    def __call__(self, done: int, total: int, name: str) -> None: ...


def size(count: float) -> str:
    """`116.8 MB`: decimal units, as disks and hubs count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def document(data: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A table on standard output; whole cells, whatever the width, when it is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[str(cell) for cell in row] for row in rows]
    numeric = [bool(cells) and all(NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(headings))]
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading, right in zip(headings, numeric, strict=True):
        made.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in cells:
        made.add_row(*(Text(cell) for cell in row))  # Text: names of a checkpoint are no markup
    Console(soft_wrap=False, width=None if sys.stdout.isatty() else 240).print(made)


@contextmanager
def progress(label: str, quiet: bool = False) -> Iterator[Advance]:
    """A bar with rate and ETA on a terminal, a line now and then without one, both on standard error."""
    if quiet:
        yield lambda done, total, name: None
    elif sys.stderr.isatty():
        yield from _bar(label)
    else:
        yield _Lines(label)


def _bar(label: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()),
        *(TimeRemainingColumn(), TextColumn("{task.fields[name]}", markup=False)),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None, name="")
        yield lambda done, total, name: bars.update(task, completed=done, total=total, name=name[-60:])


class _Lines:
    """Progress for logs: a line every ten seconds."""

    SECONDS = 10.0

    def __init__(self, label: str) -> None:
        self.label, self.started = label, time.monotonic()
        self.said = self.started

    def __call__(self, done: int, total: int, name: str) -> None:
        now = time.monotonic()
        if now - self.said >= self.SECONDS and done:
            self.said = now
            left = (now - self.started) * (total - done) / done
            print(f"{self.label}: {100 * done // total} %, about {left:.0f} s left, {name}", file=sys.stderr, flush=True)
