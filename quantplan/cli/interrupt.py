"""Signals: the first SIGINT or SIGTERM lets the current tensor finish and stops cleanly, the second stops at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupted(Exception):
    """A clean stop between two tensors. `exit_status` is 128 plus the signal's number."""

    def __init__(self, number: int, advice: str) -> None:
        super().__init__(advice)
        self.exit_status, self.advice = 128 + number, advice


class Stop:
    """Whether a signal asked to stop."""

    number: int | None = None

    def check(self, advice: str) -> None:
        """Raises Interrupted when a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number, advice)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Notes the first SIGINT or SIGTERM in the `Stop` it gives; restores the handlers on leaving, and on the first signal."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = number
        restore()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        yield stop
    finally:
        restore()
