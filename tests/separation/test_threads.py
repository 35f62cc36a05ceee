"""Threads keep order, bound what waits between them, and lose no error."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator, Iterator

import pytest

from separation.threads import ahead, drain


def failing(count: int) -> Generator[int, None, None]:
    yield from range(count)
    raise ValueError("source")


def alive(name: str) -> bool:
    return any(thread.name == name for thread in threading.enumerate())


def test_ahead_keeps_order_and_stays_within_its_depth() -> None:
    made: list[int] = []

    def source() -> Generator[int, None, None]:
        for number in range(50):
            made.append(number)
            yield number

    items = ahead(source(), 3)
    for number, item in enumerate(items):
        assert item == number
        if number == 10:
            time.sleep(0.05)
            assert len(made) == 10 + 1 + 3
    assert made == list(range(50))


def test_ahead_raises_where_the_source_failed_and_ends_its_thread() -> None:
    got = []
    with pytest.raises(ValueError, match="source"):
        for item in ahead(failing(5), 2):
            got.append(item)
    assert got == [0, 1, 2, 3, 4]
    assert not alive("ahead")


def test_closing_ahead_early_ends_its_thread() -> None:
    closed_in: list[str] = []

    def source() -> Generator[int, None, None]:
        try:
            yield from range(10**9)
        finally:
            closed_in.append(threading.current_thread().name)

    items = ahead(source(), 2)
    assert next(items) == 0
    items.close()
    assert not alive("ahead")
    assert closed_in == ["ahead"]


def test_closing_ahead_interrupts_a_source_that_begins_to_wait_only_then() -> None:
    waits, closing = threading.Event(), threading.Event()

    def source() -> Generator[int, None, None]:
        yield 0
        closing.wait(10)
        waits.clear()
        waits.wait(10)
        yield 1

    def interrupt() -> None:
        waits.set()
        closing.set()

    items = ahead(source(), 2, interrupt)
    assert next(items) == 0
    start = time.monotonic()
    items.close()
    assert time.monotonic() - start < 3
    assert not alive("ahead")


def test_drain_makes_no_more_than_its_depth_before_it_is_taken() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    def consume(items: Iterator[int]) -> None:
        for number in items:
            if number == 10:
                time.sleep(0.05)
                assert len(made) == 10 + 1 + 3

    drain(source(), consume, 3)
    assert made == list(range(50))


def test_drain_passes_everything_on() -> None:
    got: list[int] = []
    drain(range(100), got.extend, 2)
    assert got == list(range(100))


def test_drain_tells_the_consumer_that_the_source_failed() -> None:
    seen: list[str] = []

    def consume(items: Iterator[int]) -> None:
        try:
            for _ in items:
                pass
            seen.append("whole")
        except ValueError:
            seen.append("source failed")
            raise

    with pytest.raises(ValueError, match="source"):
        drain(failing(3), consume, 2)
    assert seen == ["source failed"]


def test_drain_stops_the_source_when_the_consumer_fails() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(10**9):
            made.append(number)
            yield number

    def consume(items: Iterator[int]) -> None:
        next(items)
        raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        drain(source(), consume, 2)
    assert len(made) < 10
    assert not alive("drain")


def test_an_interruption_while_drain_waits_for_the_consumer_reaches_it() -> None:
    """Ctrl-C when all items are made and the rest of them is being consumed."""
    main, cleaned = threading.main_thread().ident, []
    assert main is not None

    def consume(items: Iterator[int]) -> None:
        try:
            next(items)
            time.sleep(0.1)  # by then this is all that the main thread waits for
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.1)
            list(items)
        except KeyboardInterrupt:
            cleaned.append(True)
            raise

    with pytest.raises(KeyboardInterrupt):
        drain(range(3), consume, 5)
    assert cleaned == [True]
    assert not alive("drain")
