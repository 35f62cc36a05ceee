"""Stages of a stream in threads of their own: reading and writing while the network works."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
_END = object()
_POLL_SECONDS = 0.1
_JOIN_SECONDS = 5.0  # a thread that waits for a pipe ends when its owner closes the pipe


def ahead(items: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """The same items, made in another thread that is at most `depth` of them ahead.

    An error of `items` is raised here, in its place. Closing this iterator ends the thread.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()
    errors: list[BaseException] = []

    def produce() -> None:
        try:
            for item in items:
                if not _put(ready, item, stopped):
                    return
        except BaseException as error:  # raised again where the items are taken
            errors.append(error)
        finally:
            _put(ready, _END, stopped)

    thread = threading.Thread(target=produce, name="ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            yield item
        if errors:
            raise errors[0]
    finally:
        stopped.set()
        thread.join(_JOIN_SECONDS)


def drain(items: Iterable[Item], consume: Callable[[Iterator[Item]], None], depth: int) -> None:
    """Make `items` in this thread and `consume` them in another, at most `depth` behind.

    Returns when both are done. An error of either ends both and is raised here; when making the
    items fails, `consume` sees that error come out of its iterator, so that it can clean up.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()
    source_error: list[BaseException] = []
    errors: list[BaseException] = []

    def received() -> Iterator[Item]:
        while (item := ready.get()) is not _END:
            yield item
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
        _put(ready, _END, stopped)
        stopped.wait()  # a join that Ctrl-C ends takes the thread for ended (Python 3.11)
        thread.join()

    thread = threading.Thread(target=run, name="drain", daemon=True)
    thread.start()
    try:
        for item in items:
            if not _put(ready, item, stopped):
                break
        finish()
    except BaseException as error:  # also Ctrl-C while the rest is consumed: `consume` hears of it
        source_error.append(error)
        finish()
        raise
    if errors:
        raise errors[0]


def _put(ready: queue.Queue[Any], item: object, stopped: threading.Event) -> bool:
    """Wait for room; False if the other side has stopped."""
    while not stopped.is_set():
        try:
            ready.put(item, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
        return True
    return False
