"""Stages of a stream in threads of their own: reading and writing while the network works."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, TypeVar

Item = TypeVar("Item")
_END = object()
_POLL_SECONDS = 0.1
_JOIN_SECONDS = 5.0  # for a thread that waits for what nobody can end, such as a disk


def ahead(
    items: Generator[Item, None, None],
    depth: int,
    interrupt: Callable[[], object] = lambda: None,
) -> Generator[Item, None, None]:
    """The same items, made in another thread: at most `depth` before they are taken here.

    An error of `items` is raised here, in its place. Closing this iterator ends the thread, which
    closes `items`.

    interrupt: ends whatever `items` waits for; called until the thread has ended.
    """
    ready: queue.Queue[Any] = queue.Queue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()
    errors: list[BaseException] = []

    def produce() -> None:
        try:
            with closing(items):
                _make(items, ready, room, stopped)
        except BaseException as error:  # raised again where the items are taken
            errors.append(error)
        finally:
            ready.put(_END)

    thread = threading.Thread(target=produce, name="ahead", daemon=True)
    thread.start()
    try:
        yield from _taken(ready, room)
        if errors:
            raise errors[0]
    finally:
        stopped.set()
        _join(thread, interrupt)


def drain(items: Iterable[Item], consume: Callable[[Iterator[Item]], None], depth: int) -> None:
    """Make `items` in this thread, at most `depth` before `consume` takes them in another.

    Returns when both are done. An error of either ends both and is raised here; when making the
    items fails, `consume` sees that error come out of its iterator, so that it can clean up.
    """
    ready: queue.Queue[Any] = queue.Queue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()
    source_error: list[BaseException] = []
    errors: list[BaseException] = []

    def received() -> Iterator[Item]:
        yield from _taken(ready, room)
        if source_error:
            raise source_error[0]

    def run() -> None:
        try:
            consume(received())
        except BaseException as error:  # raised again in the thread that makes the items
            errors.append(error)
        finally:
            stopped.set()

    def finish() -> None:
        ready.put(_END)
        stopped.wait()  # a join that Ctrl-C ends takes the thread for ended (Python 3.11)
        thread.join()

    thread = threading.Thread(target=run, name="drain", daemon=True)
    thread.start()
    try:
        _make(iter(items), ready, room, stopped)
        finish()
    except BaseException as error:  # also Ctrl-C while the rest is consumed: `consume` hears of it
        source_error.append(error)
        finish()
        raise
    if errors:
        raise errors[0]


def _make(
    items: Iterator[object],
    ready: queue.Queue[Any],
    room: threading.Semaphore,
    stopped: threading.Event,
) -> None:
    """Put `items` into `ready`, each made once there is room for it, until the end or `stopped`."""
    while _wait_for(room, stopped) and (item := next(items, _END)) is not _END:
        ready.put(item)


def _taken(ready: queue.Queue[Any], room: threading.Semaphore) -> Iterator[Any]:
    while (item := ready.get()) is not _END:
        room.release()
        yield item


def _wait_for(room: threading.Semaphore, stopped: threading.Event) -> bool:
    """Take a place; False if the other side has stopped."""
    while not stopped.is_set():
        if room.acquire(timeout=_POLL_SECONDS):
            return not stopped.is_set()
    return False


def _join(thread: threading.Thread, interrupt: Callable[[], object]) -> None:
    for _ in range(round(_JOIN_SECONDS / _POLL_SECONDS)):
        if not thread.is_alive():
            return
        interrupt()  # again: the thread may only now have come to what it waits for
        thread.join(_POLL_SECONDS)
