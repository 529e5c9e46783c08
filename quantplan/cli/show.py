"""What commands show: sizes, tables, progress."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from quantplan.errors import QuantplanError, fail, size

__all__ = ["document", "event_log", "phases", "progress", "size", "table"]

NUMBER = re.compile(r"[+−-]?[\d.,]*(e[+-]\d+)?((–| ± )[\d.,]+)?( ?(B|kB|MB|GB|TB|s|ms|%))?")


class Advance(Protocol):
    """Called after each piece of work: how much is done, of how much, and what it was."""

    def __call__(self, done: int, total: int, name: str) -> None: ...


def document(data: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A table on standard output, after a line that is its title; whole cells, whatever the width, when it is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[str(cell) for cell in row] for row in rows]
    numeric = [bool(cells) and all(NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(headings))]
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading, right in zip(headings, numeric, strict=True):
        made.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in cells:
        made.add_row(*(Text(cell) for cell in row))  # Text: names of a checkpoint are no markup
    if title:
        print(title)
    Console(soft_wrap=False, width=None if sys.stdout.isatty() else 240).print(made)


@contextmanager
def progress(label: str, quiet: bool = False, in_bytes: bool = True) -> Iterator[Advance]:
    """A bar with rate and ETA on a terminal, a line now and then without one, both on standard error."""
    if quiet:
        yield lambda done, total, name: None
    elif sys.stderr.isatty():
        yield from _bar(label, in_bytes)
    else:
        yield _Lines(label)


@contextmanager
def phases(
    quiet: bool = False, in_bytes: Sequence[str] = ("quantizing",), still: Sequence[str] = ()
) -> Iterator[Callable[[str, int, int, str], None]]:
    """Progress of a run in several phases: a `progress` for each, opened when it is first heard of. Phases in `still` are a line
    a step, and nothing moves meanwhile: what is timed is not disturbed."""
    with ExitStack() as stack:
        now: dict[str, Advance] = {}

        def advance(phase: str, done: int, total: int, name: str) -> None:
            if phase not in now:
                stack.close()
                now.clear()
                now[phase] = (
                    _still(phase, quiet) if phase in still else stack.enter_context(progress(phase, quiet, phase in in_bytes))
                )
            now[phase](done, total, name)

        yield advance


@contextmanager
def event_log(path: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends an event to a file as one line of JSON, with the seconds since the start; the file is whole after
    every line. Raises QP402 when it cannot be written."""
    if path is None:
        yield lambda event: None
        return
    started = time.monotonic()

    def refused(error: OSError) -> QuantplanError:
        return fail("QP402", f"cannot be written: {error.strerror}", file=str(path))

    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - errors of the run inside are not the log's
    except OSError as error:
        raise refused(error) from error
    with file:

        def record(event: Mapping[str, Any]) -> None:
            try:
                file.write(json.dumps({"time": round(time.monotonic() - started, 3), **event}) + "\n")
                file.flush()
            except OSError as error:
                raise refused(error) from error

        yield record


def _still(label: str, quiet: bool) -> Advance:
    def line(done: int, total: int, name: str) -> None:
        if not quiet:
            print(f"{label} {name} ({done + 1} of {total})", file=sys.stderr, flush=True)

    return line


def _bar(label: str, in_bytes: bool) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), *counts),
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
