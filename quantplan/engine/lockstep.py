"""Lockstep: several runs of one piece of code that wait for each other at named points. One runs at a time.

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
) -> list[R]:
    """The results of `runs`. Each is called, in a thread of its own, with a function `wait(point, value)` that returns when
    every run has come to a point or its end. Then `meet(point, {run: value})` is called, in the caller's thread, with those at
    the point of the lowest `rank`, and they go on, in order, with the values it returns.

    Runs may leave points out, but must come to those they do in the order of `rank`. The first exception, of a run or of
    `meet`, stops all and is raised.
    """
    threads: list[_Run[V, R]] = [_Run(run) for run in runs]
    try:
        for thread in threads:
            thread.start()
            thread.go_on()
        while waiting := {i: t for i, t in enumerate(threads) if t.point is not None}:
            point = min((t.point for t in waiting.values()), key=rank)  # type: ignore[arg-type]
            here = {i: t for i, t in waiting.items() if t.point == point}
            answers = dict(meet(point, {i: t.value for i, t in here.items()}))
            for i, thread in here.items():
                thread.value = answers.pop(i)  # nothing of a point is held here while runs make what they bring to the next
                thread.go_on()
        return [thread.result for thread in threads]
    finally:
        for thread in threads:
            thread.stop()


class _Stopped(BaseException):
    """Unwinds a run that is not wanted any more."""


class _Run(threading.Thread, Generic[V, R]):
    value: V
    result: R

    def __init__(self, run: Callable[[Wait[V]], R]) -> None:
        super().__init__(name="quantplan lockstep", daemon=True)
        self._function = run
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
        except BaseException as error:  # noqa: BLE001  raised again by `go_on`
            self.error = error
        finally:
            self.point = None
            self._done.release()

    def _wait(self, point: Point, value: V) -> V:
        self.point, self.value = point, value
        self._done.release()
        self._turn.acquire()
        if not self._wanted:
            raise _Stopped
        self.point = None
        value = self.value
        del self.value
        return value

    def go_on(self) -> None:
        """Lets it run to its next point or its end. Raises what it raised."""
        self._turn.release()
        self._done.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Ends it where it is."""
        self._wanted = False
        if self.ident is not None:
            self._turn.release()
            self.join()
