"""Lockstep: who goes when, who is left out, what stops everything, and that no thread outlives it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import pytest

from quantplan.engine.lockstep import Wait, lockstep

Meet = Callable[[Hashable, Mapping[int, Any]], Mapping[int, Any]]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "quantplan lockstep"]


def through(*points: Hashable) -> Callable[[Wait[Any]], list[Any]]:
    """A run that comes to each point with its name, and returns what it was answered."""
    return lambda wait: [wait(point, f"at {point}") for point in points]


def rank(point: Any) -> Any:
    return point


def test_all_meet_at_every_point_in_order() -> None:
    met: list[tuple[Any, Any]] = []

    def meet(point: Any, values: Mapping[int, Any]) -> Mapping[int, Any]:
        met.append((point, dict(values)))
        return {i: (point, i) for i in values}

    results = lockstep([through(1, 2, 3)] * 4, meet, rank)
    assert [point for point, _ in met] == [1, 2, 3]
    assert all(values == dict.fromkeys(range(4), f"at {point}") for point, values in met)
    assert results == [[(1, i), (2, i), (3, i)] for i in range(4)]


def test_points_may_be_left_out() -> None:
    met: list[tuple[Any, list[int]]] = []

    def meet(point: Any, values: Mapping[int, Any]) -> Mapping[int, Any]:
        met.append((point, list(values)))
        return values

    lockstep([through(1, 2, 5), through(2, 3), through(), through(4), through(1, 5)], meet, rank)
    assert met == [(1, [0, 4]), (2, [0, 1]), (3, [1]), (4, [3]), (5, [0, 4])]


def test_the_order_is_that_of_rank_whatever_the_points_are() -> None:
    met: list[Any] = []
    order = ["q", "k", ("experts", 1), ("experts", 0)]

    def meet(point: Any, values: Mapping[int, Any]) -> Mapping[int, Any]:
        met.append(point)
        return values

    lockstep([through("q", ("experts", 0)), through("k", ("experts", 1))], meet, order.index)
    assert met == order


def test_one_runs_at_a_time_and_in_order() -> None:
    running, trace = [0], []

    def run(number: int) -> Callable[[Wait[Any]], int]:
        def go(wait: Wait[Any]) -> int:
            for point in range(5):
                running[0] += 1
                assert running[0] == 1
                time.sleep(0.0005)
                trace.append((point, number))
                running[0] -= 1
                wait(point, None)
            return number

        return go

    assert lockstep([run(i) for i in range(5)], lambda point, values: values, rank) == list(range(5))
    assert trace == [(point, number) for point in range(5) for number in range(5)]


def test_meet_is_called_in_the_callers_thread() -> None:
    seen: list[Any] = []

    def run(wait: Wait[Any]) -> Any:
        seen.append(threading.current_thread())
        return wait(0, None)

    def meet(point: Any, values: Mapping[int, Any]) -> Mapping[int, Any]:
        assert threading.current_thread() is threading.main_thread()
        return values

    lockstep([run, run], meet, rank)
    assert threading.main_thread() not in seen
    assert len(set(seen)) == 2


def test_no_runs_and_no_points() -> None:
    assert lockstep([], lambda point, values: values, rank) == []
    assert lockstep([lambda wait: "done"], lambda point, values: values, rank) == ["done"]


@pytest.mark.parametrize("where", ["before", "between", "after"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_exception_of_a_run_stops_all(where: str, number: int) -> None:
    finished: list[int] = []

    def run(i: int) -> Callable[[Wait[Any]], None]:
        def go(wait: Wait[Any]) -> None:
            try:
                for at in ("before", "between", "after"):
                    if i == number and at == where:
                        raise KeyError(f"run {i}")
                    if at != "after":
                        wait(at, i)
            finally:
                finished.append(i)

        return go

    with pytest.raises(KeyError, match=f"run {number}"):
        lockstep([run(i) for i in range(3)], lambda point, values: values, ["before", "between"].index)
    reached = range(number + 1) if where == "before" else range(3)
    assert sorted(finished) == list(reached)  # those that had begun were unwound, others never began


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_of_meet_stops_all(error: type[BaseException]) -> None:
    unwound: list[int] = []

    def run(i: int) -> Callable[[Wait[Any]], None]:
        def go(wait: Wait[Any]) -> None:
            try:
                wait(1, None)
                wait(2, None)
                raise AssertionError("nobody goes on")
            finally:
                unwound.append(i)

        return go

    def meet(point: Any, values: Mapping[int, Any]) -> Mapping[int, Any]:
        if point == 2:
            raise error("meet")
        return values

    with pytest.raises(error, match="meet"):
        lockstep([run(i) for i in range(3)], meet, rank)
    assert sorted(unwound) == [0, 1, 2]


def test_a_run_that_swallows_exceptions_is_ended_all_the_same() -> None:
    def stubborn(wait: Wait[Any]) -> None:
        for point in range(3):
            with contextlib.suppress(Exception):
                wait(point, None)

    def meet(point: Any, values: Mapping[int, Any]) -> Mapping[int, Any]:
        raise ValueError("over")

    with pytest.raises(ValueError, match="over"):
        lockstep([stubborn] * 2, meet, rank)


def test_an_interrupt_of_a_run_is_raised() -> None:
    def interrupted(wait: Wait[Any]) -> None:
        wait(1, None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lockstep([interrupted, through(1)], lambda point, values: values, rank)


def test_many_runs() -> None:
    points = [0]

    def meet(point: Any, values: Mapping[int, Any]) -> Mapping[int, Any]:
        points[0] += 1
        total = sum(values.values())
        return dict.fromkeys(values, total)

    def run(wait: Wait[Any]) -> int:
        return sum(wait(point, 1) for point in range(20))

    assert lockstep([run] * 200, meet, rank) == [200 * 20] * 200
    assert points == [20]


def test_what_a_run_brings_is_not_held_after_it_has_gone_on() -> None:
    """Memory: a point's values are let go before the next point's are made."""
    import gc
    import weakref

    class Value:
        pass

    alive: list[Any] = []

    def run(wait: Wait[Any]) -> None:
        for point in range(3):
            value: Any = Value()
            alive.append(weakref.ref(value))
            value = wait(point, value)
            del value

    def meet(point: Any, values: Mapping[int, Any]) -> Mapping[int, Any]:
        gc.collect()
        assert sum(ref() is not None for ref in alive) == len(values)
        return values

    lockstep([run] * 3, meet, rank)


@pytest.mark.parametrize("at_once", [2, 3])
def test_as_many_as_asked_run_at_once(at_once: int) -> None:
    """All slots are used, and no more: every run waits inside until `at_once` of them are in."""
    inside, most, lock, full = [0], [0], threading.Lock(), threading.Barrier(at_once)

    def run(wait: Wait[Any]) -> list[Any]:
        answers = []
        for point in range(3):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            full.wait(10)
            with lock:
                inside[0] -= 1
            answers.append(wait(point, point))
        return answers

    met: list[tuple[Any, list[int]]] = []

    def meet(point: Any, values: Mapping[int, Any]) -> Mapping[int, Any]:
        assert inside[0] == 0  # all have come to a point
        met.append((point, list(values)))
        return {i: (point, i) for i in values}

    results = lockstep([run] * (2 * at_once), meet, rank, at_once)
    assert most[0] == at_once
    assert met == [(point, list(range(2 * at_once))) for point in range(3)]
    assert results == [[(point, i) for point in range(3)] for i in range(2 * at_once)]


def test_the_first_runs_exception_is_raised_when_several_go_on_at_once() -> None:
    second_failed = threading.Event()

    def first(wait: Wait[Any]) -> None:
        wait(0, None)
        assert second_failed.wait(10)
        raise KeyError("first")

    def second(wait: Wait[Any]) -> None:
        wait(0, None)
        second_failed.set()
        raise KeyError("second")

    with pytest.raises(KeyError, match="first"):
        lockstep([first, second, through(0, 1)], lambda point, values: values, rank, at_once=2)


def test_points_may_be_left_out_when_several_go_on_at_once() -> None:
    met: list[tuple[Any, list[int]]] = []

    def meet(point: Any, values: Mapping[int, Any]) -> Mapping[int, Any]:
        met.append((point, list(values)))
        return values

    lockstep([through(1, 2, 5), through(2, 3), through(), through(4), through(1, 5)], meet, rank, at_once=3)
    assert met == [(1, [0, 4]), (2, [0, 1]), (3, [1]), (4, [3]), (5, [0, 4])]
