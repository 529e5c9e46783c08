"""Lockstep: several runs of one piece of code that wait for each other at named points.

A block's forward is run once for every batch, and yet each of its matrices is solved with the inputs of all batches before any
of them goes on: no forward is repeated, and what a run holds between two points is all that is held of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

Point = Hashable
R = TypeVar("R")  # what a run returns
V = TypeVar("V")  # what a run brings to a point
Wait = Callable[[Point, V], V]


def lockstep(
    runs: Sequence[Callable[[Wait[V]], R]],
    meet: Callable[[Point, Mapping[int, V]], Mapping[int, V]],
    rank: Callable[[Point], object],
    at_once: int = 1,
) -> list[R]:
    """The results of `runs`. Each is called, in a thread of its own, with a function `wait(point, value)` that returns when
    every run has come to a point or its end. Then `meet(point, {run: value})` is called, in the caller's thread, with those at
    the point of the lowest `rank`, and they go on, in order and `at_once` at a time, with the values it returns.

    Runs may leave points out, but must come to those they do in the order of `rank`. The first exception, of the first run that
    has any or of `meet`, stops all and is raised.
    """
    slots = threading.Semaphore(at_once)
    threads: list[_Run[V, R]] = [_Run(run, slots) for run in runs]
    try:
        _go_on(threads)
        while waiting := {i: t for i, t in enumerate(threads) if t.point is not None}:
            point = min((t.point for t in waiting.values()), key=rank)  # type: ignore[arg-type]
            here = {i: t for i, t in waiting.items() if t.point == point}
            answers = dict(meet(point, {i: t.value for i, t in here.items()}))
            for i, thread in here.items():
                thread.value = answers.pop(i)  # nothing of a point is held here while runs make what they bring to the next
            _go_on(list(here.values()))
        return [thread.result for thread in threads]
    finally:
        for thread in threads:
            thread.stop()


def _go_on(threads: Sequence[_Run[V, R]]) -> None:
    """Lets them run to their next points or their ends. Raises what the first of those that raised did; the ones after it that
    have not gone on do not."""
    going: list[_Run[V, R]] = []
    for thread in threads:
        thread.slots.acquire()
        if any(other.error is not None for other in going):
            thread.slots.release()
            break
        thread.go_on()
        going.append(thread)
    for thread in going:
        thread.arrive()
    for thread in going:
        if thread.error is not None:
            raise thread.error


class _Stopped(BaseException):
    """Unwinds a run that is not wanted any more."""


class _Run(threading.Thread, Generic[V, R]):
    """One run. It holds one of `slots` while it goes, which whoever lets it go on has taken."""

    value: V
    result: R

    def __init__(self, run: Callable[[Wait[V]], R], slots: threading.Semaphore) -> None:
        super().__init__(name="quantplan lockstep", daemon=True)
        self._function, self.slots = run, slots
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._wanted = True
        self.point: Point | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        self._turn.acquire()
        try:
            if self._wanted:
                self.result = self._function(self._wait)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  raised again by `_go_on`
            self.error = error
        finally:
            self.point = None
            self._yield()

    def _yield(self) -> None:
        self.slots.release()
        self._done.release()

    def _wait(self, point: Point, value: V) -> V:
        self.point, self.value = point, value
        self._yield()
        self._turn.acquire()
        if not self._wanted:
            raise _Stopped
        self.point = None
        value = self.value
        del self.value
        return value

    def go_on(self) -> None:
        """Lets it run, if need be for the first time."""
        if self.ident is None:
            self.start()
        self._turn.release()

    def arrive(self) -> None:
        """Waits until it has come to its next point or its end."""
        self._done.acquire()

    def stop(self) -> None:
        """Ends it where it is."""
        self._wanted = False
        if self.ident is not None:
            self._turn.release()
            self.join()
