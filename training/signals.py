"""Stopping a run between two steps when the person or the scheduler asks."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context that turns SIGINT and SIGTERM into a request the loop reads after each step.

    A second SIGINT interrupts at once. The previous handlers return when the context ends.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def exit_code(number: int) -> int:
    """Of a run that a signal ended: 130 for Ctrl-C; 0 for others, as a scheduler expects."""
    return 130 if number == signal.SIGINT else 0


def ignore_interrupts(worker: int) -> None:
    """`worker_init_fn` of a data loader, whose workers end when the loop ends them.

    Ctrl-C and a scheduler's SIGTERM reach the workers too, and would take the data from the step
    that is to be finished.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent_alone, daemon=True).start()


def _obey_parent_alone() -> None:
    """Take every SIGTERM of this process and end on that of the one that started it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
